"""The table of optimizers: what each needs in memory, what it can do, and which class implements it.

The only place that knows them by name. The configuration takes its choices from here, the memory plan the bytes, the
rules whether it can update slices, `optimizers` the class. Imports no heavy library.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_MASTER_BYTES = 4.0
# 8-bit moments have a float32 scale for each block of 256 values.
_EIGHT_BIT_MOMENTS = 2 * (1 + 4 / 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerKind:
    """One optimizer.

    factory: `module:class`, imported when a run uses it. cpu_factory: the class for parameters on a CPU, if another.
    moment_bytes: bytes of optimizer state per parameter beside the float32 master and its gradient.
    elementwise: whether a slice of a tensor can be updated without the rest of it, which ZeRO requires.
    fused: whether the class takes `fused` and skips a step on the device when the gradient is not finite.
    """

    name: str
    factory: str
    cpu_factory: str | None = None
    moment_bytes: float
    elementwise: bool = False
    fused: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def saved_bytes(self) -> float:
        """Bytes per parameter that a checkpoint holds: master and moments."""
        return _MASTER_BYTES + self.moment_bytes


_KINDS = (
    OptimizerKind(name="adamw", factory="torch.optim:AdamW", moment_bytes=8.0, elementwise=True, fused=True),
    OptimizerKind(name="adamw8bit", factory="bitsandbytes.optim:AdamW8bit", moment_bytes=_EIGHT_BIT_MOMENTS),
    # Only a GPU's memory can be paged.
    OptimizerKind(
        name="paged_adamw8bit", factory="bitsandbytes.optim:PagedAdamW8bit",
        cpu_factory="bitsandbytes.optim:AdamW8bit", moment_bytes=_EIGHT_BIT_MOMENTS,
    ),
    OptimizerKind(
        name="prodigy", factory="prodigyopt:Prodigy", moment_bytes=16.0,
        arguments={"use_bias_correction": True, "safeguard_warmup": True},
    ),
)  # fmt: skip
OPTIMIZERS: Mapping[str, OptimizerKind] = {kind.name: kind for kind in _KINDS}
