"""The configuration as the objects of the rooms below: distributions, recipes, requests, prepared data.

One small function an object. Decisions about devices, memory and what is trained are in `resolve`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ltx_train import config as configuration
from ltx_train.assembly import model_source, resolve
from ltx_train.config import Config, counted_fps, fixed_fps, parse_bucket
from ltx_train.contracts import Mode, Role
from ltx_train.data import index, store
from ltx_train.data.audit import DataRequirements
from ltx_train.data.index import HELDOUT, Index
from ltx_train.data.prepare.encode import encoder_fingerprints
from ltx_train.data.prepare.pictures import Crop
from ltx_train.data.prepare.recipe import Recipe
from ltx_train.data.prepare.windows import Windows
from ltx_train.data.reader import ReadRequest
from ltx_train.data.store import StoreSettings
from ltx_train.data.united import PreparedFolder
from ltx_train.diffusion import sigma
from ltx_train.diffusion.grid import audio_latents
from ltx_train.diffusion.sigma import SigmaDistribution, SigmaKind
from ltx_train.evaluation import heldout
from ltx_train.evaluation.rows import Grid
from ltx_train.model.adapter import Lora
from ltx_train.training.schedule import Schedule
from ltx_train.updates.optimizers import OptimizerSettings

# Settings that a further folder shares with the first: references are taken by length and grid.
_SHARED = ("reference_s", "reference_scale", "reference_stride")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def dtype(config: Config) -> torch.dtype:
    return DTYPES[config.model.dtype]


def sigma_distribution(config: Config) -> SigmaDistribution:
    s = config.sigma
    return SigmaDistribution(
        kind=SigmaKind(s.kind), std=s.std, eps=s.eps, uniform_prob=s.uniform_prob, mean=s.mean, tokens=s.tokens,
        shift_limits=(s.shift_limits[0], s.shift_limits[1]) if s.shift_limits else None, low=s.low, high=s.high,
        high_from=s.high_from, high_prob=s.high_prob,
    )  # fmt: skip


def schedule(config: Config) -> Schedule:
    o = config.optim
    return Schedule(kind=o.schedule, lr=o.lr, final_lr=o.final_lr, warmup=o.warmup, steps=o.steps)


def optimizer_settings(config: Config) -> OptimizerSettings:
    o = config.optim
    return OptimizerSettings(lr=o.lr, betas=(o.betas[0], o.betas[1]), weight_decay=o.weight_decay)


def recipe(config: Config) -> Recipe:
    """What `prepare` does with the clips."""
    data = config.data
    return Recipe(
        buckets=tuple(resolve.buckets(config)),
        fps=fixed_fps(config),
        counted_fps=counted_fps(config),
        reference_s=data.reference_s,
        latent_dtype=data.latent_dtype,
        caption=data.caption,
        trigger=data.trigger,
        heldout_speakers=data.heldout_speakers,
        seed=config.run.seed,
        samples_per_shard=data.samples_per_shard,
        needs_audio=any(m.audio is not Role.absent for m in (*_modes(config), config.mode)),
        silence_db=data.silence_db,
        skip_bad=data.on_bad_clip == "skip",
        windows=Windows(data.windows),
        crop=Crop(data.crop),
        loudness=data.loudness,
        trim_silence=data.trim_silence,
        heldout_clips=data.heldout_clips,
        reference_scale=data.reference_scale,
        reference_stride=data.reference_stride,
        drops_captions=data.caption_dropout > 0,
        keep_trigger=data.keep_trigger,
        voice_variants=tuple(data.voice_variants),
    )


def _modes(config: Config) -> list[Mode]:
    return [mode for _, mode in configuration.training_modes(config)]


def fingerprints(config: Config) -> dict[str, str]:
    return encoder_fingerprints(model_source.weights(config), config.model.text_encoder, config.model.text_tokens)


def prepared(config: Config) -> tuple[Path, Index, list[str]]:
    """The prepared folder, its index, and why it is stale for this configuration (empty: it is not)."""
    root = data_folder(config)
    loaded = index.load(root)
    return root, loaded, index.stale_reasons(loaded, recipe(config).settings(), fingerprints(config))


def further(config: Config) -> list[tuple[PreparedFolder, list[str]]]:
    """The folders of `data.also`, each with the reasons why it cannot be trained on beside the first."""
    weights = further_weights(config)
    encoders = fingerprints(config) if weights else {}
    shared = {name: value for name, value in recipe(config).settings().items() if name in _SHARED}
    found: list[tuple[PreparedFolder, list[str]]] = []
    for given, weight in weights:
        root = _folder(config, given)
        part = PreparedFolder(name=_name_of(given), root=root, index=index.load(root), weight=weight)
        reasons = index.stale_reasons(part.index, shared, encoders)
        strange = {record.bucket for record in part.index.records} - set(config.data.buckets)
        reasons += [f"bucket {bucket} is not in data.buckets" for bucket in sorted(strange)]
        found.append((part, reasons))
    return found


def further_weights(config: Config) -> list[tuple[str, float]]:
    """The folders of `data.also` as they are given, each with its weight."""
    weights = config.data.also_weights or [1.0] * len(config.data.also)
    return list(zip(config.data.also, weights, strict=True))


def data_folder(config: Config) -> Path:
    """The prepared folder on this machine; of a store, the part of it that is here, with the store's present index."""
    return _folder(config, config.data.root)


