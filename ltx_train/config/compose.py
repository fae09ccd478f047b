"""Composes the configuration out of groups, files and overrides; finds typing errors before Hydra does."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ltx_train.config import suggest
from ltx_train.config.files import config_dir, group_options
from ltx_train.config.options import with_option
from ltx_train.config.rules import validate
from ltx_train.config.schema import Config
from ltx_train.config.settings import OPEN_MAPPINGS, OPEN_PREFIXES, all_settings, check_text, known_names
from ltx_train.config.targets import follows_mode, with_targets
from ltx_train.contracts import ConfigError, Mode

ConfigStore.instance().store(name="schema", node=Config)

_DIGEST = "# sha256 of the lines below: "
_NUMBERED = re.compile(r"\.\d+(\.|$)")
_NOT_A_KEY = re.compile(r"Key '([^']+)' (?:not in|is not in struct)")


def compose_config(overrides: list[str], extra_dir: str | None = None) -> Config:
    """The validated configuration of a list of Hydra overrides. extra_dir: a user's own tree of groups.

    Settings without a default stay empty; `requirements.require` refuses what a command cannot do without.
    """
    composed = _composed(overrides, extra_dir)
    for name in OmegaConf.missing_keys(composed):
        OmegaConf.update(composed, name, None if all_settings()[name].nullable else "")
    return _finished(composed, extra_dir)


def from_file(path: str | Path, overrides: list[str], moved: Mapping[str, Any] | None = None) -> Config:
    """A configuration that `dump` wrote, with options of groups chosen, then single settings changed.

    moved: settings that differ from the file's before all that, because the file was moved.
    """
    return from_saved(load(Path(path)), overrides, moved)


def from_saved(saved: Config, overrides: list[str], moved: Mapping[str, Any] | None = None) -> Config:
    """As `from_file`, of what the file holds. `saved` is changed."""
    groups = group_options(None)
    for override in overrides:
        _check_override(override, groups)
    chosen = [override.partition("=") for override in overrides if override.partition("=")[0] in groups]
    singles = [override for override in overrides if override.partition("=")[0] not in groups]
    try:
        if follows_mode(saved) and any(group == "mode" for group, _, _ in chosen):
            saved.adapter.targets = []
        node = OmegaConf.structured(saved)
        for name, value in (moved or {}).items():
            OmegaConf.update(node, name, value)
        for group, _, option in chosen:
            node = with_option(node, group, option)
        texts = {o.partition("=")[0]: free_text(o) for o in singles if free_text(o) is not None}
        others = [o for o in singles if free_text(o) is None]
        # A number in a name counts entries of a list (mode.conditions.0.p), which only `update` understands.
        entries = [o for o in others if _NUMBERED.search(o.partition("=")[0])]
        merged = OmegaConf.merge(node, OmegaConf.from_dotlist([o for o in others if o not in entries]))
        for name, _, text in (o.partition("=") for o in entries):
            OmegaConf.update(merged, name, OmegaConf.from_dotlist([f"value={text}"]).value)
        for name, text in texts.items():
            OmegaConf.update(merged, name, text)
    except OmegaConfBaseException as error:
        raise ConfigError(_explained(error)) from error
    return _finished(merged, None)


def changed(config: Config, overrides: dict[str, Any]) -> Config:
    """The configuration with settings changed by dotted name, validated like any other."""
    node = OmegaConf.structured(config)
    try:
        for name, value in overrides.items():
            OmegaConf.update(node, name, value)
    except OmegaConfBaseException as error:
        raise ConfigError(_explained(error)) from error
    return _finished(node, None)


def _finished(node: Any, extra_dir: str | None) -> Config:
    try:
        config = OmegaConf.to_object(node)
    except OmegaConfBaseException as error:
        raise ConfigError(_explained(error)) from error
    assert isinstance(config, Config)
    _name_modes(config, extra_dir)
    validate(config)
    return with_targets(config)


def _name_modes(config: Config, extra_dir: str | None) -> None:
    """Fills `modes` with the presets that the mixture names, so that a saved configuration is complete."""
    roots = [Path(extra_dir)] if extra_dir else []
    for name in config.mixture:
        if name in config.modes:
            continue
        candidates = [root / "mode" / f"{name}.yaml" for root in (*roots, config_dir())]
        path = next((p for p in candidates if p.is_file()), None)
        if path is None:
            known = group_options(extra_dir)["mode"]
            raise ConfigError(f"mixture: there is no mode {name!r}{suggest.nearest(name, known)}")
        merged = OmegaConf.merge(OmegaConf.structured(Mode), OmegaConf.load(path))
        mode = OmegaConf.to_object(merged)
        assert isinstance(mode, Mode)
        config.modes[name] = mode


def to_yaml(overrides: list[str], extra_dir: str | None = None) -> str:
    """What `--cfg job` prints; reloadable."""
    return OmegaConf.to_yaml(_composed(overrides, extra_dir), resolve=False)


def dump(config: Config) -> str:
    """A configuration as reloadable YAML. Its first line has the digest of the others, so that damage is found."""
    text = OmegaConf.to_yaml(OmegaConf.structured(config))
    return f"{_DIGEST}{hashlib.sha256(text.encode()).hexdigest()}\n{text}"


def load(path: Path) -> Config:
    """A configuration that `dump` wrote."""
    try:
        return parse(path.read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a configuration of this release: {_first_line(error)}") from error


def parse(text: str, path: Path) -> Config:
    """As `load`, of a text. path: its origin, for the error."""
    first, _, rest = text.partition("\n")
    if first.startswith(_DIGEST) and first != _DIGEST + hashlib.sha256(rest.encode()).hexdigest():
        raise ConfigError(
            f"{path} does not match its digest: the file is damaged or was edited. "
            "To use an edited file, remove its first line"
        )
    try:
        _refuse_foreign_syntax(text, path)
        merged = OmegaConf.merge(_schema(), OmegaConf.create(text))
        config = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not a configuration of this release: {_first_line(error)}") from error
    assert isinstance(config, Config)
    return config


@functools.cache
def _schema() -> DictConfig:
    """The settings with their types and defaults. Made once, because that takes as long as reading a file; merging
    leaves it as it is."""
    return OmegaConf.structured(Config)


def _refuse_foreign_syntax(text: str, path: Path) -> None:
    """ConfigError for what `dump` never writes and a file from somebody else may hold: aliases, which grow without
    bound, and values of the environment, which may be secrets. yaml.YAMLError for damage."""
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
        raise ConfigError(f"{path} is not a configuration of this release: it has YAML aliases")
    if "${oc.env" in text:
        raise ConfigError(f"{path} reads environment variables (${{oc.env...}}), which may be secrets: write the value")


def _composed(overrides: list[str], extra_dir: str | None) -> Any:
    groups = group_options(extra_dir)
    for override in overrides:
        _check_override(override, groups)
    search = [f"hydra.searchpath=[file://{Path(extra_dir).absolute()}]"] if extra_dir else []
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            return compose("config", overrides=[*(_for_hydra(o) for o in overrides), *search])
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explained(error)) from error


def _for_hydra(override: str) -> str:
    """With Hydra's prefix for entries of a mapping that may be new, and with quotes around free text."""
    name, text = override.partition("=")[0], free_text(override)
    if text is not None:
        escaped = text.replace("\\", "\\\\").replace("'", "\\'")
        return f"{name}='{escaped}'"
    return f"++{override}" if any(name == m or name.startswith(f"{m}.") for m in OPEN_MAPPINGS) else override


