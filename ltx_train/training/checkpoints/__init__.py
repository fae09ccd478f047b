"""Saves that are whole or absent: commit, background writing, the mirror in an object store."""
