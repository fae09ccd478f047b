"""The frozen dataclasses that cross rooms, and the exit codes.

Owns what the rooms say to each other; knows nothing of how any of it is made. Importing this
module imports no heavy library, so the command line can read the exit codes at no cost.
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
    PREEMPTED = 75
    HUNG = 76
    CONFIG = 77
    DATA = 78
    DIVERGED = 79


class UserError(Exception):
    """A mistake a user can mend: printed as one line, without a traceback."""

    exit_code = Exit.CONFIG


class ConfigError(UserError):
    """The configuration is wrong; raised by `config` alone, before any GPU work."""


class DataError(UserError):
    """A clip, a shard, a latent or a weight file is missing, damaged, stale or unusable."""

    exit_code = Exit.DATA


class DivergedError(UserError):
    """The loss or a gradient is no longer a finite number."""

    exit_code = Exit.DIVERGED


class Role(StrEnum):
    """What happens to a modality: noised and predicted, given clean, or not there at all."""

    generate = "generate"
    freeze = "freeze"
    absent = "absent"


class ModalityName(StrEnum):
    """The two streams of tokens."""

    video = "video"
    audio = "audio"


class ConditionKind(StrEnum):
    """Target tokens given clean: the first latent frame, the first or last few, a rectangle, a mask of the data.
    reference: clean tokens of other material beside the target."""

    first_frame = "first_frame"
    prefix = "prefix"
    suffix = "suffix"
    spatial_crop = "spatial_crop"
    mask = "mask"
    reference = "reference"


class Placement(StrEnum):
    """Where reference tokens stand in time: over the target, or ending `gap_s` before time zero."""

    overlap = "overlap"
    negative = "negative"


class Coupling(StrEnum):
    """Whether both modalities share one noise level per sample, as at inference, or draw their own."""

    shared = "shared"
    independent = "independent"


SPEAKER = "speaker"


@dataclass(kw_only=True)
class Condition:
    """Tokens given clean: which, and with what probability per sample.

    modality: whose tokens; null: video, and audio for the reference of another clip of the speaker.
    latents: of prefix and suffix, [n] latent steps or [lowest, highest] drawn per sample. region: of spatial_crop,
    [top, left, bottom, right] in pixels; empty: a rectangle of a quarter to three quarters of each side, per sample.
    source: of mask and reference, the tensor's name in the shards; `speaker`: another clip of the same speaker.
    position, gap_s: where a reference stands in time. spatial_scale: how much smaller it is than the target (null:
    as the shapes say); temporal_scale: how much fewer frames a second. strength: weight of its keys in [0, 1].
    sigmas: noise levels at which it is there. crossed: whether the other modality sees it. reads_text: whether it
    attends to the text.
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
    temporal_scale: int = 1
    strength: float = 1.0
    sigmas: list[float] = field(default_factory=lambda: [0.0, 1.0])
    crossed: bool = True
    reads_text: bool = True

    @property
    def stream(self) -> ModalityName:
        """Whose tokens the condition is about."""
        if self.modality is not None:
            return self.modality
        voice = self.kind is ConditionKind.reference and self.source == SPEAKER
        return ModalityName.audio if voice else ModalityName.video

    @property
    def name(self) -> str:
        """Tells the conditions of a mode apart, keys their draws and names what a batch holds for them."""
        if self.kind is ConditionKind.first_frame:
            return self.kind.value
        parts = [self.kind.value, self.stream.value]
        return "/".join([*parts, self.source] if self.kind in (ConditionKind.mask, ConditionKind.reference) else parts)


@dataclass
class Mode:
    """A training task as composition: a role per modality and a list of conditions."""

    video: Role = Role.generate
    audio: Role = Role.generate
    sigma: Coupling = Coupling.shared
    conditions: list[Condition] = field(default_factory=list[Condition])

    def role(self, modality: ModalityName) -> Role:
        return self.video if modality is ModalityName.video else self.audio

    @property
    def references(self) -> list[Condition]:
        return [c for c in self.conditions if c.kind is ConditionKind.reference]

    @property
    def masks(self) -> list[str]:
        """Names of the tensors whose places above one half are given clean."""
        return [c.source for c in self.conditions if c.kind is ConditionKind.mask]


@dataclass(frozen=True, slots=True)
class Levels:
    """The timesteps of a batch as the distinct ones: values (U,) float32, and each token's index (B, T) int64."""

    values: Tensor
    index: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Modality:
    """One stream of tokens as the transformer reads it.

    latent: (B, T, C), any float dtype; target tokens first, reference tokens after them.
    timesteps: (B, T) float32 in [0, 1]; 0 = clean token.
    sigma: (B,) float32 in [0, 1]; the noise level of the modality, 0 when it is given.
    positions: (B, 3, T, 2) seconds/pixels/pixels for video, (B, 1, T, 2) seconds for audio; float32, [start, end).
    context: (B, S, D) text context after the connectors.
    context_mask: (B, S), 1 = attend, 0 = blocked; None = attend to all.
    attention_mask: (B, T, T) in [0, 1], rows are queries, or (B, T) for all queries alike; its log is added to the
    logits; None = attend to all.
    cross_mask: (B, T) in [0, 1]; as that, for the other modality's queries.
    reads_text: (B, T) in [0, 1]; how much a token takes from the text, None = 1.
    levels: `timesteps` once more, on the latent's device; None = the model looks for them, which may stall a GPU.
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
    """What a modality has to predict: target (B, T, C) = noise - clean, loss_mask (B, T): each token's weight, 0 for
    one that is given."""

    target: Tensor
    loss_mask: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One prepared clip. Absent parts are None.

    video_latent: (C, F, H, W). audio_latent: (c, T, f). references: by the name of their condition, (C, F, H, W) or
    (c, R, f). masks: by tensor name, (F, H, W) or (T,) in [0, 1].
    video_context: (S, Dv), audio_context: (S, Da). fps: frames per second of the video latent's source.
    draw: the global position at which this sample is used; it keys every random number of the sample.
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
    """Samples of one bucket, stacked on dim 0; the fields are those of `Sample`."""

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
    """Losses of one forward pass, float32: `loss` is a scalar, the others are per sample (B,) or None."""

    loss: Tensor
    video: Tensor | None
    audio: Tensor | None
    sigma: Tensor


@dataclass(frozen=True, slots=True)
class Clip:
    """A generated clip to play: an mp4 with video, sound or both, and what to say of it."""

    caption: str
    path: Path
