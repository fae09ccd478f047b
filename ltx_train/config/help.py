"""What the command line prints about itself: help, the page of all settings, completion scripts.

Everything comes from the schema, the table of commands and the files in conf/. Imports no library.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ltx_train import __version__
from ltx_train.config import suggest
from ltx_train.config.command_table import COMMANDS
from ltx_train.config.files import group_options
from ltx_train.config.settings import Setting, all_settings, groups, shown
from ltx_train.contracts import ConfigError

_USAGE = """usage: ltx-train <command> [folder] [group=option ...] [key=value ...]
  folder              a run's folder, or a prepared folder: its config.yaml supplies all settings
  -m                  search over comma lists: fit -m optim.lr=1e-4,3e-4
  --cfg job           print the configuration and stop
  --config FILE       start from a saved config.yaml instead of the groups
  --config-dir DIR    a folder with your own groups (experiment/my_run.yaml, ...)
  --help              a command's settings; `ltx-train help GROUP` lists one group"""


def overview() -> str:
    """`ltx-train --help`."""
    lines = [f"ltx-train {__version__}: train, measure and ship LTX-2.3 LoRAs", "", _USAGE, "", "commands:"]
    lines += [f"  {kind.name:<11}{kind.summary}" for kind in COMMANDS.values()]
    example = "example: ltx-train fit experiment=audio_reference adapter=audio_only optim.steps=500"
    return "\n".join([*lines, "", example])


def topic(name: str) -> str:
    """Help on a command or on a group of settings; ConfigError for another word."""
    if name in COMMANDS:
        return command(name)
    if name in groups():
        return "\n".join(_group(name, group_options()))
    known = list(dict.fromkeys([*COMMANDS, *groups()]))
    raise ConfigError(f"there is no help on {name!r}{suggest.nearest(name, known)}; there are: {', '.join(known)}")


def command(name: str) -> str:
    """`ltx-train NAME --help`: its settings with default, choices and one line each."""
    kind, options = COMMANDS[name], group_options()
    lines = [f"ltx-train {name}: {kind.summary}"]
    if kind.needs:
        lines.append(f"needs: {', '.join(kind.needs)}")
    if name == "completion":
        return "\n".join([*lines, "", "usage: ltx-train completion bash|zsh|fish"])
    lines += ["", _USAGE, ""]
    for group in kind.groups:
        lines += [*_group(group, options), ""]
    if name in ("fit", "evaluate"):
        lines += [*_entry(all_settings()["mixture" if name == "fit" else "checkpoints"]), ""]
    if kind.reads_fit:
        lines += ["and every setting of fit: ltx-train fit --help"]
    return "\n".join(lines).rstrip()


def _group(name: str, options: dict[str, list[str]]) -> Iterator[str]:
    yield f"{name}: {groups()[name]}"
    if name in options:
        yield f"  {name}=NAME takes {', '.join(options[name])}"
    for setting in all_settings().values():
        if setting.group == name:
            yield from _entry(setting)


def _entry(setting: Setting) -> Iterator[str]:
    default = "...  (no default)" if setting.required else shown(setting.default)
    yield f"  {setting.name}={default}{f'  [{setting.allowed}]' if setting.allowed else ''}"
    yield f"      {setting.declared.help}"


def settings_page() -> str:
    """docs/settings.md."""
    lines = [
        "# Settings",
        "",
        "Every setting with its default, its choices or limits, and one line. Generated from `ltx_train/config/schema` "
        "by `make settings`;",
        "`ltx-train COMMAND --help` prints the same for one command, `ltx-train help GROUP` for one group.",
        "",
    ]
    options = group_options()
    for name, text in groups().items():
        lines += [f"## {name}", "", text, ""]
        if name in options:
            lines += [f"`{name}=NAME` takes {', '.join(f'`{o}`' for o in options[name])}.", ""]
        lines += _table([s for s in all_settings().values() if s.group == name])
    lines += ["## Others", "", *_table([s for s in all_settings().values() if s.group not in groups()])]
    return "\n".join(lines).rstrip() + "\n"


def _table(settings: Sequence[Setting]) -> list[str]:
    rows = ["| setting | default | allowed | |", "|---|---|---|---|"]
    for setting in settings:
        allowed = setting.allowed.replace("|", ", ") or setting.expected
        default = "none" if setting.required else f"`{shown(setting.default)}`"
        rows.append(f"| `{setting.name}` | {default} | {allowed} | {setting.declared.help} |")
    return [*rows, ""]


def completion_words() -> list[str]:
    """What may be typed behind a command: `key=` for settings, `group=option`, and `key=choice`."""
    words: list[str] = []
    for group, options in group_options().items():
        words += [f"{group}={option}" for option in options]
    for setting in all_settings().values():
        choices = [choice for choice in setting.declared.choices if choice is not None]
        choices = ["true", "false"] if setting.kind == "bool" else choices
        words += [f"{setting.name}={choice}" for choice in choices] or [f"{setting.name}="]
    return words


def completion(shell: str) -> str:
    """A script that completes commands and settings; ConfigError for another shell."""
    scripts = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}
    if shell not in scripts:
        raise ConfigError(f"completion is there for {', '.join(scripts)}: ltx-train completion bash")
    script = scripts[shell].replace("@COMMANDS@", " ".join(COMMANDS))
    separator = "\n" if shell == "fish" else " "
    return script.replace("@WORDS@", separator.join(completion_words()))


# The token up to the cursor is cut out of the line: bash itself breaks words at `=`.
_BASH = """# bash completion for ltx-train: source <(ltx-train completion bash)
_ltx_train() {
  local line="${COMP_LINE:0:COMP_POINT}" token before
  token="${line##* }"
  if [[ "${line% *}" != *" "* ]]; then
    COMPREPLY=($(compgen -W "@COMMANDS@" -- "$token")); return
  fi
  COMPREPLY=($(compgen -W "@WORDS@" -- "$token") $(compgen -f -- "$token"))
  if [[ "$token" == *=* && "$COMP_WORDBREAKS" == *=* ]]; then
    before="${token%"${token##*=}"}"; COMPREPLY=("${COMPREPLY[@]#"$before"}")
  fi
  [[ ${#COMPREPLY[@]} -eq 1 && "${COMPREPLY[0]}" == *= ]] && compopt -o nospace
}
complete -F _ltx_train ltx-train
"""
_ZSH = """#compdef ltx-train
# zsh completion for ltx-train: source <(ltx-train completion zsh)
_ltx_train() {
  local -a commands words_
  commands=(@COMMANDS@)
  words_=(@WORDS@)
  if (( CURRENT == 2 )); then compadd -a commands; else compadd -S '' -a words_; _files; fi
}
compdef _ltx_train ltx-train
"""
_FISH = """# fish completion for ltx-train: ltx-train completion fish | source
complete -c ltx-train -n __fish_use_subcommand -f -a "@COMMANDS@"
complete -c ltx-train -n "not __fish_use_subcommand" -a "@WORDS@"
"""
