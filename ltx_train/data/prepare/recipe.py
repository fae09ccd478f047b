"""The settings of a preparation: what latents depend on besides media and encoders, and how to split and pack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ltx_train.data.prepare.pictures import Crop
from ltx_train.data.prepare.windows import Cutting, Windows
from ltx_train.diffusion.grid import Bucket


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """fps: None keeps each file's own rate, and counted_fps counts lengths before a file is seen. loudness: LUFS that
    sounds are brought to, None as they are. heldout_clips: recordings that are held out (a number, or a share below 1),
    0: whole identities are."""

    buckets: tuple[Bucket, ...]
    fps: float | None
    counted_fps: float
    reference_s: float
    latent_dtype: str
    caption: str | None
    trigger: str | None
    heldout_speakers: float
    seed: int
    samples_per_shard: int
    needs_audio: bool
    silence_db: float
    skip_bad: bool
    windows: Windows = Windows.first
    crop: Crop = Crop.centre
    loudness: float | None = None
    trim_silence: bool = False
    heldout_clips: float = 0.0
    reference_scale: int = 1
    reference_stride: int = 1
    drops_captions: bool = False
    keep_trigger: bool = True
    voice_variants: tuple[str, ...] = ()

    def settings(self) -> dict[str, Any]:
        """The settings that make prepared data stale when they change."""
        # Data that hold a dropped caption or variants of voices serve runs that use none.
        further: dict[str, Any] = {"dropped_caption": self.dropped_caption} if self.drops_captions else {}
        if self.voice_variants:
            further["voice_variants"] = list(self.voice_variants)
        return further | {
            "buckets": [str(bucket) for bucket in self.buckets],
            "fps": "source" if self.fps is None else self.fps,
            "windows": self.windows.value,
            "crop": self.crop.value,
            "loudness": self.loudness,
            "trim_silence": self.trim_silence,
            "reference_s": self.reference_s,
            "reference_scale": self.reference_scale,
            "reference_stride": self.reference_stride,
            "latent_dtype": self.latent_dtype,
            "caption": self.caption,
            "trigger": self.trigger,
            "heldout_speakers": self.heldout_speakers,
            "heldout_clips": self.heldout_clips,
        }

    @property
    def cutting(self) -> Cutting:
        return Cutting(
            buckets=self.buckets, fps=self.fps, windows=self.windows, crop=self.crop, sound_fps=self.counted_fps,
            trims=self.trim_silence,
        )  # fmt: skip

    @property
    def control_grid(self) -> tuple[int, int]:
        """How many times smaller control videos are, and every how many frames one is taken."""
        return self.reference_scale, self.reference_stride

    @property
    def dropped_caption(self) -> str:
        """The text that replaces a dropped caption: the trigger alone, or an empty string."""
        return self.trigger if self.trigger and self.keep_trigger else ""

    def final_caption(self, caption: str) -> str:
        """The constant caption or else the clip's, with the trigger in front unless the caption contains it already."""
        caption = self.caption if self.caption is not None else caption
        return f"{self.trigger} {caption}" if self.trigger and self.trigger not in caption else caption
