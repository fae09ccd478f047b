"""torch's FSDP2 on the step that `ltx-train bench` times: the peer of the engines for several GPUs.

    torchrun --standalone --nproc-per-node 2 docs/performance/fsdp2.py OUT.json CASE experiment=voice_reference_22b ...

The model, the latents, the noise, the loss and the optimizer are those of `bench` under the same overrides. Blocks are
compiled and wrapped by `fully_shard` one by one, with the next block prefetched. Of an adapter run the frozen base is
sharded and the adapter is whole on every rank; its gradients are averaged. A full fine-tune has float32 shards that are
gathered in bfloat16, and gradients that are reduced in float32 (`FSDP_REDUCE=bf16`: in bfloat16).
"""

from __future__ import annotations

import gc
import os
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from ltx_train import config as configuration
from ltx_train.assembly import from_config, model_builder, resolve, run_builder, timing
from ltx_train.assembly.setup import settled
from ltx_train.commands.bench import _about, _collect
from ltx_train.diffusion import objective
from ltx_train.distributed.ranks import Ranks, process_group, ranks_from_environment
from ltx_train.memory.blocks.hooked import _Beside
from ltx_train.memory.blocks.runner import BlockRunner
from ltx_train.model import adapter
from ltx_train.model.transformer import Transformer
from ltx_train.updates.optimizers import build_optimizer

sys.path.insert(0, str(Path(__file__).parent))
import fewer_blocks  # noqa: F401  # LTX_TRAIN_BLOCKS holds here too


class Fsdp2Updates:
    """The optimizer step over FSDP2's shards."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], ranks: Ranks | None) -> None:
        self.optimizer, self._parameters, self._ranks = optimizer, parameters, ranks
        self.accumulating: list[nn.Parameter] = []

    def end_pass(self) -> None:
        """FSDP2's hooks have reduced the gradients."""

    def average(self) -> None:
        if self._ranks is not None:
            self._ranks.average([p.grad for p in self._parameters if p.grad is not None])

    def step(self, clip: float, _limit: Any = None) -> torch.Tensor:
        norm: Any = torch.nn.utils.clip_grad_norm_(self._parameters, clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def __getattr__(self, name: str) -> Any:
        return {"norms": dict, "awaited": str, "whole": nullcontext}[name]


class ShardedRunner(BlockRunner):
    """Calls blocks through FSDP2's hooks, with the compiled and recomputed forward inside."""

    def __init__(self, blocks: list[Any], runner: BlockRunner, *, compiled: bool) -> None:
        super().__init__(runner._keep, compiled=compiled)
        for index, block in enumerate(blocks):
            block.forward = partial(self._inside, index, block)

    def __call__(self, index: int, block: Any, video: Any, audio: Any, *rest: Any, **flags: bool) -> Any:
        # As under DeepSpeed's hooks: they would look at every tensor beside the tokens.
        video, audio = (None if h is None else h if h.requires_grad else h.requires_grad_() for h in (video, audio))
        return block(video, audio, _Beside(rest, flags))

    def _inside(self, index: int, block: Any, video: Any, audio: Any, beside: _Beside) -> Any:
        return super().__call__(index, block, video, audio, *beside.arguments, **beside.flags)


def shard(transformer: Transformer, kind: str, *, full: bool, world: int) -> None:
    reduce = torch.bfloat16 if os.environ.get("FSDP_REDUCE") == "bf16" else torch.float32
    policy = MixedPrecisionPolicy(torch.bfloat16, reduce, None, False)
    mesh, blocks = init_device_mesh(kind, (world,)), list(transformer.transformer_blocks)
    ignored = set() if full else {p for p in transformer.parameters() if p.requires_grad}
    for block in blocks:
        fully_shard(block.float() if full else block, mesh=mesh, mp_policy=policy, ignored_params=ignored)
    if full:
        for name, part in transformer.named_children():
            if name != "transformer_blocks":
                part.float()
        for name, own in list(transformer.named_parameters(recurse=False)):
            setattr(transformer, name, nn.Parameter(own.data.float()))
    fully_shard(transformer, mesh=mesh, mp_policy=policy, ignored_params=ignored)
    for index, block in enumerate(blocks):
        block.set_modules_to_forward_prefetch(blocks[index + 1 : index + 2])
        block.set_modules_to_backward_prefetch(list(reversed(blocks[max(0, index - 1) : index])))
    if full:
        # The dtype that the forward asks for is that of the computation.
        type(transformer).dtype = property(lambda _self: torch.bfloat16)


def main() -> None:
    out, case, *overrides = sys.argv[1:]
    ranks = ranks_from_environment(os.environ)
    # Whole weights to start from, and one sample for each rank.
    plain = configuration.compose_config([*overrides, "strategy=zero2"])
    full = resolve.trains_all_weights(plain)
    whole = {"adapter.kind": "lora", "strategy.name": "ddp", "strategy.devices": ranks.world}
    config = configuration.changed(plain, whole)
    with process_group(ranks, resolve.device(config, ranks), 600.0):
        setup = settled(config, ranks)
        transformer = model_builder.open_frozen(setup)
        if full:
            transformer.requires_grad_(True)
        else:
            adapter.attach(transformer, from_config.lora(config), config.run.seed)
        transformer.train()
        runner = transformer.run_block
        shard(transformer, setup.device.type, full=full, world=ranks.world)
        transformer.run_block = ShardedRunner(list(transformer.transformer_blocks), runner, compiled=setup.compiled)
        gc.collect()
        torch.cuda.empty_cache()  # loading took memory for the whole model
        parameters = [p for p in transformer.parameters() if p.requires_grad]
        optimizer = build_optimizer(setup.optimizer, parameters, from_config.optimizer_settings(config))
        updates: Any = Fsdp2Updates(optimizer, parameters, None if full else ranks)
        recipe = run_builder.plain_recipe(setup, partial(objective.backward, transformer), updates)
        measured = timing.timed(setup, timing.random_steps(setup, recipe))
        reserved = ranks.gather(measured.get("peak_reserved_gib", 0.0))
        if ranks.leads:
            about = {
                **_about(config),
                "case": case,
                "ranks": ranks.world,
                "peer": "FSDP2, fully_shard, compiled blocks",
            }
            _collect(Path(out), {**about, **measured, "peak_reserved_gib": max(reserved)})


if __name__ == "__main__":
    main()
