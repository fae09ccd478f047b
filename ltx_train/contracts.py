"""The dataclasses that the packages exchange, and the exit codes.

Owns these types, not the construction of their values. All are frozen except `Condition` and `Mode`, which the
configuration library builds; no code changes those two after composition. Importing this module imports no heavy
library, so the command line can read the exit codes at no cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


class Exit(IntEnum):
    """Process exit codes, stable across releases: a supervisor may act on them."""

    DONE = 0
    DEVICE = 71
    STORE = 74
    PREEMPTED = 75
    HUNG = 76
    CONFIG = 77
    DATA = 78
    DIVERGED = 79


class UserError(Exception):
    """An error that the user can fix, printed as one line without a traceback."""

    exit_code = Exit.CONFIG


class ConfigError(UserError):
    """The configuration is wrong. Raised while it is read, before any GPU work."""


class StoreError(UserError):
    """An object store cannot be read or written. The disk of this machine is fine."""

    exit_code = Exit.STORE


class DataError(UserError):
    """A clip, a shard, a latent or a weight file is missing, damaged, stale or unusable."""

    exit_code = Exit.DATA


class DivergedError(UserError):
    """The loss or a gradient is no longer a finite number."""

    exit_code = Exit.DIVERGED


class Role(StrEnum):
    """How a mode treats a modality: noised and predicted, clean input, or left out."""

    generate = "generate"
    freeze = "freeze"
    absent = "absent"


class ModalityName(StrEnum):
    """The two modalities of a clip."""

    video = "video"
    audio = "audio"


class ConditionKind(StrEnum):
    """Which target tokens are clean: the first latent frame, the first or last latent steps, a rectangle, or a mask
    from the data. reference: clean tokens of another latent, appended to the target tokens."""

    first_frame = "first_frame"
    prefix = "prefix"
    suffix = "suffix"
    spatial_crop = "spatial_crop"
    mask = "mask"
    reference = "reference"


class Placement(StrEnum):
    """Position of reference tokens in time: the same times as the target, or ending `gap_s` before time zero."""

    overlap = "overlap"
    negative = "negative"


class Coupling(StrEnum):
    """Whether both modalities share one noise level per sample, as at inference, or each draws its own."""

    shared = "shared"
    independent = "independent"


SPEAKER = "speaker"


@dataclass(kw_only=True)
class Condition:
    """Clean tokens of one kind, and the probability `p` that a sample has them.

    modality: the tokens' modality; null: audio for a reference with source `speaker`, otherwise video.
    latents: for prefix and suffix, [n] latent steps, or [lowest, highest] to draw the number per sample.
    region: for spatial_crop, [top, left, bottom, right] in pixels; empty: a rectangle drawn per sample, with sides
    between a quarter and three quarters of the frame's.
    source: for mask and reference, the tensor's name in the shards; `speaker`: another clip of the same speaker.

    The other fields are for references. position, gap_s: position in time. spatial_scale: factor by which its grid is
    smaller than the target's, temporal_scale: by which its frame rate is lower (null: computed from the shapes).
    at_s: for a reference that is one picture, seconds of the target at which it stands.
    strength: attention weight between it and the target, in [0, 1]. sigmas: [lowest, highest] noise level at which it
    is visible.
    crossed: whether the other modality attends to it. reads_text: whether it attends to the text.
    """

    kind: ConditionKind = ConditionKind.first_frame
    p: float = 1.0
    modality: ModalityName | None = None
    latents: list[int] = field(default_factory=list[int])
    region: list[int] = field(default_factory=list[int])
    source: str = SPEAKER
    position: Placement = Placement.negative
    gap_s: float = 0.04
    spatial_scale: int | None = None
    temporal_scale: int | None = None
    at_s: float | None = None
    strength: float = 1.0
    sigmas: list[float] = field(default_factory=lambda: [0.0, 1.0])
    crossed: bool = True
    reads_text: bool = True

    @property
    def stream(self) -> ModalityName:
        """The modality of the condition's tokens."""
        if self.modality is not None:
            return self.modality
        from_speaker = self.kind is ConditionKind.reference and self.source == SPEAKER
        return ModalityName.audio if from_speaker else ModalityName.video

    @property
    def name(self) -> str:
        """Unique within a mode: the key of the condition's random draws and of its tensors in a batch."""
        if self.kind is ConditionKind.first_frame:
            return self.kind.value
        parts = [self.kind.value, self.stream.value]
        return "/".join([*parts, self.source] if self.kind in (ConditionKind.mask, ConditionKind.reference) else parts)