def free_text(override: str) -> str | None:
    """The value of an override of a free text (a prompt, a path, a name), with the user's own quotes taken off; None
    for any other override. Commas, colons and brackets of a text are no syntax."""
    name, _, value = override.partition("=")
    setting = all_settings().get(name)
    if setting is None or setting.kind != "str" or setting.declared.choices or value in ("null", "") or "${" in value:
        return None
    is_quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return value[1:-1] if is_quoted else value


def _check_override(override: str, groups: dict[str, list[str]]) -> None:
    """ConfigError with the nearest valid word, or with the type that is expected."""
    key, separator, value = override.partition("=")
    if not separator:
        raise ConfigError(f"{override!r} is not an override: write key=value")
    key = key.lstrip("+~")
    known = sorted({*known_names(), *groups})
    if re.sub(r"\.\d+(\.|$)", r".0\1", key) not in known and not key.startswith((*OPEN_PREFIXES, "hydra.", "hydra/")):
        raise ConfigError(f"there is no setting {key!r}{suggest.for_setting(key, known)}")
    if key in groups and value and value not in (*groups[key], "null") and not value.startswith(("[", "{")):
        options = ", ".join(groups[key])
        raise ConfigError(f"there is no {key}={value}{suggest.nearest(value, groups[key])}; there are: {options}")
    if key in all_settings() and not override.startswith("~"):
        check_text(all_settings()[key], value)


def _explained(error: Exception) -> str:
    text = str(error)
    match = _NOT_A_KEY.search(text) or _NOT_A_KEY.search(str(error.__cause__))
    hint = ""
    if match:
        names = known_names()
        hint = suggest.nearest(match[1], [*names, *(name.rsplit(".", 1)[-1] for name in names)])
    return _first_line(error) + hint


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    full = next((line for line in lines if line.startswith("full_key:")), "")
    return f"{lines[0]}{f' ({full})' if full else ''}" if lines else type(error).__name__
