"""From the configuration to what its data set takes: a table for `plan.clips`."""

from __future__ import annotations

from collections.abc import Iterator

from ltx_train.assembly import from_config, model_source, resolve
from ltx_train.config import Config, counted_fps
from ltx_train.memory.planning import footage
from ltx_train.memory.planning.footage import Footage, StoredSizes
from ltx_train.model.codecs import LATENT_MEL_BINS

# Devices in the table.
_DEVICES = (1, 8, 64)


def of_config(config: Config) -> Footage:
    """A clip of the largest bucket."""
    sizes = model_source.layout(config).config["transformer"]
    stored = StoredSizes(
        video_channels=sizes["in_channels"], audio_channels=sizes["audio_in_channels"] // LATENT_MEL_BINS,
        context_width=sizes["cross_attention_dim"] + sizes["audio_cross_attention_dim"],
        context_tokens=config.model.text_tokens, latent_bytes=from_config.DTYPES[config.data.latent_dtype].itemsize,
    )  # fmt: skip
    bucket = max(resolve.buckets(config), key=lambda b: b.width * b.height * b.frames)
    return footage.of_clip(stored, bucket, counted_fps(config), config.data.reference_s)


def shards(config: Config, clips: int) -> tuple[int, int]:
    """Numbers of shards and of the text contexts in them: of each caption, and in every shard of the dropped one."""
    files = -(-clips // config.data.samples_per_shard)
    return files, files + (clips if config.data.caption is None else files)


def rows(config: Config, clips: int) -> Iterator[tuple[str, str]]:
    """Names and values of the table. Every clip has its own caption, or all share data.caption."""
    one, captions = of_config(config), 1 if config.data.caption is not None else clips
    files, contexts = shards(config, clips)
    yield "clips", f"{clips:,}"
    yield "captions", f"{captions:,}"
    yield "a sample", f"{one.sample_bytes / 1e6:.2f} MB, a text context {one.context_bytes / 1e6:.2f} MB"
    yield "shards", f"{_size(clips * one.sample_bytes + contexts * one.context_bytes)} in {files:,} files"
    yield "of these, text contexts", _size(contexts * one.context_bytes)
    for devices in _DEVICES:
        hours = one.hours(clips, captions, devices)
        hourly = config.plan.price_per_hour
        price = "" if hourly is None else f", {hourly * hours * devices:,.0f} for the devices"
        yield f"prepare on {devices} H200", f"{hours:,.1f} h{price}"


def _size(count: float) -> str:
    """Bytes with a unit of 10^9 or 10^12."""
    return f"{count / 1e12:,.2f} TB" if count >= 1e12 else f"{count / 1e9:,.2f} GB"