@dataclass
class Mode:
    """A training task: a role per modality and a list of conditions."""

    video: Role = field(default=Role.generate, metadata={"help": "the video: noised and predicted, clean, or absent"})
    audio: Role = field(default=Role.generate, metadata={"help": "the audio: noised and predicted, clean, or absent"})
    sigma: Coupling = field(default=Coupling.shared, metadata={"help": "one noise level for both, or one for each"})
    conditions: list[Condition] = field(
        default_factory=list[Condition], metadata={"help": "tokens that are given clean (docs/modes.md)"}
    )

    def role(self, modality: ModalityName) -> Role:
        return self.video if modality is ModalityName.video else self.audio

    @property
    def references(self) -> list[Condition]:
        return [c for c in self.conditions if c.kind is ConditionKind.reference]

    @property
    def masks(self) -> list[str]:
        """Names of the mask tensors; target tokens are clean where a mask is above one half."""
        return [c.source for c in self.conditions if c.kind is ConditionKind.mask]


@dataclass(frozen=True, slots=True)
class Levels:
    """The timesteps of a batch: distinct values (U,) float32, and each token's index into them (B, T) int64."""

    values: Tensor
    index: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Modality:
    """The transformer's input for one modality.

    latent: (B, T, C), any float dtype; target tokens first, reference tokens after them.
    timesteps: (B, T) float32 in [0, 1]; 0 = clean token.
    sigma: (B,) float32 in [0, 1]; the noise level of the modality, 0 if it is frozen.
    positions: (B, 3, T, 2) seconds/pixels/pixels for video, (B, 1, T, 2) seconds for audio; float32, [start, end).
    context: (B, S, D) text context after the connectors.
    context_mask: (B, S), 1 = attend, 0 = blocked; None = attend to all.
    attention_mask: weights of the keys in [0, 1], (B, T, T) with one row per query, or (B, T) for all queries; their
    log is added to the logits; None = attend to all.
    cross_mask: (B, T) in [0, 1]; the same weights for the other modality's queries.
    reads_text: (B, T) in [0, 1]; factor of the text attention's output per token, None = 1.
    levels: the distinct `timesteps`, on the latent's device; None = the model computes them, which may stall a GPU.
    """

    latent: Tensor
    timesteps: Tensor
    sigma: Tensor
    positions: Tensor
    context: Tensor
    context_mask: Tensor | None = None
    attention_mask: Tensor | None = None
    cross_mask: Tensor | None = None
    reads_text: Tensor | None = None
    levels: Levels | None = None


@dataclass(frozen=True, slots=True)
class Velocity:
    """The training target of a modality: target (B, T, C) = noise - clean; loss_mask (B, T): weight of each token in
    the loss, 0 for clean tokens."""

    target: Tensor
    loss_mask: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One prepared clip. The latent of an absent modality is None.

    video_latent: (C, F, H, W). audio_latent: (c, T, f). references: (C, F, H, W) or (c, R, f) by condition name.
    masks: (F, H, W) or (T,) in [0, 1] by tensor name.
    video_context: (S, Dv), audio_context: (S, Da). fps: frame rate of the video before encoding.
    draw: global position of this sample in the run's sequence of samples; all random numbers of the sample depend on
    it.
    """

    key: str
    speaker: str
    draw: int
    fps: float
    video_latent: Tensor | None
    audio_latent: Tensor | None
    video_context: Tensor
    audio_context: Tensor
    references: Mapping[str, Tensor] = field(default_factory=dict[str, "Tensor"])
    masks: Mapping[str, Tensor] = field(default_factory=dict[str, "Tensor"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Samples of one bucket, stacked on dim 0. The fields correspond to those of `Sample`."""

    keys: tuple[str, ...]
    speakers: tuple[str, ...]
    draws: tuple[int, ...]
    fps: Tensor
    video_latent: Tensor | None
    audio_latent: Tensor | None
    video_context: Tensor
    audio_context: Tensor
    references: Mapping[str, Tensor] = field(default_factory=dict[str, "Tensor"])
    masks: Mapping[str, Tensor] = field(default_factory=dict[str, "Tensor"])


@dataclass(frozen=True, slots=True)
class StepResult:
    """Losses and noise level of one forward pass, float32: `loss` is a scalar, the others are (B,) or None."""

    loss: Tensor
    video: Tensor | None
    audio: Tensor | None
    sigma: Tensor


@dataclass(frozen=True, slots=True)
class Clip:
    """A generated clip for playback: an mp4 with video, sound or both, and its caption. place: names the clip among
    those of its run, the same at each step."""

    caption: str
    path: Path
    place: str = ""

    @property
    def poster(self) -> Path:
        """Where the clip's first picture lies, if it has one."""
        return self.path.with_suffix(".jpg")
