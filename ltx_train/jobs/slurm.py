"""Renders SLURM job scripts from launch/slurm/fit.sbatch into the run's folder, and submits them."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from ltx_train import config as configuration
from ltx_train import durable
from ltx_train.assembly import from_config, resolve
from ltx_train.config import Config
from ltx_train.contracts import ConfigError, UserError

_TEMPLATE, _SHARED = "slurm/fit.sbatch", "slurm/requeue.sh"


def write_script(config: Config) -> Path:
    """Writes <run>/submit.yaml, the settings of the job, and <run>/submit.sbatch. Returns the path of the script."""
    folder = from_config.run_dir(config).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    settings, script = folder / "submit.yaml", folder / "submit.sbatch"
    job_config = resolve.for_job(config, config.cluster.nodes, config.cluster.devices)
    durable.write(settings, configuration.dump(job_config))
    durable.write(script, render(config, settings))
    return script


def submit(script: Path) -> str:
    """Submits the script and returns the job's number; UserError when sbatch is missing or fails."""
    if shutil.which("sbatch") is None:
        raise UserError(f"sbatch is not on the PATH: submit {script} on a login node, or set cluster.submit=false")
    process = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False)
    if process.returncode != 0:
        raise UserError(f"sbatch refused {script}: {process.stderr.strip()}")
    return process.stdout.strip()


def render(config: Config, settings: Path) -> str:
    """Returns the job script. settings: the configuration file that the job reads."""
    cluster = config.cluster
    folder = settings.parent
    python = shlex.quote(cluster.python or sys.executable)
    values = {
        "name": _quoted("run.id", f"{config.run.experiment}/{config.run.id}"),
        "nodes": cluster.nodes, "devices": cluster.devices, "cpus": cluster.cpus,
        "time": _word("cluster.time", cluster.time),
        "signal_s": cluster.signal_s, "hung_restarts": cluster.hung_restarts,
        "device_restarts": cluster.device_restarts, "folder": shlex.quote(str(folder)),
        "requeue": (configuration.shipped("launch") / _SHARED).read_text().rstrip(),
        "logs": _quoted("run.root", str(folder / ("slurm-%A_%a.log" if cluster.array else "slurm-%j.log"))),
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
    named = ((name, getattr(cluster, name)) for name in ("partition", "account"))
    words = [f"--{name}={_word(f'cluster.{name}', value)}" for name, value in named if value]
    gres = cluster.gres if cluster.gres is None else _word("cluster.gres", cluster.gres)
    if gres is None:
        gres = "" if resolve.launch(config).device == "cpu" else f"gpu:{cluster.devices}"
    words += [f"--gres={gres}"] if gres else []
    words += [f"--array=0-{len(cluster.array) - 1}"] if cluster.array else []
    return [*words, *(_line("cluster.directives", line) for line in cluster.directives)]


def _tasks(array: list[str]) -> str:
    """The overrides of this task as a bash array: each stays one word, whatever characters it has."""
    if not array:
        return "overrides=()"
    cases = [f"  {number}) overrides=({_words(line)}) ;;" for number, line in enumerate(array)]
    return "\n".join(['case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac"])


def _words(line: str) -> str:
    """The overrides of one line, quoted for bash. ConfigError when a quote in it is not closed."""
    try:
        return " ".join(shlex.quote(word) for word in shlex.split(line))
    except ValueError as error:
        raise ConfigError(f"cluster.array: {line!r}: {error}") from error


def _line(name: str, text: str) -> str:
    """ConfigError when a text would become several lines of the script."""
    if not text.isprintable():
        raise ConfigError(f"{name}={text!r}: a line break or a control character cannot stand in a #SBATCH line")
    return text


def _word(name: str, text: str) -> str:
    """The value of a directive, which sbatch would cut at a blank."""
    if re.search(r"[\s\"'#;]", _line(name, text)):
        raise ConfigError(f"{name}={text!r}: blanks, quotes, `#` and `;` cannot stand in this directive")
    return text


def _quoted(name: str, text: str) -> str:
    """A value in quotes as sbatch reads them."""
    if '"' in _line(name, text) or "\\" in text:
        raise ConfigError(f"{name}: {text!r} cannot be written into a #SBATCH line: leave out quotes and backslashes")
    return f'"{text}"'
