"""Every setting of the schema by its dotted name, and the check of a value against its declaration.

The one source of `--help`, docs/settings.md, completion, "did you mean" and the rules for single settings. Imports no
library.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any

from ltx_train.config import suggest
from ltx_train.config.schema import Config
from ltx_train.config.schema.fields import KEY, Declaration
from ltx_train.contracts import ConfigError

_UNSET = "???"
# Groups whose entries the user names.
OPEN_MAPPINGS = (
    "mixture", "modes", "adapter.rank_pattern", "adapter.alpha_pattern", "loss.token_weights", "strategy.deepspeed",
    "sample.references", "sample.frames", "sample.strength_of", "export.strength_of", "lora.strength_of",
)  # fmt: skip
OPEN_PREFIXES = ("mode.conditions.", *(f"{name}." for name in OPEN_MAPPINGS))


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One setting. kind: str, int, float, number (or a word), bool, list, dict or any. nullable: whether `null` is a
    value. required: there is no default."""

    name: str
    kind: str
    nullable: bool
    default: Any
    required: bool
    declared: Declaration

    @property
    def group(self) -> str:
        return self.name.partition(".")[0]

    @property
    def allowed(self) -> str:
        """Choices and limits in words; empty when there are none."""
        d = self.declared
        if self.kind == "number":
            return f"{'|'.join(map(str, d.choices))}, or at least {d.least or 0:g}"
        if d.choices:
            return "|".join("null" if choice is None else choice for choice in d.choices)
        if d.least is not None and d.most is not None:
            return f"{d.least:g} to {d.most:g}"
        if d.least is not None and d.below is not None:
            return f"{d.least:g} to below {d.below:g}"
        return "" if d.least is None else f"at least {d.least:g}"

    @property
    def expected(self) -> str:
        """What a value of this setting looks like."""
        words = {
            "int": "a whole number", "float": "a number", "bool": "true or false", "list": "a list in brackets",
            "dict": "a mapping in braces", "number": f"a number or {'|'.join(map(str, self.declared.choices))}",
        }  # fmt: skip
        text = words.get(self.kind, "a text")
        return f"{text} or null" if self.nullable else text


@lru_cache(maxsize=1)
def all_settings() -> Mapping[str, Setting]:
    """By dotted name, in the schema's order."""
    return {setting.name: setting for setting in _walk(Config, "")}


@lru_cache(maxsize=1)
def groups() -> Mapping[str, str]:
    """The schema's groups with the first line of what they are about."""
    hints = typing.get_type_hints(Config)
    return {
        f.name: (hints[f.name].__doc__ or "").strip().splitlines()[0]
        for f in fields(Config)
        if is_dataclass(hints[f.name])
    }


@lru_cache(maxsize=1)
def known_names() -> tuple[str, ...]:
    """Names that may stand before `=`: settings and groups."""
    return (*all_settings(), *groups())


def _walk(owner: Any, prefix: str) -> Iterator[Setting]:
    hints = typing.get_type_hints(owner)
    for entry in fields(owner):
        if is_dataclass(hints[entry.name]):
            yield from _walk(hints[entry.name], f"{prefix}{entry.name}.")
        elif KEY in entry.metadata:
            kind, nullable = _kind(hints[entry.name])
            yield Setting(
                name=prefix + entry.name, kind=kind, nullable=nullable, default=_default(entry),
                required=entry.default == _UNSET, declared=entry.metadata[KEY],
            )  # fmt: skip
        else:
            # Modes are declared in `contracts`, whose docstrings describe their fields.
            declared = Declaration(help=entry.metadata.get("help", ""), choices=_members(hints[entry.name]))
            yield Setting(
                name=prefix + entry.name, kind=_kind(hints[entry.name])[0], nullable=False, default=_default(entry),
                required=False, declared=declared,
            )  # fmt: skip


def _members(hint: Any) -> tuple[str, ...]:
    if not isinstance(hint, type):
        return ()
    return tuple(str(member) for member in hint) if issubclass(hint, StrEnum) else ()


