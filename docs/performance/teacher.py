"""What 8-bit weights and products cost at the real widths: teacher.py OUT.json [tiny]

Four of the 48 blocks (1.4 B parameters) with random weights. The teacher is the bf16 model with a planted LoRA; each
student has the same base in its own format and learns the LoRA from the teacher's velocities, on equal draws. Losses
are shares of the planted change: 1 is a student that has learned nothing, 0 one that is the teacher. Differences to
bf16 are paired by held-out draw, with 95 % intervals. A second table has one channel of the tokens scaled by 100.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from ltx_train import config as configuration
from ltx_train import rng
from ltx_train.assembly import model_builder, timing
from ltx_train.assembly.setup import Setup, settled
from ltx_train.diffusion import conditions, sigma, transfer
from ltx_train.diffusion.conditions import ModelInputs
from ltx_train.evaluation.statistics import Interval, by_identity
from ltx_train.model import adapter, presets
from ltx_train.model.transformer import Transformer

BLOCKS, STEPS, HELD_OUT, RATE = 4, 300, 64, 3e-3
# Standard deviation of the planted LoRA's second matrices, against U(+-1 / sqrt(inputs)) of the first ones.
PLANTED = 0.02
BASE = ("model.weights=random", "model.dtype=bfloat16", "mode=t2av", "adapter=attention", "adapter.dropout=0",
        "memory=none", "memory.keep=everything", "memory.compile=off", "optim=adamw")  # fmt: skip
FORMATS = {
    "bf16": (),
    "int8": ("memory.quantize=int8",),
    "float8": ("memory.quantize=float8",),
    "int4": ("memory.quantize=int4",),
    "fp8 products": ("memory.compute=fp8", "memory.quantize=float8"),
    "int8 products": ("memory.compute=int8", "memory.quantize=int8"),
}
_FIRST_HELD_OUT = 1_000_000


def opened(tiny: bool, channel: float, *words: str) -> tuple[Setup, Transformer]:
    """A model with a new adapter. channel: the factor on the first channel of the tokens of both modalities."""
    sizes = ("model=tiny", "data.buckets=[64x64x33]") if tiny else ("model=ltx2_3_22b", "data.buckets=[256x256x33]")
    setup = settled(configuration.compose_config([*sizes, *BASE, *words]))
    model = model_builder.open_trainable(setup)
    with torch.no_grad():
        for layer in (model.patchify_proj, model.audio_patchify_proj):
            layer.weight[0] *= channel
    return setup, model


def plant(model: Transformer) -> None:
    for name, parameter in adapter.lora_parameters(model).items():
        if "lora_B" in name:
            drawn = rng.normal(tuple(parameter.shape), 7, "teacher", name)
            parameter.data.copy_(PLANTED * drawn)


def draws(setup: Setup, first: int, count: int) -> Iterator[ModelInputs]:
    """Inputs of consecutive draws, on the device; every model gets the same."""
    batch = transfer.batch_to(timing.random_batch(setup.config, 0), setup.device)
    for number in range(first, first + count):
        one = replace(batch, draws=(number,))
        drawn = conditions.draw(one, setup.config.mode, sigma.SigmaDistribution(), 42)
        yield transfer.map_tensors(conditions.assemble(one, setup.config.mode, drawn), lambda t: t.to(setup.device))


def velocities(model: Transformer, inputs: ModelInputs) -> list[Tensor]:
    return [v.float() for v in model(inputs.video, inputs.audio) if v is not None]


def share(found: list[Tensor], teacher: list[Tensor], plain: list[Tensor]) -> Tensor:
    """The squared distance to the teacher as a share of the base's, the mean of both modalities."""
    pairs = zip(found, teacher, plain, strict=True)
    return torch.stack([(f - t).square().mean() / (p - t).square().mean() for f, t, p in pairs]).mean()


def imitate(teacher: Transformer, student: Transformer, setup: Setup, steps: int) -> list[float]:
    """Trains the student's adapter; returns the loss of each step."""
    parameters = list(adapter.lora_parameters(student).values())
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, betas=(0.9, 0.99))
    curve: list[float] = []
    for number, inputs in enumerate(draws(setup, 0, steps)):
        wanted, plain = both(teacher, inputs)
        loss = share(velocities(student, inputs), wanted, plain)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (number + 1) / 20) * (1 - number / steps)
        optimizer.step()
        optimizer.zero_grad()
        curve.append(float(loss))
    return curve


@torch.no_grad()
def both(teacher: Transformer, inputs: ModelInputs) -> tuple[list[Tensor], list[Tensor]]:
    """The teacher's velocities with the planted LoRA and without."""
    planted = velocities(teacher, inputs)
    with adapter.disabled(teacher):
        return planted, velocities(teacher, inputs)


@torch.no_grad()
def held_out(teacher: Transformer, student: Transformer, setup: Setup, count: int) -> list[float]:
    return [
        float(share(velocities(student, inputs), *both(teacher, inputs)))
        for inputs in draws(setup, _FIRST_HELD_OUT, count)
    ]


def apart(values: list[float], plain: list[float]) -> dict[str, float]:
    found: Interval = by_identity({str(n): [a - b] for n, (a, b) in enumerate(zip(values, plain, strict=True))})
    return asdict(found)


def measured(tiny: bool, channel: float) -> list[dict[str, Any]]:
    steps, count = (5, 3) if tiny else (STEPS, HELD_OUT)
    _, teacher = opened(tiny, channel)
    plant(teacher)
    found: dict[str, tuple[list[float], list[float], list[float]]] = {}
    for name, words in FORMATS.items():
        setup, student = opened(tiny, channel, *words)
        before = held_out(teacher, student, setup, count)
        curve = imitate(teacher, student, setup, steps)
        found[name] = (before, held_out(teacher, student, setup, count), curve)
        print(name, channel, round(mean(before), 4), round(mean(found[name][1]), 4), flush=True)
        del student
    base, trained, plain_curve = found["bf16"]
    return [
        {
            "format": name, "channel": channel, "steps": steps, "heldout_draws": count,
            "before": round(mean(before), 5), "after": round(mean(after), 5),
            "before_to_bf16": apart(before, base), "after_to_bf16": apart(after, trained),
            "gained_to_bf16": apart(
                [b - a for b, a in zip(before, after, strict=True)], [b - a for b, a in zip(base, trained, strict=True)]
            ),
            "curve_mean_difference": round(mean(a - b for a, b in zip(curve, plain_curve, strict=True)), 5),
            "curve": [round(value, 4) for value in curve[:: max(1, steps // 30)]],
        }
        for name, (before, after, curve) in found.items()
    ]  # fmt: skip


def main(out: Path, tiny: bool) -> None:
    if not tiny:
        presets.PRESETS["ltx2_3_22b"] = replace(presets.PRESETS["ltx2_3_22b"], layers=BLOCKS)
    records: list[dict[str, Any]] = []
    for channel in (1.0, 100.0):
        records += measured(tiny, channel)
        out.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), "tiny" in sys.argv[2:])
