"""The environment variables by which torchrun, this project's launcher and srun tell a process its rank.

Imports no torch: the process that starts the others has no use for it.
"""

from __future__ import annotations

from collections.abc import Mapping


def rank_variables(environment: Mapping[str, str]) -> tuple[str, str, str] | None:
    """The names of the variables with the rank, the world size and the local rank; None for a single process."""
    if "WORLD_SIZE" in environment:
        return "RANK", "WORLD_SIZE", "LOCAL_RANK"
    if int(environment.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_ID" in environment:
        return "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"
    return None
