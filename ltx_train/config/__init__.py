"""The typed configuration: composing it, its rules, and what a run that goes on may change.

The only room that raises `ConfigError`, and it does so before anything heavy is imported: no
torch here, so that `--cfg job` answers at once. Knows names and numbers, not what they do.
"""

from ltx_train.config.compose import compose_config, config_dir, dump, from_file, load, shipped, to_yaml
from ltx_train.config.grid import parse_bucket
from ltx_train.config.modes import training
from ltx_train.config.rules import readers, require, rounds, validate
from ltx_train.config.runs import continued, flat, refuse_drift
from ltx_train.config.targets import settled
from ltx_train.config.words import nearest
from ltx_train.contracts import ConfigError
from ltx_train.schema import Config

__all__ = [
    "Config", "ConfigError", "compose_config", "config_dir", "continued", "dump", "flat", "from_file", "load",
    "nearest", "parse_bucket", "readers", "refuse_drift", "require", "rounds", "settled", "shipped",
    "to_yaml", "training", "validate",
]  # fmt: skip
