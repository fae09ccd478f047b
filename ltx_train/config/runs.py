"""What a run that goes on keeps of its own configuration, and what may differ from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ltx_train.contracts import ConfigError
from ltx_train.schema import Config

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
_FREE_IN_A_RUN = (
    "data.workers",
    "data.source",
    "data.root",
    "model.path",
    "optim.steps",
    "model.text_encoder",
    "optim.batch_size",
)

# What goes on as the same run, but not as if nothing had happened.
_WARNED = {
    "optim.steps": "the learning rate's course follows the new number of steps from here on",
    "optim.batch_size": "sums are taken in another order: near the unbroken run, not bit for bit",
    "strategy.": "sums are taken in another order: near the unbroken run, not bit for bit",
    "memory.": "other kernels or another order of sums: near the unbroken run, not bit for bit",
    "eval.": "held-out numbers from here on do not compare with those before",
    "model.path": "the same base, if its weights are",
}
# Exceptions from these: they change nothing that is computed.
_UNNOTICED = (
    "strategy.step_timeout_s", "strategy.start_timeout_s", "memory.budget_gib", "memory.stream", "eval.interval",
    "eval.patience", "eval.samples",
)  # fmt: skip


def refuse_drift(saved: Config, now: Config, where: Path) -> list[str]:
    """Compares a run's saved configuration with the present one before it is continued.

    Returns the differences that it may have, each with what it means if it means something; ConfigError lists those
    that would make another run of it.
    """
    old, new = flat(saved), flat(now)
    changed = [
        f"{k}: {old.get(k)} -> {new.get(k)}" for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)
    ]
    free = (*_FREE_IN_A_RUN, *(f"{name}:" for name in now.run.allow))
    refused = [line for line in changed if line.startswith(_FIXED_IN_A_RUN) and not line.startswith(free)]
    if refused:
        listed = "\n  ".join(refused)
        raise ConfigError(
            f"{where} was started with another configuration:\n  {listed}\n"
            "start a new run (run.id=...), undo the changes to continue this one, "
            f"or mean it: run.allow=[{','.join(line.split(':')[0] for line in refused)}]"
        )
    return [f"{line}{_meaning(line, free[len(_FREE_IN_A_RUN) :])}" for line in changed]


def _meaning(line: str, allowed: tuple[str, ...]) -> str:
    if allowed and line.startswith(allowed):
        return " (warning: allowed by run.allow, another course from here on)"
    why = next((why for name, why in _WARNED.items() if line.startswith(name)), None)
    return "" if why is None or line.startswith(_UNNOTICED) else f" (warning: {why})"


def continued(config: Config, before: Config | None, world: int) -> Config:
    """What a run keeps where the configuration leaves it open: the precision that was chosen for it, and its global
    batch on any number of devices. before: the run's own configuration, None for a new one."""
    memory, optim = config.memory, config.optim
    if before is not None and memory.quantize == "auto":
        memory = replace(memory, quantize=before.memory.quantize)
    if optim.global_batch is None:
        kept = before.optim.global_batch if before is not None else None
        optim = replace(optim, global_batch=kept or optim.batch_size * world)
    return replace(config, memory=memory, optim=optim)


def flat(config: Config) -> dict[str, str]:
    def walk(node: Any, prefix: str) -> Iterator[tuple[str, str]]:
        for key, value in node.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, str(value)

    return dict(walk(OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True), ""))
