"""The typed configuration: composing it, its rules, its help, and what a continued run may change.

Knows names and numbers, not what they do: no torch here, so that `--help` and `--cfg job` answer at once. Submodules
are imported when a name is first used, because Hydra alone takes longer than printing the help.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ltx_train.config.buckets import counted_fps, fixed_fps, parse_bucket, sample_bucket
    from ltx_train.config.compose import changed, compose_config, dump, from_file, load, parse, to_yaml
    from ltx_train.config.files import config_dir, shipped
    from ltx_train.config.modes import training_modes
    from ltx_train.config.prompts import prompted, sampled, written_out
    from ltx_train.config.requirements import require
    from ltx_train.config.rules import micro_batches, readers, validate, validate_engine
    from ltx_train.config.runs import continued, flat, refuse_drift
    from ltx_train.config.schema import Config
    from ltx_train.config.targets import with_targets
    from ltx_train.contracts import ConfigError

_HOMES = {
    "counted_fps": "buckets", "fixed_fps": "buckets", "parse_bucket": "buckets", "sample_bucket": "buckets",
    "changed": "compose", "compose_config": "compose", "dump": "compose", "from_file": "compose", "load": "compose",
    "parse": "compose", "to_yaml": "compose", "config_dir": "files", "shipped": "files", "training_modes": "modes",
    "prompted": "prompts", "sampled": "prompts", "written_out": "prompts", "require": "requirements",
    "micro_batches": "rules", "readers": "rules", "validate": "rules", "validate_engine": "rules",
    "continued": "runs", "flat": "runs", "refuse_drift": "runs", "Config": "schema", "with_targets": "targets",
}  # fmt: skip

__all__ = [
    "Config", "ConfigError", "changed", "compose_config", "config_dir", "continued", "counted_fps", "dump",
    "fixed_fps", "flat", "from_file", "load", "micro_batches", "parse", "parse_bucket", "prompted", "readers",
    "refuse_drift", "require", "sample_bucket", "sampled", "shipped", "to_yaml", "training_modes", "validate",
    "validate_engine", "with_targets", "written_out",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "ConfigError":
        return import_module("ltx_train.contracts").ConfigError
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
