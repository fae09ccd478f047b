"""`fit -m optim.lr=1e-4,3e-4`: comma lists become a grid search, because Hydra's users type them."""

from __future__ import annotations

import hashlib

from ltx_train.config.compose import changed
from ltx_train.config.files import group_options
from ltx_train.config.schema import Config
from ltx_train.config.settings import all_settings
from ltx_train.contracts import ConfigError

_OPENING, _CLOSING, _QUOTES = "[{(", "]})", "'\""


def split_lists(command: str, overrides: list[str], *, multirun: bool) -> tuple[list[str], dict[str, list[str]]]:
    """The overrides without comma lists, and the lists by setting.

    ConfigError where a list cannot be searched: in another command than `fit`, or for a group.
    """
    plain: list[str] = []
    lists: dict[str, list[str]] = {}
    for override in overrides:
        name, _, text = override.partition("=")
        values = top_level_values(text)
        setting = all_settings().get(name)
        is_text = setting is not None and setting.kind == "str" and not setting.allowed
        if len(values) < 2 or (is_text and not multirun):
            plain.append(override)
            continue
        takes_list = name == "checkpoints" or (setting is not None and setting.kind in ("list", "dict"))
        if takes_list and not multirun:
            raise ConfigError(f"{override}: a list is written in brackets, as {name}=[{text}]")
        if name in group_options():
            raise ConfigError(
                f"{override}: a search is over single settings, as {name}.NAME=...; start a run for each {name} "
                "instead, with a run.id of its own"
            )
        if command != "fit":
            raise ConfigError(f"{override}: one value is expected; `ltx-train fit -m {override}` searches over several")
        lists[name] = values
    if multirun and not lists:
        raise ConfigError("-m searches over comma lists: ltx-train fit -m optim.lr=1e-4,3e-4")
    return plain, lists


def as_search(config: Config, lists: dict[str, list[str]]) -> Config:
    """The configuration of a grid search over the lists. Its name follows from them, so that the same command
    continues it."""
    space = [f"{name}=choice({', '.join(values)})" for name, values in lists.items()]
    name = "-".join(key.rsplit(".", 1)[-1] for key in lists)
    digest = hashlib.sha256("\n".join(space).encode()).hexdigest()[:6]
    search = {"sweep.space": space, "sweep.sampler": "grid", "sweep.prune": False}
    if config.sweep.name == all_settings()["sweep.name"].default:
        search["sweep.name"] = f"{name}-{digest}"
    return changed(config, search)


def top_level_values(text: str) -> list[str]:
    """The values of a comma list; commas within brackets or quotes separate nothing."""
    values, depth, quote = [""], 0, ""
    for character in text:
        if quote or character in _QUOTES:
            quote = "" if character == quote else quote or character
        depth += (character in _OPENING) - (character in _CLOSING) if not quote else 0
        if character == "," and not depth and not quote:
            values.append("")
        else:
            values[-1] += character
    return [value.strip() for value in values]
