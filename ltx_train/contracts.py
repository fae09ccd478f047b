"""The frozen dataclasses that cross rooms, and the exit codes.

Owns what the rooms say to each other; knows nothing of how any of it is made. Importing this
module imports no heavy library, so the command line can read the exit codes at no cost.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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


class ConditionKind(StrEnum):
    """first_frame: the first latent frame is clean. reference: clean extra tokens of another clip."""

    first_frame = "first_frame"
    reference = "reference"


class Placement(StrEnum):
    """Where reference tokens stand in time: over the target, or ending `gap_s` before time zero."""

    overlap = "overlap"
    negative = "negative"


class Coupling(StrEnum):
    """Whether both modalities share one noise level per sample, as at inference, or draw their own."""

    shared = "shared"
    independent = "independent"


@dataclass
class Condition:
    """Tokens given clean: which, and with what probability per sample."""

    kind: ConditionKind = ConditionKind.first_frame
    p: float = 1.0
    position: Placement = Placement.negative
    gap_s: float = 0.04


@dataclass
class Mode:
    """A training task as composition: a role per modality and a list of conditions."""

    video: Role = Role.generate
    audio: Role = Role.generate
    sigma: Coupling = Coupling.shared
    conditions: list[Condition] = field(default_factory=list[Condition])

    def condition(self, kind: ConditionKind) -> Condition | None:
        """The condition of a kind, or None; `config` allows at most one of each."""
        return next((c for c in self.conditions if c.kind == kind), None)

    @property
    def uses_reference(self) -> bool:
        return self.condition(ConditionKind.reference) is not None


@dataclass(frozen=True, slots=True)
class Levels:
    """The timesteps of a batch as the distinct ones: values (U,) float32, and each token's index (B, T) int64."""

    values: Tensor
    index: Tensor


@dataclass(frozen=True, slots=True)
class Modality:
    """One stream of tokens as the transformer reads it.

    latent: (B, T, C), any float dtype; target tokens first, reference tokens after them.
    timesteps: (B, T) float32 in [0, 1]; 0 = clean token.
    sigma: (B,) float32 in [0, 1]; the noise level of the modality, 0 when it is given.
    positions: (B, 3, T, 2) seconds/pixels/pixels for video, (B, 1, T, 2) seconds for audio; float32, [start, end).
    context: (B, S, D) text context after the connectors.
    context_mask: (B, S), 1 = attend, 0 = blocked; None = attend to all.
    attention_mask: (B, T, T) in [0, 1], rows are queries; its log is added to the logits; None = attend to all.
    levels: `timesteps` once more, on the latent's device; None = the model looks for them, which may stall a GPU.
    """

    latent: Tensor
    timesteps: Tensor
    sigma: Tensor
    positions: Tensor
    context: Tensor
    context_mask: Tensor | None = None
    attention_mask: Tensor | None = None
    levels: Levels | None = None


@dataclass(frozen=True, slots=True)
class Velocity:
    """What a modality has to predict: target (B, T, C) = noise - clean, loss_mask (B, T) with 1 = counts."""

    target: Tensor
    loss_mask: Tensor


@dataclass(frozen=True, slots=True)
class Sample:
    """One prepared clip. Absent parts are None.

    video_latent: (C, F, H, W). audio_latent: (c, T, f). reference_audio: (c, R, f), a voice window of another clip.
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
    reference_audio: Tensor | None = None


@dataclass(frozen=True, slots=True)
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
    reference_audio: Tensor | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """Losses of one forward pass, float32: `loss` is a scalar, the others are per sample (B,) or None."""

    loss: Tensor
    video: Tensor | None
    audio: Tensor | None
    sigma: Tensor
