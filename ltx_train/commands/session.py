"""Turns a configuration into the objects commands share: weights, device, mode, prepared data.

The seam between the typed configuration and the rooms below, which know nothing of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ltx_train.config import Config, parse_bucket
from ltx_train.contracts import Role, UserError
from ltx_train.data import index
from ltx_train.data.index import Index
from ltx_train.data.prepare.build import Recipe
from ltx_train.data.prepare.encode import Encoders, encoder_fingerprints
from ltx_train.diffusion.sigma import SigmaDistribution
from ltx_train.evaluation import heldout
from ltx_train.model.adapter import Lora
from ltx_train.model.checkpoint import CheckpointFile, RandomWeights, TensorSource

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def device(config: Config, local: int | None = None) -> torch.device:
    """The device to compute on; UserError when a GPU is asked for and there is none.

    local: which of the machine's devices is this process's, made the current one.
    """
    wanted = config.strategy.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("strategy.device=cuda, but no GPU is visible: set strategy.device=cpu or check the driver")
    if wanted != "cuda":
        return torch.device(wanted)
    if local is not None:
        if local >= torch.cuda.device_count():
            raise UserError(f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}")
        torch.cuda.set_device(local)
    return torch.device("cuda", torch.cuda.current_device())


def weights(config: Config) -> TensorSource:
    """Where the model's tensors come from: the checkpoint file, or seeded random numbers."""
    if config.model.weights == "random":
        return RandomWeights(config.model.preset, config.model.seed)
    assert config.model.path is not None  # config.require has asked for it
    return CheckpointFile.open(config.model.path)


def layout(config: Config) -> TensorSource:
    """Where the model's sizes come from: the checkpoint if there is one, else the preset; for planning."""
    return weights(config) if config.model.path else RandomWeights(config.model.preset, config.model.seed)


def dtype(config: Config) -> torch.dtype:
    return DTYPES[config.model.dtype]


def sigma_distribution(config: Config) -> SigmaDistribution:
    return SigmaDistribution(config.sigma.std, config.sigma.eps, config.sigma.uniform_prob)


def recipe(config: Config) -> Recipe:
    """What `prepare` does with the clips."""
    return Recipe(
        buckets=tuple(parse_bucket(b) for b in config.data.buckets),
        fps=config.data.fps,
        reference_s=config.data.reference_s,
        latent_dtype=config.data.latent_dtype,
        caption=config.data.caption,
        trigger=config.data.trigger,
        heldout_speakers=config.data.heldout_speakers,
        seed=config.run.seed,
        samples_per_shard=config.data.samples_per_shard,
        needs_audio=config.mode.audio is not Role.absent,
        silence_db=config.data.silence_db,
        skip_bad=config.data.on_bad_clip == "skip",
    )


def encoders(config: Config) -> Encoders:
    return Encoders(
        weights(config),
        text_encoder=config.model.text_encoder,
        text_tokens=config.model.text_tokens,
        device=device(config),
        dtype=dtype(config),
        latent_dtype=DTYPES[config.data.latent_dtype],
    )


def fingerprints(config: Config) -> dict[str, str]:
    return encoder_fingerprints(weights(config), config.model.text_encoder, config.model.text_tokens)


def prepared(config: Config) -> tuple[Path, Index, list[str]]:
    """The prepared folder, its index, and why it is stale for this configuration (empty: it is not)."""
    root = Path(config.data.root)
    found = index.load(root)
    stale = index.stale_reasons(found, recipe(config).settings(), fingerprints(config))
    return root, found, stale


def run_dir(config: Config) -> Path:
    """<root>/<experiment>/<id>: stable across restarts."""
    return Path(config.run.root) / config.run.experiment / config.run.id


def mode_facts(config: Config) -> dict[str, Any]:
    """The mode in words, for exports and reports."""
    conditions = ", ".join(c.kind.value for c in config.mode.conditions) or "none"
    return {"video": config.mode.video.value, "audio": config.mode.audio.value, "conditions": conditions}


def lora(config: Config) -> Lora:
    adapter = config.adapter
    return Lora(adapter.rank, adapter.alpha, adapter.dropout, tuple(adapter.targets))


def evaluation(config: Config) -> heldout.Settings:
    """How the held-out split is measured; the same in `fit` and `evaluate`."""
    return heldout.Settings(
        mode=config.mode,
        sigmas=tuple(config.eval.sigmas),
        seed=config.eval.seed,
        batch_size=config.eval.batch_size,
        max_samples=config.eval.max_samples,
        wrong_references=config.eval.wrong_references,
        video_weight=config.loss.video_weight,
        audio_weight=config.loss.audio_weight,
    )


def compiles(config: Config) -> bool:
    return config.memory.compile == "on" or (config.memory.compile == "auto" and device(config).type == "cuda")