def _folder(config: Config, root: str) -> Path:
    d = config.data
    if not store.is_url(root):
        return Path(root)
    cache = Path(d.cache or Path.home() / ".cache" / "ltx-train" / "data")
    return store.mirror(StoreSettings(root, d.cache_gib), cache)


def _name_of(root: str) -> str:
    return root.rstrip("/").rpartition("/")[2] if store.is_url(root) else Path(root).resolve().name


def shards_ahead(config: Config, prepared_index: Index) -> int:
    """How many shards of a store are fetched ahead: those that take half of the cache."""
    largest = max((shard.size for shard in prepared_index.shards), default=1)
    return max(1, int(config.data.cache_gib * 2**30 / 2 / largest))


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
    """The adapter; layers that no mode's loss reaches are left alone."""
    a = config.adapter
    return Lora(
        rank=a.rank, alpha=a.alpha, dropout=a.dropout, targets=tuple(a.targets), rank_pattern=dict(a.rank_pattern),
        alpha_pattern=dict(a.alpha_pattern), rslora=a.rslora, dora=a.dora, init=a.init, modes=tuple(_modes(config)),
    )  # fmt: skip


def read_request(config: Config, modes: Iterable[Mode]) -> ReadRequest:
    """What a reader reads to train in modes: also masks of the loss, dropped captions and further captions."""
    request = ReadRequest.of(modes, config.loss.token_weights, config.data.caption_dropout)
    variants = tuple(config.data.voice_variants)
    return replace(request, voice_variants=variants, voice_variant_share=config.data.voice_variant_share)


def data_requirements(config: Config) -> DataRequirements:
    """What prepared data have to serve: training and measuring."""
    modes = (*_modes(config), config.mode)
    return DataRequirements(modes, read_request(config, modes), config.data.silence_db)


def grid(config: Config, prepared_index: Index) -> Grid:
    """The noise levels of held-out loss; quantiles are those of the mode's own training distribution."""
    if not config.eval.quantiles:
        return Grid((), tuple(config.eval.sigmas))
    tokens: Counter[int] = Counter()
    for record in prepared_index.split(HELDOUT) or prepared_index.records:
        generates_video = config.mode.video is Role.generate
        tokens[parse_bucket(record.bucket).video_tokens if generates_video else audio_latents(record.seconds)] += 1
    levels = sigma.quantiles(sigma_distribution(config), tokens, config.eval.quantiles)
    return Grid(tuple(levels), tuple(config.eval.sigmas))


def measurement_settings(config: Config, levels: Grid) -> heldout.MeasurementSettings:
    """How the held-out split is measured; the same in `fit` and `evaluate`."""
    e = config.eval
    return heldout.MeasurementSettings(
        mode=config.mode, levels=levels.levels, seed=e.seed, batch_size=e.batch_size, max_samples=e.max_samples,
        wrong_references=e.wrong_references, video_weight=config.loss.video_weight,
        audio_weight=config.loss.audio_weight, dropped=e.dropped, neutral=e.neutral, wrong_caption=e.wrong_caption,
        voice_variant=e.voice_variant,
    )  # fmt: skip
