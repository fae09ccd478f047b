"""The second stage of a generation: the first stage's video with width and height doubled, and refined at that size.

Owns the noise levels and the start of that stage. Knows one clip; the command decides when a model is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ltx_train.assembly import from_config, model_source, requests
from ltx_train.assembly.requests import Denoising, SampleRequest
from ltx_train.config import Config
from ltx_train.diffusion import sigma
from ltx_train.model import upsampler
from ltx_train.model.transformer import Pair, Transformer
from ltx_train.sampling.guidance import Guidance
from ltx_train.sampling.sampler import Solver

# Numbers of the draws of both stages: the same noise twice would pull the refined clip back to where it began.
_SECOND_DRAW = 1


def doubled(config: Config, latents: Sequence[Pair], device: torch.device) -> list[Pair]:
    """The clips with width and height of their videos doubled. The upsampler is on the device for this time only."""
    assert config.sample.upsampler is not None
    network = upsampler.load(Path(config.sample.upsampler), device=device, dtype=from_config.dtype(config))
    source = model_source.weights(config)
    return [
        (None if video is None else upsampler.doubled(network, video, source), audio) for video, audio in latents
    ]  # fmt: skip


def refine(transformer: Transformer, config: Config, made: SampleRequest, begun: Pair, device: torch.device) -> Pair:
    """The clip at its full size, from the first stage's latents with the video doubled. Without guidance, as the
    distilled model was trained. Both modalities are refined; what is given stays."""
    again = replace(made, batch=replace(made.batch, draws=(_SECOND_DRAW,)))
    how = Denoising(seed=config.sample.seed, sigmas=sigma.refining_schedule(), guidance=Guidance(), solver=Solver.euler)
    return requests.denoise(transformer, again, how, device, begun)
