"""`ltx-train <command> [key=value ...]`, equal to `python -m ltx_train`.

Owns the command line: which command, which configuration, how errors and exit codes come out.
Imports a command only when it runs, so that help and `--cfg job` need no torch.
"""

from __future__ import annotations

import logging
import sys

from ltx_train import __version__
from ltx_train.commands.guarded import guarded
from ltx_train.contracts import Exit

COMMANDS = {
    "prepare": "clips and captions to latents, text contexts and shards",
    "check": "audit prepared data; decoded previews to look at and listen to",
    "plan": "what will fit: peak memory, step time, chosen settings, before anything is loaded",
    "fit": "train; the same command continues an interrupted run",
    "supervise": "keep fit alive on a spot machine: notices, restarts, an object store",
    "sweep": "search settings by held-out loss; every trial and the search itself can be continued",
    "submit": "render, show and submit a SLURM job that runs fit",
    "evaluate": "held-out loss, reference gap, adapter on/off; writes report.html",
    "export": "the trained weights as a LoRA for ComfyUI and diffusers, or as a full checkpoint",
    "inspect": "prove that every key of a LoRA binds to a base model",
    "doctor": "machine, disk, data, weights, tracker, cluster: each finding with its mend",
    "bench": "speed and memory of a training step, as JSON",
    "sample": "video with sound from text, an image, audio or a reference voice",
}


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Runs one command line and returns its exit code; a user's mistake is one line on stderr."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return Exit.DONE
    if arguments[0] in ("-V", "--version"):
        print(f"ltx-train {__version__}")
        return Exit.DONE
    return guarded(lambda: _run(arguments[0], arguments[1:]))


def _run(command: str, rest: list[str]) -> int:
    from ltx_train import config
    from ltx_train.commands import launch

    if command not in COMMANDS:
        near = config.nearest(command, COMMANDS)
        raise config.ConfigError(f"there is no command {command!r}{near} (ltx-train --help lists them)")
    if rest and rest[0] in ("-h", "--help"):
        print(f"ltx-train {command}: {COMMANDS[command]}\n\n{_USAGE}")
        return Exit.DONE
    extra_dir, rest = _option(rest, "--config-dir")
    shown, overrides = _option(rest, "--cfg")
    if shown is not None:
        if shown != "job":
            raise config.ConfigError(f"--cfg {shown}: only `--cfg job` is known")
        print(config.to_yaml(overrides, extra_dir), end="")
        return Exit.DONE
    file, overrides = _option(overrides, "--config")
    settings = config.from_file(file, overrides) if file else config.compose_config(overrides, extra_dir, command)
    config.require(settings, command)
    # bitsandbytes advertises optional kernels at import, which peft triggers in every command.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return launch.command(command, settings)


def _option(arguments: list[str], name: str) -> tuple[str | None, list[str]]:
    """Takes `name VALUE` or `name=VALUE` out of the arguments."""
    from ltx_train.contracts import ConfigError

    for place, argument in enumerate(arguments):
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2], arguments[:place] + arguments[place + 1 :]
        if argument == name:
            if place + 1 == len(arguments):
                raise ConfigError(f"{name} needs a value")
            return arguments[place + 1], arguments[:place] + arguments[place + 2 :]
    return None, arguments


_USAGE = """usage: ltx-train <command> [group=option ...] [key=value ...]
  --cfg job           print the configuration and stop
  --config FILE       start from a run's config.yaml instead of the groups
  --config-dir DIR    a folder with your own groups (experiment/my_run.yaml, ...)"""


def _help() -> str:
    lines = [f"ltx-train {__version__}: train, measure and ship LTX-2.3 LoRAs", "", _USAGE, "", "commands:"]
    lines += [f"  {name:<10}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [*lines, "", "example: ltx-train fit experiment=audio_reference adapter=audio_only optim.steps=500"]
    )


if __name__ == "__main__":
    main()
