"""Processes around the commands: one per device, restarts, SLURM jobs, searches, exit codes, locks of folders."""