def _kind(hint: Any) -> tuple[str, bool]:
    if isinstance(hint, types.UnionType):
        parts = [part for part in typing.get_args(hint) if part is not types.NoneType]
        # A number, or one of the words that the declaration lists.
        return "number" if len(parts) > 1 else _kind(parts[0])[0], types.NoneType in typing.get_args(hint)
    origin = typing.get_origin(hint) or hint
    return ("any", True) if origin is Any else (origin.__name__, False)


def _default(entry: Field[Any]) -> Any:
    value = entry.default_factory() if entry.default_factory is not MISSING else entry.default
    return None if value == _UNSET else value


def check_value(config: Config, setting: Setting) -> None:
    """ConfigError when a composed value, or an item of a list, is none of the choices or beyond a limit."""
    value = value_of(config, setting.name)
    declared = setting.declared
    if declared.choices and not (setting.kind == "number" and isinstance(value, (int, float))):
        for item in value if isinstance(value, list) else [value]:
            _check_choice(setting.name, item, declared)
        return
    if value is None or not isinstance(value, (int, float)):
        return
    if declared.below is not None or declared.most is not None:
        _check_interval(setting.name, value, declared)
    elif declared.least is not None and value < declared.least:
        raise ConfigError(f"{setting.name}={value}: must be at least {declared.least:g}")


def _check_choice(name: str, value: Any, declared: Declaration) -> None:
    known = [choice for choice in declared.choices if choice is not None]
    # None is compared by itself: the text `None` is no `null`.
    if None not in declared.choices if value is None else str(value) not in known:
        listed = ", ".join("null" if choice is None else choice for choice in declared.choices)
        raise ConfigError(f"{name}={value!r}: choose one of {listed}{suggest.nearest(str(value), known)}")


def _check_interval(name: str, value: float, declared: Declaration) -> None:
    least = declared.least or 0.0
    closed = declared.below is None
    high = declared.most if declared.most is not None else declared.below
    assert high is not None
    if not least <= value <= high or (not closed and value == high):
        raise ConfigError(f"{name}={value:g}: must lie in [{least:g}, {high:g}{']' if closed else ')'}")


def value_of(config: Config, dotted: str) -> Any:
    value: Any = config
    for part in dotted.split("."):
        value = getattr(value, part)
    return value


_INT = re.compile(r"[+-]?\d[\d_]*")
_BOOL = ("true", "false", "yes", "no", "on", "off", "1", "0")


def check_text(setting: Setting, text: str) -> None:
    """ConfigError with the expected type when the text of an override cannot be a value of the setting."""
    word = text.strip().strip("'\"")
    if "${" in text or (word == "null" and setting.nullable):
        return
    if setting.kind == "number" and word in setting.declared.choices:
        return
    if not _fits(setting.kind, word, text):
        raise ConfigError(f"{setting.name}={text}: {setting.expected} is expected{_mend(setting, text)}")


def _fits(kind: str, word: str, text: str) -> bool:
    match kind:
        case "int":
            return _INT.fullmatch(word) is not None
        case "float" | "number":
            try:
                float(word)
            except ValueError:
                return False
            return True
        case "bool":
            return word.lower() in _BOOL
        case "list":
            return text.lstrip().startswith("[")
        case "dict":
            return text.lstrip().startswith("{")
        case _:
            return True


_EXAMPLES = {"int": "8", "float": "0.5", "number": "25", "bool": "true", "list": "[a,b]", "dict": "{name: 1}"}


def _mend(setting: Setting, text: str) -> str:
    """What to write instead: brackets around the text, or a value as the default is."""
    if setting.kind == "list" and text and not set(text) & set("[]{}"):
        return f": write {setting.name}=[{text}]"
    example = _EXAMPLES[setting.kind] if setting.default in (None, [], {}) else shown(setting.default)
    return f", as {setting.name}={example}"


def shown(value: Any) -> str:
    """A value as the command line spells it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        entries: Any = value
        return "[" + ",".join(shown(entry) for entry in entries) + "]"
    if isinstance(value, dict):
        mapping: Any = value
        return "{" + ",".join(f"{k}: {shown(v)}" for k, v in mapping.items()) + "}"
    return f"{value:g}" if isinstance(value, float) else str(value)
