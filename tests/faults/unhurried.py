"""`ltx-train` whose steps take a second, nearly all of it asleep: for runs that wait for a cluster's clock."""

from __future__ import annotations

import time

from ltx_train.__main__ import main
from ltx_train.training.step import OptimizerStep

_micro_batch = OptimizerStep.micro_batch


def _later(step: OptimizerStep, batch: object) -> None:
    time.sleep(1 / step.recipe.micro_batches)
    _micro_batch(step, batch)  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    OptimizerStep.micro_batch = _later
    main()
