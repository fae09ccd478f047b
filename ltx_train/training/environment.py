"""What torchrun, our launcher or srun say in the environment of the processes they start. No torch: whoever starts
processes has no use for it."""

from __future__ import annotations

from collections.abc import Mapping


def names(environment: Mapping[str, str]) -> tuple[str, str, str] | None:
    """The variables with a process's rank, the number of processes, and its place on its machine; None when nobody
    has started several."""
    if "WORLD_SIZE" in environment:
        return "RANK", "WORLD_SIZE", "LOCAL_RANK"
    if int(environment.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_ID" in environment:
        return "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"
    return None
