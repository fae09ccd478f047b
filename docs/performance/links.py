"""Times steps with streamed weights over slower links, beside the plan: links.py OUT.json [tiny] [case ...]

A budget near its limit needs the allocator setting of a run: PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True.
A link of half or a quarter of the rate: every block is copied two or four times, in the same stream. `tiny` tries the
script on a CPU.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ltx_train import config as configuration
from ltx_train.assembly import memory_plan, model_builder, run_builder, timing, update_builder
from ltx_train.assembly.setup import Setup, settled
from ltx_train.memory.planning.footprint import predict
from ltx_train.memory.weights.stores import WeightStore

BASE = ("model.weights=random", "adapter.dropout=0", "optim=adamw", "bench.warmup=4", "bench.steps=6")
CASES = {
    "A_fp8_12gib": ("memory=fp8", "memory.budget_gib=12"),
    "A_fp8_22gib": ("memory=fp8", "memory.budget_gib=22"),
    "A_int8_12gib": ("memory=int8", "memory.budget_gib=12"),
}
REPEATS = (1, 2, 4)
_NO_LINK_GBS = 1e9


class Repeated:
    """A store whose blocks travel `times` times."""

    def __init__(self, store: WeightStore) -> None:
        self._store, self.times = store, 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def copy_to(self, index: int, target: torch.Tensor) -> None:
        for _ in range(self.times):
            self._store.copy_to(index, target)


def measured(name: str, tiny: bool) -> list[dict[str, Any]]:
    sizes = ["experiment=audio_reference", "memory.stream_blocks=2"] if tiny else ["experiment=voice_reference_22b"]
    setup = settled(configuration.compose_config([*sizes, *BASE, *CASES[name]]))
    transformer, updates = update_builder.open_for_training(setup)
    stream = model_builder.stream_of(transformer)
    assert stream is not None
    stream.store = store = Repeated(stream.store)
    records: list[dict[str, Any]] = []
    recipe = run_builder.step_recipe(setup, transformer, updates)
    step = timing.random_steps(setup, recipe)
    for store.times in REPEATS:
        record = timing.timed(setup, step, transformer)
        recipe.release()  # the next step is recorded again, with other copies
        kept = ("step_s_median", "stall_s", "peak_reserved_gib")
        records.append(
            {"case": name, "copies": store.times, **{k: record[k] for k in kept if k in record}}
            | _planned(setup, store.times)
        )
        print(json.dumps(records[-1]), flush=True)
    return records


def _planned(setup: Setup, times: int) -> dict[str, float]:
    """What the plan predicts for the choice of this run, with a link of a fraction of the rate."""
    room = memory_plan.here(setup.config)
    if setup.plan is None or room is None:
        return {}
    need = memory_plan.need(setup.config)

    def step_s(gbs: float) -> float:
        card = replace(room.card, host_gbs=gbs)
        return predict(need.size, need.work, need.trained, setup.plan.choice, card=card, between=need.between).step_s

    with_link = step_s(room.card.host_gbs / times)
    return {"planned_step_s": round(with_link, 4), "planned_stall_s": round(with_link - step_s(_NO_LINK_GBS), 4)}


def main(out: Path, *words: str) -> None:
    names = [word for word in words if word != "tiny"] or list(CASES)
    records = [record for name in names for record in measured(name, "tiny" in words)]
    out.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
