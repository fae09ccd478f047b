"""Options of groups over a saved configuration: `ltx-train fit prepared strategy=zero3`.

Owns what an option changes. Hydra composes options only into a new configuration, before an experiment's own values.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ltx_train.config import suggest
from ltx_train.config.files import config_dir, group_options
from ltx_train.config.schema import Config
from ltx_train.contracts import ConfigError

# The first line of a file whose values belong to several groups, in Hydra's syntax.
_GLOBAL = "# @package _global_"


@dataclass(frozen=True, slots=True)
class _Option:
    """values: by setting or group of settings. is_global: whether they stand below their own groups' names."""

    values: dict[str, Any]
    is_global: bool


def with_option(node: Any, group: str, option: str) -> Any:
    """The configuration with an option of a group chosen.

    Settings that some option of the group sets take this option's value, or their default. All other settings stay.
    Example: `memory=auto` over a saved `memory=recompute` empties memory.keep, and memory.budget_gib stays. ConfigError
    for an unknown option, and for an experiment, which is a whole configuration.
    """
    options = group_options()[group]
    if group == "experiment":
        raise ConfigError(f"experiment={option}: the folder has an experiment's settings; leave one of the two out")
    if option not in options:
        raise ConfigError(f"{group}={option}: choose one of {', '.join(options)}{suggest.nearest(option, options)}")
    chosen = _read(group, option)
    if chosen.is_global:
        return OmegaConf.merge(node, chosen.values)
    defaults: Any = OmegaConf.structured(Config)[group]
    touched = {name for other in options for name in _read(group, other).values}
    reset = {name: _plain(defaults, name) for name in touched if not OmegaConf.is_missing(defaults, name)}
    return OmegaConf.merge(node, {group: {**reset, **chosen.values}})


def _read(group: str, option: str) -> _Option:
    """An option's values, without those that it leaves to the user (`???`)."""
    path = Path(config_dir()) / group / f"{option}.yaml"
    loaded: Any = OmegaConf.load(path)
    values = {str(name): _plain(loaded, str(name)) for name in loaded if not OmegaConf.is_missing(loaded, name)}
    return _Option(values, path.read_text(encoding="utf-8").startswith(_GLOBAL))


def _plain(node: Any, name: str) -> Any:
    """A value without OmegaConf's containers; interpolations stay as they are written."""
    value = node._get_node(name)
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value._value()
