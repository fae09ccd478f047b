"""Small clips for every preset of modes, and what the transformer would read of them."""

from __future__ import annotations

from dataclasses import replace

import torch

from ltx_train import config
from ltx_train.contracts import Batch, Mode
from ltx_train.diffusion import conditions
from ltx_train.diffusion.conditions import ModelInputs
from ltx_train.diffusion.sigma import SigmaDistribution
from tests.conftest import REPOSITORY

PLACES = ["data.source=x", "data.root=y"]
PRESETS = sorted(p.stem for p in (REPOSITORY / "conf/mode").glob("*.yaml"))
FRAMES, ROWS, COLUMNS, SOUNDS, VOICE = 5, 2, 2, 33, 25
VIDEO, AUDIO = FRAMES * ROWS * COLUMNS, SOUNDS
PER_FRAME = ROWS * COLUMNS
SIGMA = 0.75


def preset(name: str) -> Mode:
    return config.compose_config([f"mode={name}", *PLACES]).mode


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def batch(mode: Mode, size: int = 2) -> Batch:
    """Clips with everything the presets read: a full-size control, a half-size subject, a voice and masks."""
    mask = torch.zeros(FRAMES, ROWS, COLUMNS)
    mask[1:3, 0] = 1
    heard = torch.zeros(SOUNDS)
    heard[4:9] = 0.9
    shapes = {"reference_video_latent": (16, FRAMES, ROWS, COLUMNS), "subject_video_latent": (16, 1, 1, 1)}
    beside = {
        c.name: numbers(size, *(shapes.get(c.source, (16, FRAMES, ROWS, COLUMNS)) if c.stream == "video" else
                                (2, VOICE, 16)))
        for c in mode.references
    }  # fmt: skip
    return Batch(
        keys=tuple(f"clip{i}" for i in range(size)), speakers=("s",) * size, draws=tuple(range(size)),
        fps=torch.full((size,), 25.0), video_latent=numbers(size, 16, FRAMES, ROWS, COLUMNS),
        audio_latent=numbers(size, 2, SOUNDS, 16), video_context=numbers(size, 4, 64),
        audio_context=numbers(size, 4, 32), references=beside,
        masks={"video_mask": mask.expand(size, -1, -1, -1), "audio_mask": heard.expand(size, -1)},
    )  # fmt: skip


def always(mode: Mode) -> Mode:
    """The mode with every condition certain and every range at its upper end, to be computed by hand."""
    fixed = [replace(c, p=1.0, latents=c.latents[-1:]) for c in mode.conditions]
    region = [replace(c, region=[0, 32, 32, 64]) if c.kind == "spatial_crop" else c for c in fixed]
    return replace(mode, conditions=region)


def assembled(mode: Mode, data: Batch) -> ModelInputs:
    return conditions.assemble(data, mode, conditions.draw(data, mode, SigmaDistribution(), 1, sigma=SIGMA))
