"""References that carry nothing: silence for a voice, grey pictures for a control video, as the encoders see them.

Owns their encoding, before the model is loaded. Measured as an arm of their own: what a reference does beyond being
there.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from ltx_train.assembly import encoder_builder, from_config
from ltx_train.assembly.setup import Setup
from ltx_train.contracts import Condition, ModalityName, UserError
from ltx_train.data.index import HELDOUT, Index
from ltx_train.data.prepare.encode import Encoders
from ltx_train.data.reader import Reader
from ltx_train.diffusion.grid import AUDIO_LATENTS_PER_S, FRAMES_PER_LATENT, PIXELS_PER_LATENT
from ltx_train.evaluation import heldout
from ltx_train.evaluation.heldout import Neutral
from ltx_train.model import codecs

_GREY = 128


def of_heldout(setup: Setup, root: Path, index: Index) -> Neutral:
    """A neutral reference for every condition and shape among the held-out clips.

    None where none is measured, and, with a line, where the encoders fail: a checkpoint may hold the transformer alone.
    """
    config = setup.config
    settings = from_config.measurement_settings(config, from_config.grid(config, index))
    if not (settings.neutral and settings.mode.references and index.split(HELDOUT)):
        return {}
    try:
        return setup.ranks.lead(lambda: _encoded(setup, _shapes(root, index, settings)))
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        if setup.ranks.leads:
            print(f"ltx-train: no neutral references: {error}; measured without that arm", file=sys.stderr)
        return {}


def _shapes(root: Path, index: Index, settings: heldout.MeasurementSettings) -> dict[str, set[tuple[int, ...]]]:
    """Shapes of the references by condition. Clips of one shape have references of one shape."""
    reader = Reader(root, index, seed=settings.seed, request=heldout.read_request(settings))
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for addresses in heldout.batches(index, settings):
        for name, latent in reader.sample(addresses[0]).references.items():
            shapes.setdefault(name, set()).add(tuple(latent.shape))
    return shapes


def _encoded(setup: Setup, shapes: dict[str, set[tuple[int, ...]]]) -> dict[tuple[str, tuple[int, ...]], Tensor]:
    encoders = encoder_builder.encoders(setup.config, setup.ranks, with_text=False)
    conditions = {c.name: c for c in setup.config.mode.references}
    return {
        (name, shape): _of(conditions[name], shape, encoders)
        for name, found in shapes.items()
        for shape in sorted(found)
    }


@torch.no_grad()
def _of(condition: Condition, shape: tuple[int, ...], encoders: Encoders) -> Tensor:
    if condition.stream is ModalityName.audio:
        rate, seconds = codecs.VOCODER_RATE, (shape[1] + 1) / AUDIO_LATENTS_PER_S
        return encoders.sound(torch.zeros(2, round(seconds * rate)), rate)[:, : shape[1]].contiguous()
    frames, height, width = ((shape[1] - 1) * FRAMES_PER_LATENT + 1, *(n * PIXELS_PER_LATENT for n in shape[2:]))
    vae = encoders.video_vae
    pixels = torch.full((frames, height, width, 3), _GREY, dtype=torch.uint8)
    return codecs.encode_video(vae, codecs.scaled(pixels, vae.device, vae.dtype))[0].float().cpu().contiguous()
