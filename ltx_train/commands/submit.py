"""`ltx-train submit`: a SLURM job script from launch/slurm/fit.sbatch, shown, kept beside the run, and submitted."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from ltx_train import config as configuration
from ltx_train.commands import session
from ltx_train.config import Config
from ltx_train.contracts import Exit, UserError

_TEMPLATE = "slurm/fit.sbatch"


def run(config: Config) -> int:
    """Writes <run>/submit.yaml and <run>/submit.sbatch; prints the script and the job's id."""
    script = _written(config)
    print(script.read_text())
    if config.cluster.submit:
        print(f"submitted job {_submitted(script)}; {script}")
    return Exit.DONE


def job(config: Config) -> str:
    """Submits a run without a word; the job's number."""
    return _submitted(_written(config)).split(";")[0]


def _written(config: Config) -> Path:
    """The job script beside the run, and the settings that it reads."""
    folder = session.run_dir(config).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    settings, script = folder / "submit.yaml", folder / "submit.sbatch"
    settings.write_text(configuration.dump(_as_job(config)))
    script.write_text(render(config, settings))
    return script


def render(config: Config, settings: Path) -> str:
    """The job script."""
    cluster = config.cluster
    folder = settings.parent
    python = shlex.quote(cluster.python or sys.executable)
    values = {
        "name": f"{config.run.experiment}/{config.run.id}",
        "nodes": cluster.nodes, "devices": cluster.devices, "cpus": cluster.cpus, "time": cluster.time,
        "signal_s": cluster.signal_s, "hung_restarts": cluster.hung_restarts,
        "logs": folder / ("slurm-%A_%a.log" if cluster.array else "slurm-%j.log"),
        "directives": "\n".join(f"#SBATCH {word}" for word in _directives(config)),
        "setup": "\n".join(cluster.setup),
        "tasks": _tasks(cluster.array),
        "container": f"--container-image={shlex.quote(cluster.container)} " if cluster.container else "",
        "command": f"{python} -m ltx_train fit --config {shlex.quote(str(settings))}",
    }  # fmt: skip
    template = (configuration.shipped("launch") / _TEMPLATE).read_text()
    filled = re.sub(r"\{\{(\w+)\}\}", lambda match: str(values[match[1]]), template)
    return re.sub(r"\n{3,}", "\n\n", filled)


def _directives(config: Config) -> list[str]:
    cluster = config.cluster
    words = [f"--{name}={value}" for name in ("partition", "account") if (value := getattr(cluster, name))]
    gres = (
        cluster.gres
        if cluster.gres is not None
        else ""
        if config.strategy.device == "cpu"
        else f"gpu:{cluster.devices}"
    )
    words += [f"--gres={gres}"] if gres else []
    words += [f"--array=0-{len(cluster.array) - 1}"] if cluster.array else []
    return [*words, *cluster.directives]


def _tasks(array: list[str]) -> str:
    """A bash array of overrides, one element per task of the job array; empty for a single job."""
    if not array:
        return 'overrides=""'
    lines = "\n".join(f"  {shlex.quote(line)}" for line in array)
    return f"all=(\n{lines}\n)\noverrides=${{all[$SLURM_ARRAY_TASK_ID]}}"


def _as_job(config: Config) -> Config:
    """What the job's processes read: as many as the job has tasks, each with one device."""
    world = config.cluster.nodes * config.cluster.devices
    name = "ddp" if world > 1 and config.strategy.name == "single" else config.strategy.name
    strategy = replace(config.strategy, name=name, devices=config.cluster.devices)
    return replace(config, strategy=strategy)


def _submitted(script: Path) -> str:
    if shutil.which("sbatch") is None:
        raise UserError(f"sbatch is not on the PATH: submit {script} on a login node, or set cluster.submit=false")
    done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"sbatch refused {script}: {done.stderr.strip()}")
    return done.stdout.strip()
