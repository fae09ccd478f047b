"""Video tokens cut over two processes: values and gradients of one."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ltx_train import rng
from ltx_train.contracts import Modality
from ltx_train.distributed.sequence import register_group
from ltx_train.memory.blocks import runner
from ltx_train.memory.blocks.keep import Keep
from ltx_train.memory.blocks.runner import BlockRunner
from ltx_train.model.checkpoint import RandomWeights
from ltx_train.model.loaders import load_transformer
from tests.faults.harness import PATIENCE_S, SERVER

pytestmark = pytest.mark.slow
WORLD, VIDEO, AUDIO, TEXT = 2, 9, 5, 8  # an odd number of tokens


def modality(name: str, tokens: int, axes: int, channels: int, text: int) -> Modality:
    """Two samples with timesteps of two kinds, a mask between tokens, and one that reads no text."""
    latent = rng.normal((2, tokens, channels), 0, "test", name)
    timesteps = torch.full((2, tokens), 0.7)
    timesteps[:, :2] = 0.0
    positions = torch.arange(tokens, dtype=torch.float32).view(1, 1, tokens, 1).expand(2, axes, tokens, 2)
    mask = torch.ones(2, tokens, tokens)
    mask[0, 3, 4] = 0.25
    reads = torch.ones(2, tokens)
    reads[1, :3] = 0
    return Modality(
        latent=latent, timesteps=timesteps, sigma=torch.tensor([0.7, 0.7]), positions=positions,
        context=rng.normal((2, TEXT, text), 0, "test/text", name), attention_mask=mask, reads_text=reads,
    )  # fmt: skip


def results(compiled: bool, rank: int = 0, meeting: str | None = None) -> dict[str, torch.Tensor]:
    """Velocities, and gradients of every weight averaged over the ranks."""
    model = load_transformer(RandomWeights("tiny")).requires_grad_(True)
    if compiled:  # as far as the compiler's own kernels
        runner.compiled_call = partial(torch.compile, fullgraph=True, dynamic=False, backend="aot_eager")
    model.run_block = BlockRunner([Keep.inputs] * len(model.transformer_blocks), compiled=compiled)
    if meeting is not None:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORLD)
        model.sequence_group = register_group(dist.group.WORLD, rank, WORLD)
    sizes = model.config
    video = modality("video", VIDEO, 3, sizes["in_channels"], sizes["cross_attention_dim"])
    audio = modality("audio", AUDIO, 1, sizes["audio_in_channels"], sizes["audio_cross_attention_dim"])
    found: dict[str, torch.Tensor] = dict(zip(("video", "audio"), model(video, audio), strict=True))
    target = [rng.normal(tuple(v.shape), 0, "target", n) for n, v in found.items()]
    sum((v - t).square().mean() for v, t in zip(found.values(), target, strict=True)).backward()
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if meeting is not None:
            dist.all_reduce(gradient)
            gradient /= WORLD
        found[f"gradient/{name}"] = gradient
    return {name: value.detach() for name, value in found.items()}


def on_rank(rank: int, meeting: str, compiled: bool, out: str) -> None:
    torch.set_num_threads(1)
    torch.save(results(compiled, rank, meeting), f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("compiled", [False, True])
def test_cut_tokens_give_the_velocities_and_gradients_of_whole_ones(compiled: bool, tmp_path: Path) -> None:
    arguments = (str(tmp_path / "meeting"), compiled, str(tmp_path))
    processes = [SERVER.Process(target=on_rank, args=(rank, *arguments)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    alone = results(compiled=False)
    for process in processes:
        process.join(PATIENCE_S)
        assert process.exitcode == 0
    for rank in range(WORLD):
        together = torch.load(tmp_path / f"{rank}.pt")
        assert together.keys() == alone.keys()
        for name, value in alone.items():
            bound = 1e-5 * float(value.abs().max()) + 1e-7
            assert float((together[name] - value).abs().max()) <= bound, (rank, name)
