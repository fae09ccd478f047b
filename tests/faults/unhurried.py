"""`ltx-train` whose steps take a second, nearly all of it asleep: for runs that wait for a cluster's clock."""

from __future__ import annotations

import time

from ltx_train.__main__ import main
from ltx_train.contracts import Batch
from ltx_train.training.step import OptimizerStep

_micro_batch = OptimizerStep.micro_batch


def _later(self: OptimizerStep, batch: Batch) -> None:
    time.sleep(1 / self.recipe.micro_batches)
    _micro_batch(self, batch)


if __name__ == "__main__":
    OptimizerStep.micro_batch = _later
    main()
