"""A full fine-tune's state saved in slices and restored, at real widths with fewer blocks: prints a JSON record
of the save, and the whole record at the end.

round_trip.py DEVICES LAYERS FOLDER [SETTING ...]: all devices step four times, save, and a fresh model restores.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from ltx_train import config as configuration
from ltx_train.assembly import resolve, run_builder, timing, update_builder
from ltx_train.assembly.setup import settled
from ltx_train.config import Config
from ltx_train.distributed.ranks import process_group, ranks_from_environment
from ltx_train.jobs import processes
from ltx_train.memory.planning.cards import GIB
from ltx_train.model import presets
from ltx_train.training.checkpoints import commit
from ltx_train.training.checkpoints.background import Saver
from ltx_train.training.checkpoints.commit import Checkpoint

if len(sys.argv) > 3:
    os.environ.update(ROUND_TRIP_LAYERS=sys.argv[2], ROUND_TRIP_FOLDER=sys.argv[3])
_SIZES = presets.PRESETS["ltx2_3_22b"]
presets.PRESETS["ltx2_3_22b"] = replace(_SIZES, layers=int(os.environ["ROUND_TRIP_LAYERS"]))


def trip(config: Config) -> int:
    """On each rank."""
    ranks, folder = ranks_from_environment(os.environ), Path(os.environ["ROUND_TRIP_FOLDER"])
    with process_group(ranks, resolve.device(config, ranks), 600):
        setup = settled(config, ranks)
        transformer, updates = update_builder.open_for_training(setup)
        step = timing.random_steps(setup, run_builder.step_recipe(setup, transformer, updates))
        losses = [float(step(number)) for number in range(3)]
        state = updates.state().slice
        assert state is not None
        name = ranks.lead(lambda: "trip")
        saver = Saver(folder, 1, lambda _step, _weights: None, leads=ranks.leads)
        saver.prepare(state).result()  # in a run training goes on meanwhile
        ranks.any(False)
        started = time.perf_counter()
        losses += [float(step(3))]
        torch.cuda.synchronize()  # an engine may still update on streams of its own, which would count as the save
        seconds = time.perf_counter() - started
        state = updates.state().slice
        assert state is not None
        started = time.perf_counter()
        saver.start(Checkpoint(step=4, weights={}, optimizer={}, notes={}, slice=state, name=name))
        blocked = time.perf_counter() - started
        saver.wait()
        written = time.perf_counter() - started
        ranks.any(False)
        saved = {
            "devices": ranks.world, "strategy": setup.sharing.name, "engine": config.strategy.engine,
            "offload": setup.sharing.offload, "step_s": round(seconds, 2), "blocked_s": round(blocked, 2),
            "written_s": round(written, 1),
        }  # fmt: skip
        if ranks.leads:
            print(json.dumps(saved), flush=True)
        before = {n: {k: t.cpu().clone() for k, t in kinds.items()} for n, kinds in state.tensors.items()}
        losses += [float(step(4))]
        del transformer, updates, step, state
        torch.cuda.empty_cache()
        started = time.perf_counter()
        transformer, updates = update_builder.open_for_training(setup)
        loaded = commit.load(folder / "step-000004")
        updates.restore(loaded.weights, loaded.optimizer)
        restored = time.perf_counter() - started
        again = updates.state().slice
        assert again is not None
        equal = all(torch.equal(t.cpu(), before[n][k]) for n, kinds in again.tensors.items() for k, t in kinds.items())
        step = timing.random_steps(setup, run_builder.step_recipe(setup, transformer, updates))
        losses += [float(step(4))]
        everyone = ranks.gather(equal)
        if ranks.leads:
            size = sum(path.stat().st_size for path in (folder / "step-000004").iterdir())
            print(json.dumps({
                **saved, "state_gib": round(size / GIB, 2), "restored_s": round(restored, 1),
                "bitwise": all(everyone), "losses": losses,
            }))  # fmt: skip
    return 0


def main() -> int:
    config = configuration.compose_config([
        "experiment=voice_reference_22b", "model.weights=random", "adapter=full", "optim=adamw", "memory=recompute",
        "strategy=zero3", f"strategy.devices={sys.argv[1]}", "data.source=none", "data.root=none",
        *sys.argv[4:],
    ])  # fmt: skip
    return processes.run_processes(trip, config, int(sys.argv[1]))


if __name__ == "__main__":
    sys.exit(main())
