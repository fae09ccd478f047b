"""Composes the configuration out of groups, files and overrides, and finds typing errors before Hydra does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ltx_train.config.rules import schema_keys, validate
from ltx_train.config.targets import settled
from ltx_train.config.words import nearest
from ltx_train.contracts import ConfigError, Mode
from ltx_train.schema import Config

ConfigStore.instance().store(name="schema", node=Config)

_NOT_READ = {
    "plan": ("data.root", "data.source"),
    "evaluate": ("data.root", "data.source"),
    "bench": ("data.root", "data.source"),
    "doctor": ("data.root", "data.source"),
}
# Lists and mappings whose entries the user names.
_MAPPINGS = ("mixture", "modes", "adapter.rank_pattern", "adapter.alpha_pattern", "loss.token_weights")
_OPEN = ("mode.conditions.", *(f"{name}." for name in _MAPPINGS))
_NOT_A_KEY = re.compile(r"Key '([^']+)' (?:not in|is not in struct)")


def config_dir() -> Path:
    """The Hydra tree: inside an installed wheel, beside the package in a checkout."""
    return shipped("conf")


def shipped(name: str) -> Path:
    """A folder of declarative files that stands beside the package in a checkout and inside it in a wheel."""
    packaged = Path(__file__).parent.parent / name
    return packaged if packaged.is_dir() else Path(__file__).parent.parent.parent / name


def compose_config(overrides: list[str], extra_dir: str | None = None, command: str = "") -> Config:
    """The validated configuration of a list of Hydra overrides; `extra_dir` adds a user's own tree.

    Settings without a default that `command` does not read may stay unset.
    """
    composed = _composed(overrides, extra_dir)
    unset = sorted(OmegaConf.missing_keys(composed))
    for name in _NOT_READ.get(command, ()):
        if name in unset:
            OmegaConf.update(composed, name, "")
            unset.remove(name)
    if unset:
        raise ConfigError(f"{' and '.join(unset)} must be set: add {unset[0]}=... to the command")
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    _name_modes(config, extra_dir)
    validate(config)
    return settled(config)


def _name_modes(config: Config, extra_dir: str | None) -> None:
    """Fills `modes` with the presets that the mixture names, so that a saved configuration holds all it needs."""
    roots = [Path(extra_dir)] if extra_dir else []
    for name in config.mixture:
        if name in config.modes:
            continue
        found = [root / "mode" / f"{name}.yaml" for root in (*roots, config_dir())]
        path = next((p for p in found if p.is_file()), None)
        if path is None:
            raise ConfigError(f"mixture: there is no mode {name!r}{nearest(name, _groups(extra_dir)['mode'])}")
        merged = OmegaConf.merge(OmegaConf.structured(Mode), OmegaConf.load(path))
        mode = OmegaConf.to_object(merged)
        assert isinstance(mode, Mode)
        config.modes[name] = mode


def from_file(path: str, overrides: list[str]) -> Config:
    """A configuration that `dump` wrote, with single settings changed; groups have been composed already."""
    groups = _groups(None)
    for override in overrides:
        _check_override(override, groups)
        if override.partition("=")[0].lstrip("+~") in groups:
            raise ConfigError(f"{override}: {path} is composed already, change single settings (key.name=value)")
    merged = OmegaConf.merge(OmegaConf.structured(load(Path(path))), OmegaConf.from_dotlist(overrides))
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(_explained(error)) from error
    assert isinstance(config, Config)
    _name_modes(config, None)
    validate(config)
    return settled(config)


def to_yaml(overrides: list[str], extra_dir: str | None = None) -> str:
    """What `--cfg job` prints; reloadable."""
    return OmegaConf.to_yaml(_composed(overrides, extra_dir), resolve=False)


def dump(config: Config) -> str:
    """A configuration as reloadable YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def load(path: Path) -> Config:
    """A configuration that `dump` wrote."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path))
        config = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, OSError) as error:
        raise ConfigError(f"{path} is not a configuration of this release: {_first_line(error)}") from error
    assert isinstance(config, Config)
    return config


def _composed(overrides: list[str], extra_dir: str | None) -> Any:
    groups = _groups(extra_dir)
    for override in overrides:
        _check_override(override, groups)
    search = [f"hydra.searchpath=[file://{Path(extra_dir).absolute()}]"] if extra_dir else []
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            return compose("config", overrides=[*(_adding(o) for o in overrides), *search])
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explained(error)) from error


def _adding(override: str) -> str:
    """Hydra wants to be told that an entry of a mapping may be new."""
    name = override.partition("=")[0]
    return f"++{override}" if any(name == m or name.startswith(f"{m}.") for m in _MAPPINGS) else override


def _groups(extra_dir: str | None) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for root in (config_dir(), *([Path(extra_dir)] if extra_dir else [])):
        for path in sorted(root.glob("*/*.yaml")):
            groups.setdefault(path.parent.name, []).append(path.stem)
    return groups


def _check_override(override: str, groups: dict[str, list[str]]) -> None:
    """Finds typing errors before Hydra does, because it can name the nearest valid word."""
    key, separator, value = override.partition("=")
    if not separator:
        raise ConfigError(f"{override!r} is not an override: write key=value")
    key = key.lstrip("+~")
    known = sorted({*schema_keys(), *groups})
    if re.sub(r"\.\d+(\.|$)", r".0\1", key) not in known and not key.startswith((*_OPEN, "hydra.", "hydra/")):
        raise ConfigError(f"there is no setting {key!r}{nearest(key, known)}")
    if key in groups and value and value not in (*groups[key], "null") and not value.startswith(("[", "{")):
        options = ", ".join(groups[key])
        raise ConfigError(f"there is no {key}={value}{nearest(value, groups[key])}; there are: {options}")


def _explained(error: Exception) -> str:
    text = str(error)
    match = _NOT_A_KEY.search(text) or _NOT_A_KEY.search(str(error.__cause__))
    hint = ""
    if match:
        known = list(schema_keys())
        hint = nearest(match[1], [*known, *(k.rsplit(".", 1)[-1] for k in known)])
    return _first_line(error) + hint


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    full = next((line for line in lines if line.startswith("full_key:")), "")
    return f"{lines[0]}{f' ({full})' if full else ''}" if lines else type(error).__name__
