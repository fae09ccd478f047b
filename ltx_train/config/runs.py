"""What a continued run keeps of its own configuration, and which settings may differ from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, cast

from ltx_train.config.schema import Config
from ltx_train.contracts import ConfigError

# Settings that decide what a run computes.
_FIXED_IN_A_RUN = (
    "model.",
    "mode.",
    "mixture.",
    "modes.",
    "adapter.",
    "data.",
    "sigma.",
    "loss.",
    "optim.",
    "run.seed",
    "memory.quantize",
    "memory.compute",
)
# Exceptions: settings of `prepare` alone (the prepared folder's index is compared with the others by itself), paths,
# and what may change with a warning.
_FREE_IN_A_RUN = (
    "data.workers",
    "data.accept",
    "data.cache",
    "data.cache_gib",
    "data.max_bad_fraction",
    "data.source",
    "data.root",
    "data.on_bad_clip",
    "data.samples_per_shard",
    "data.silence_db",
    "model.path",
    "model.text_encoder",
    "optim.steps",
    "optim.batch_size",
)
# What continues as the same run, but with other numbers.
_WARNED = {
    "optim.steps": "the learning rate's course follows the new number of steps from here on",
    "optim.batch_size": "sums are taken in another order: near the unbroken run, not bit for bit",
    "strategy.": "sums are taken in another order: near the unbroken run, not bit for bit",
    "memory.": "other kernels or another order of sums: near the unbroken run, not bit for bit",
    "eval.": "held-out numbers from here on do not compare with those before",
    "model.path": "the same base, if its weights are",
}
# Exceptions from these: they change nothing that is computed.
_NOT_WARNED = (
    "strategy.step_timeout_s", "strategy.start_timeout_s", "memory.budget_gib", "memory.stream", "eval.interval",
    "eval.patience", "eval.samples", "eval.prompts", "eval.sample_interval",
)  # fmt: skip


def refuse_drift(saved: Config, now: Config, folder: Path) -> list[str]:
    """Compares a run's saved configuration with the present one before it is continued.

    Returns the differences that are allowed, each with its consequence if it has one. ConfigError lists the
    differences that would make it another run.
    """
    old, new = flat(saved), flat(now)
    changed = [
        f"{k}: {old.get(k)} -> {new.get(k)}" for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)
    ]
    allowed = tuple(f"{name}:" for name in now.run.allow)
    free = (*_FREE_IN_A_RUN, *allowed)
    refused = [line for line in changed if line.startswith(_FIXED_IN_A_RUN) and not line.startswith(free)]
    if refused:
        listed = "\n  ".join(refused)
        raise ConfigError(
            f"{folder} was started with another configuration:\n  {listed}\n"
            "start a new run (run.id=...), undo the changes to continue this one, "
            f"or mean it: run.allow=[{','.join(line.split(':')[0] for line in refused)}]"
        )
    return [f"{line}{_consequence(line, allowed)}" for line in changed]


def _consequence(line: str, allowed: tuple[str, ...]) -> str:
    if allowed and line.startswith(allowed):
        return " (warning: allowed by run.allow, another course from here on)"
    why = next((why for name, why in _WARNED.items() if line.startswith(name)), None)
    return "" if why is None or line.startswith(_NOT_WARNED) else f" (warning: {why})"


def continued(config: Config, before: Config | None, world: int) -> Config:
    """The configuration with what a run keeps where it is left open: the precision that was chosen for it, and its
    global batch on any number of devices. before: the run's own configuration, None for a new run."""
    memory, optim = config.memory, config.optim
    if before is not None and memory.quantize == "auto":
        memory = replace(memory, quantize=before.memory.quantize)
    if optim.global_batch is None:
        kept = before.optim.global_batch if before is not None else None
        optim = replace(optim, global_batch=kept or optim.batch_size * world)
    return replace(config, memory=memory, optim=optim)


def flat(config: Config) -> dict[str, str]:
    """Every setting as text, by dotted name."""

    def walk(node: Any, prefix: str) -> Iterator[tuple[str, str]]:
        for key, value in node.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, str(value)

    return dict(walk(_plain(config), ""))


def _plain(value: Any) -> Any:
    """Mappings, lists, texts and numbers in place of dataclasses and enumerations."""
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in cast("dict[str, Any]", value).items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in cast("list[Any]", value)]
    return value.name if isinstance(value, Enum) else value
