"""What 8-bit weights and products cost at the real widths: teacher.py OUT.json [tiny] [factor ...]

Four of the 48 blocks (1.4 B parameters) with random weights. The teacher is the bf16 model with a planted LoRA; each
student has the same base in its own format and learns the LoRA from the teacher's velocities, on equal draws. Losses
are shares of the planted change: 1 is a student that has learned nothing, 0 one that is the teacher. Differences to
bf16 are paired by held-out draw, with 95 % intervals. Each factor is a table of its own, whose first channel of the
tokens is scaled by it (1 and 100 without one).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
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
    """before, after: losses by held-out draw, without training and with it. curve: loss of each training step."""

    model: Transformer
    optimizer: torch.optim.Optimizer
    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)
    curve: list[float] = field(default_factory=list)


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


def student(model: Transformer) -> Student:
    parameters = adapter.lora_parameters(model).values()
    return Student(model, torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, betas=(0.9, 0.99)))


def imitate(teacher: Transformer, students: list[Student], setup: Setup, steps: int) -> None:
    """Trains the students' adapters on the same draws, each of which the teacher answers once."""
    for number, inputs in enumerate(draws(setup, 0, steps)):
        wanted, plain = both(teacher, inputs)
        rate = RATE * min(1.0, (number + 1) / 20) * (1 - number / steps)
        for one in students:
            loss = share(velocities(one.model, inputs), wanted, plain)
            loss.backward()
            (group,) = one.optimizer.param_groups
            group["lr"] = rate
            torch.nn.utils.clip_grad_norm_(group["params"], CLIP)
            one.optimizer.step()
            one.optimizer.zero_grad()
            one.curve.append(loss.item())


@torch.no_grad()
def both(teacher: Transformer, inputs: ModelInputs) -> tuple[list[Tensor], list[Tensor]]:
    """The teacher's velocities with the planted LoRA and without."""
    planted = velocities(teacher, inputs)
    with adapter.disabled(teacher):
        return planted, velocities(teacher, inputs)


@torch.no_grad()
def held_out(teacher: Transformer, students: list[Student], setup: Setup, count: int) -> list[list[float]]:
    """Losses by student and draw."""
    answers = ((inputs, both(teacher, inputs)) for inputs in draws(setup, _FIRST_HELD_OUT, count))
    by_draw = [
        [share(velocities(one.model, inputs), *answer).item() for one in students] for inputs, answer in answers
    ]  # fmt: skip
    return [list(losses) for losses in zip(*by_draw, strict=True)]


def apart(values: list[float], plain: list[float]) -> dict[str, float]:
    found: Interval = by_identity({str(n): [a - b] for n, (a, b) in enumerate(zip(values, plain, strict=True))})
    return asdict(found)


def measured(tiny: bool, channel: float) -> list[dict[str, Any]]:
    steps, count = (5, 3) if tiny else (STEPS, HELD_OUT)
    setup, teacher = opened(tiny, channel)
    plant(teacher)
    students = [student(opened(tiny, channel, *words)[1]) for words in FORMATS.values()]
    for one, losses in zip(students, held_out(teacher, students, setup, count), strict=True):
        one.before.extend(losses)
    imitate(teacher, students, setup, steps)
    for one, losses in zip(students, held_out(teacher, students, setup, count), strict=True):
        one.after.extend(losses)
    records = [record(name, channel, one, students[0]) for name, one in zip(FORMATS, students, strict=True)]
    for made in records:
        print(made["format"], channel, made["before"], made["after"], made["gained_to_bf16"], flush=True)
    return records


def record(name: str, channel: float, found: Student, base: Student) -> dict[str, Any]:
    def gained(one: Student) -> list[float]:
        return [b - a for b, a in zip(one.before, one.after, strict=True)]

    return {
        "format": name, "channel": channel, "steps": len(found.curve), "heldout_draws": len(found.before),
        "before": round(mean(found.before), 5), "after": round(mean(found.after), 5),
        "before_to_bf16": apart(found.before, base.before), "after_to_bf16": apart(found.after, base.after),
        "gained_to_bf16": apart(gained(found), gained(base)),
        "curve_mean_difference": round(mean(a - b for a, b in zip(found.curve, base.curve, strict=True)), 5),
        "curve": [round(value, 4) for value in found.curve[:: max(1, len(found.curve) // 30)]],
    }  # fmt: skip


def main(out: Path, *words: str) -> None:
    tiny = "tiny" in words
    if not tiny:
        presets.PRESETS["ltx2_3_22b"] = replace(presets.PRESETS["ltx2_3_22b"], layers=BLOCKS)
    records: list[dict[str, Any]] = []
    for channel in [float(word) for word in words if word != "tiny"] or [1.0, 100.0]:
        records += measured(tiny, channel)
        out.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
