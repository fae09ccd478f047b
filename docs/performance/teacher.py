"""What 8-bit weights and products cost at the real widths: teacher.py OUT.json [tiny] [factor ...]

Four of the 48 blocks (1.4 B parameters) with random weights. The teacher is the bf16 model with a planted LoRA; each
student has the same base in its own format and learns the LoRA from the teacher's velocities, on equal draws. Losses
are shares of the planted change: 1 is a student that has learned nothing, 0 one that is the teacher. Every student is a
process of its own, and all run side by side. Differences to bf16 are paired by held-out draw, with 95 % intervals.
Each factor is a table of its own, whose first channel of the tokens is scaled by it (1 and 100 without one).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
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

BLOCKS, STEPS, HELD_OUT, RATE, CLIP = 4, 200, 32, 1e-4, 1.0
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


@dataclass(frozen=True, slots=True)
class Student:
    """Losses: before and after training by held-out draw, and of each training step."""

    before: list[float]
    after: list[float]
    curve: list[float]


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
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (number + 1) / 20) * (1 - number / steps)
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.item())
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


def measured(tiny: bool, channel: float, name: str) -> Student:
    """One student in a process of its own."""
    if not tiny:
        presets.PRESETS["ltx2_3_22b"] = replace(presets.PRESETS["ltx2_3_22b"], layers=BLOCKS)
    torch.set_num_threads(1)
    steps, count = (5, 3) if tiny else (STEPS, HELD_OUT)
    _, teacher = opened(tiny, channel)
    plant(teacher)
    setup, student = opened(tiny, channel, *FORMATS[name])
    before = held_out(teacher, student, setup, count)
    curve = imitate(teacher, student, setup, steps)
    found = Student(before, held_out(teacher, student, setup, count), curve)
    print(name, channel, round(mean(found.before), 4), round(mean(found.after), 4), flush=True)
    return found


def record(name: str, channel: float, found: Student, base: Student) -> dict[str, Any]:
    def gained(student: Student) -> list[float]:
        return [b - a for b, a in zip(student.before, student.after, strict=True)]

    return {
        "format": name, "channel": channel, "steps": len(found.curve), "heldout_draws": len(found.before),
        "before": round(mean(found.before), 5), "after": round(mean(found.after), 5),
        "before_to_bf16": apart(found.before, base.before), "after_to_bf16": apart(found.after, base.after),
        "gained_to_bf16": apart(gained(found), gained(base)),
        "curve_mean_difference": round(mean(a - b for a, b in zip(found.curve, base.curve, strict=True)), 5),
        "curve": [round(value, 4) for value in found.curve[:: max(1, len(found.curve) // 30)]],
    }  # fmt: skip


def main(out: Path, *words: str) -> None:
    channels = [float(word) for word in words if word != "tiny"] or [1.0, 100.0]
    cases = [(channel, name) for channel in channels for name in FORMATS]
    with ProcessPoolExecutor(1 if "tiny" in words else len(cases), mp_context=get_context("spawn")) as pool:
        work = {case: pool.submit(measured, "tiny" in words, *case) for case in cases}
        found = {case: future.result() for case, future in work.items()}
    records = [record(name, channel, found[channel, name], found[channel, "bf16"]) for channel, name in cases]
    out.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
