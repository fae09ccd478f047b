"""`ltx-train submit`: renders a SLURM job script, shows it and submits it."""

from __future__ import annotations

from ltx_train.assembly.closing import close
from ltx_train.config import Config
from ltx_train.contracts import Exit
from ltx_train.jobs import slurm


def run(config: Config) -> int:
    """Prints the script, and the job's number if it is submitted."""
    script = slurm.write_script(config)
    print(script.read_text())
    if config.cluster.submit:
        print(f"submitted job {slurm.submit(script)}")
        close(script, "squeue --me")
    else:
        close(script, f"sbatch {script}")
    return Exit.DONE
