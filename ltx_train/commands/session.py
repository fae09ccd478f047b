"""Turns a configuration into the objects commands share: weights, device, mode, prepared data.

The seam between the typed configuration and the rooms below, which know nothing of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ltx_train import config as configuration
from ltx_train.config import Config, parse_bucket
from ltx_train.contracts import Mode, Role, UserError
from ltx_train.data import index
from ltx_train.data.audit import Asked
from ltx_train.data.index import HELDOUT, Index
from ltx_train.data.prepare.build import Recipe
from ltx_train.data.prepare.encode import Encoders, encoder_fingerprints
from ltx_train.data.reader import Wants
from ltx_train.diffusion import positions, sigma
from ltx_train.diffusion.sigma import SigmaDistribution, SigmaKind
from ltx_train.evaluation import heldout
from ltx_train.evaluation.rows import Grid
from ltx_train.model.adapter import Lora
from ltx_train.model.checkpoint import CheckpointFile, RandomWeights, TensorSource
from ltx_train.model.merged import MergedSource

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
    """Where the model's tensors come from: the checkpoint file or seeded random numbers, and a LoRA merged into it."""
    model = config.model
    if model.weights == "random":
        source: TensorSource = RandomWeights(model.preset, model.seed)
    else:
        assert model.path is not None  # config.require has asked for it
        source = CheckpointFile.open(model.path)
    return source if model.merge is None else MergedSource.open(source, model.merge, model.merge_strength)


def layout(config: Config) -> TensorSource:
    """Where the model's sizes come from: the checkpoint if there is one, else the preset; for planning."""
    return weights(config) if config.model.path else RandomWeights(config.model.preset, config.model.seed)


def dtype(config: Config) -> torch.dtype:
    return DTYPES[config.model.dtype]


def sigma_distribution(config: Config) -> SigmaDistribution:
    s = config.sigma
    limits = (s.shift_limits[0], s.shift_limits[1]) if s.shift_limits else None
    return SigmaDistribution(
        s.std, s.eps, s.uniform_prob, SigmaKind(s.kind), s.mean, s.tokens, limits, s.low, s.high, s.high_from,
        s.high_prob,
    )  # fmt: skip


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
        needs_audio=any(m.audio is not Role.absent for m in (*_modes(config), config.mode)),
        silence_db=config.data.silence_db,
        skip_bad=config.data.on_bad_clip == "skip",
        reference_scale=config.data.reference_scale,
        drops_captions=config.data.caption_dropout > 0,
        keep_trigger=config.data.keep_trigger,
    )


def _modes(config: Config) -> list[Mode]:
    return [mode for _, mode in configuration.training(config)]


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
    conditions = ", ".join(f"{c.name} p={c.p:g}" for c in config.mode.conditions) or "none"
    facts = {"video": config.mode.video.value, "audio": config.mode.audio.value, "conditions": conditions}
    mixed = ", ".join(f"{name} {weight:g}" for name, weight in config.mixture.items() if weight)
    return facts | ({"mixture": mixed} if mixed else {})


def lora(config: Config) -> Lora:
    """What is attached; layers that no mode's loss reaches are left alone."""
    a = config.adapter
    modes = tuple(_modes(config))
    return Lora(
        a.rank, a.alpha, a.dropout, tuple(a.targets), dict(a.rank_pattern), dict(a.alpha_pattern), a.rslora, a.dora,
        a.init, modes,
    )  # fmt: skip


def wants(config: Config, modes: Iterable[Mode], *, training: bool) -> Wants:
    """What a reader reads for modes; in training also masks of the loss, dropped and further captions."""
    if not training:
        return replace(Wants.of(modes), variants=False)
    return Wants.of(modes, config.loss.token_weights, config.data.caption_dropout)


def asked(config: Config) -> Asked:
    """What prepared data have to serve: training and measuring."""
    modes = tuple(_modes(config))
    everything = wants(config, (*modes, config.mode), training=True)
    return Asked((*modes, config.mode), everything, config.data.silence_db)


def grid(config: Config, found: Index) -> Grid:
    """The noise levels that held-out loss is measured at; quantiles are those of the mode's own distribution."""
    if not config.eval.quantiles:
        return Grid((), tuple(config.eval.sigmas))
    tokens: Counter[int] = Counter()
    for record in found.split(HELDOUT) or found.records:
        width, height, frames = parse_bucket(record.bucket)
        video = positions.latent_frames(frames) * (width // 32) * (height // 32)
        tokens[video if config.mode.video is Role.generate else positions.audio_latents(record.seconds)] += 1
    levels = sigma.quantiles(sigma_distribution(config), tokens, config.eval.quantiles)
    return Grid(tuple(levels), tuple(config.eval.sigmas))


def evaluation(config: Config, levels: Grid) -> heldout.Settings:
    """How the held-out split is measured; the same in `fit` and `evaluate`."""
    e = config.eval
    return heldout.Settings(
        config.mode, levels.levels, e.seed, e.batch_size, e.max_samples, e.wrong_references, config.loss.video_weight,
        config.loss.audio_weight, e.dropped, e.wrong_caption,
    )  # fmt: skip


def shares_updates(config: Config) -> bool:
    """Whether ranks update a share of the weights each; ZeRO-3 of a frozen base shares that alone."""
    name = config.strategy.name
    return name in ("zero1", "zero2") or (name == "zero3" and config.adapter.kind == "full")


def compiles(config: Config) -> bool:
    return config.memory.compile == "on" or (config.memory.compile == "auto" and device(config).type == "cuda")
