"""`ltx-train <command> [folder] [key=value ...]`, equal to `python -m ltx_train`.

Owns the command line: which command, which configuration, how errors and exit codes come out. A command is imported
when it runs, so that help, `--cfg job` and every refusal of a setting need no torch.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, NoReturn

from ltx_train import __version__, signals
from ltx_train.config.command_table import COMMANDS
from ltx_train.contracts import ConfigError, Exit
from ltx_train.jobs import output
from ltx_train.jobs.exit_codes import exit_code_of

if TYPE_CHECKING:
    from ltx_train.config import Config


def main() -> None:
    """Entry point of the console script."""
    signals.stop_like_ctrl_c()
    output.survive_readers()
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Runs one command line and returns its exit code; a user's mistake is one message on stderr."""
    return exit_code_of(lambda: _run(arguments))


def _run(arguments: list[str]) -> int:
    from ltx_train.config import help as helping

    first, rest = (arguments[0], arguments[1:]) if arguments else ("help", [])
    if first in ("-V", "--version"):
        print(f"ltx-train {__version__}")
        return Exit.DONE
    if first in ("-h", "--help", "help"):
        print(helping.topic(rest[0]) if rest else helping.overview())
        return Exit.DONE
    if first == "evaluate" and rest[:1] == ["swap"]:
        first, rest = "swap", rest[1:]
    if first not in COMMANDS:
        raise ConfigError(_no_command(first, rest))
    if any(word in ("-h", "--help") for word in rest):
        print(helping.command(first))
        return Exit.DONE
    if first == "completion":
        print(helping.completion(rest[0] if rest else ""))
        return Exit.DONE
    return _run_command(first, _parser(first).parse_intermixed_args(rest))


def _no_command(word: str, rest: list[str]) -> str:
    from ltx_train.config import suggest

    if "=" in word or word.startswith("-"):
        return f"the command is missing: ltx-train fit {' '.join([word, *rest])} (ltx-train --help lists the others)"
    return f"there is no command {word!r}{suggest.for_command(word, COMMANDS)} (ltx-train --help lists them)"


class _Parser(ArgumentParser):
    """argparse with this project's exit code."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} ({self.prog} --help)")


def _parser(command: str) -> ArgumentParser:
    parser = _Parser(prog=f"ltx-train {command}", add_help=False, allow_abbrev=False)
    parser.add_argument("words", nargs="*")
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("--cfg")
    parser.add_argument("--config")
    parser.add_argument("--config-dir")
    return parser


def _run_command(command: str, options: Namespace) -> int:
    from ltx_train import config
    from ltx_train.config import multirun

    overrides, lists = multirun.split_lists(command, options.words, multirun=options.multirun)
    if options.cfg is not None:
        if options.cfg != "job":
            raise ConfigError(f"--cfg {options.cfg}: only `--cfg job` is known")
        is_composed = not options.config and not _is_folder(overrides)
        composed = config.to_yaml(overrides, options.config_dir) if is_composed else ""
        print(composed or config.dump(_settings(command, overrides, options)), end="")
        return Exit.DONE
    settings = _settings(command, overrides, options)
    if lists:
        command, settings = "sweep", multirun.as_search(settings, lists)
    config.require(settings, command)
    from ltx_train.jobs import processes

    return processes.run_command(command, settings)


def _settings(command: str, words: list[str], options: Namespace) -> Config:
    """From a folder, from a saved file, or composed of groups and overrides."""
    from ltx_train.config import compose, folders

    if _is_folder(words):
        if options.config or options.config_dir:
            name = "--config" if options.config else "--config-dir"
            raise ConfigError(
                f"{name} beside the folder {words[0]}: the folder's config.yaml has all settings, leave {name} out"
            )
        return folders.from_folder(words[0], command, words[1:])
    if options.config:
        if options.config_dir:
            raise ConfigError("--config-dir beside --config: the file has all settings, leave --config-dir out")
        return compose.from_file(options.config, words)
    return compose.compose_config(words, options.config_dir)


def _is_folder(words: list[str]) -> bool:
    return bool(words) and "=" not in words[0]


if __name__ == "__main__":
    main()
