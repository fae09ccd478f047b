"""What a generated clip is given: the mode's conditions, each with the files that it needs.

Owns the rules: what a mode needs and is not given, and what is given and not used, is an error. Names only; no file is
opened.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from ltx_train.config.schema import Config
from ltx_train.contracts import Condition, ConditionKind, ConfigError, ModalityName, Mode, Placement, Role

# Settings of `sample` that name files or parts of them.
FILES = ("image", "audio", "reference_audio", "video", "mask", "reference_video")
_GIVEN = (*FILES, "audio_mask", "region", "references", "frames")
_FRAME = "frame"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipInputs:
    """mode: roles, and the conditions of this clip, all with probability 1. reference_files: by condition name.
    gives_video, gives_audio: the target's latents come from sample.video, sample.audio, at least in part."""

    mode: Mode
    reference_files: Mapping[str, str]
    gives_video: bool
    gives_audio: bool


def of_clip(config: Config) -> ClipInputs:
    """ConfigError names all that is missing, or that no part of the mode uses."""
    taken = _Taken(config)
    active = [made for condition in config.mode.conditions if (made := taken.active(condition)) is not None]
    active += taken.beyond_the_mode()
    video = taken.role(ModalityName.video, config.mode.video, active)
    audio = taken.role(ModalityName.audio, config.mode.audio, active)
    taken.refuse()
    if Role.generate not in (video, audio):
        raise ConfigError("all that the mode generates is given whole: nothing is left to generate")
    return ClipInputs(
        mode=Mode(video, audio, config.mode.sigma, active), reference_files=MappingProxyType(taken.references),
        gives_video="video" in taken.used, gives_audio="audio" in taken.used,
    )  # fmt: skip


def frames(given: Any) -> dict[float, str]:
    """Images by the seconds at which they stand; ConfigError unless sample.frames is such a mapping, or null."""
    try:
        found = {float(seconds): str(file) for seconds, file in (given or {}).items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError("sample.frames: give images by seconds, as {1.2: middle.png}") from error
    if any(not 0 <= seconds < float("inf") for seconds in found):
        raise ConfigError("sample.frames: seconds are from 0 on")
    return found


class _Taken:
    """Collects which settings are used and which are missing."""

    def __init__(self, config: Config) -> None:
        self._sample, self._mode = config.sample, config.mode
        self._given = {name for name in _GIVEN if getattr(config.sample, name)}
        self.used: set[str] = set()
        self.missing: list[str] = []
        self.references: dict[str, str] = {}

    def active(self, condition: Condition) -> Condition | None:
        """The condition as it holds for this clip; None without its inputs."""
        kinds: dict[ConditionKind, Callable[[Condition], Condition | None]] = {
            ConditionKind.first_frame: self._first_frame, ConditionKind.reference: self._reference,
        }  # fmt: skip
        made = kinds.get(condition.kind, self._part_of_the_target)(condition)
        return None if made is None else replace(made, p=1.0)

    def beyond_the_mode(self) -> list[Condition]:
        """Inputs that the base takes in any mode: a first frame, frames at other times, a voice."""
        found: list[Condition] = []
        has_video, has_audio = self._mode.video is Role.generate, self._mode.audio is Role.generate
        if has_video and self._unused("image"):
            found.append(Condition(kind=ConditionKind.first_frame))
        if has_audio and self._unused("reference_audio") and isinstance(self._sample.reference_audio, str):
            found.append(self._bound(Condition(kind=ConditionKind.reference), self._sample.reference_audio))
        if has_video and self._unused("frames"):
            for number, (seconds, file) in enumerate(sorted(frames(self._sample.frames).items())):
                condition = Condition(
                    kind=ConditionKind.reference, modality=ModalityName.video, source=f"{_FRAME}_{number}",
                    at_s=seconds, spatial_scale=1, position=Placement.overlap,
                )  # fmt: skip
                found.append(self._bound(condition, file))
        return found

    def role(self, stream: ModalityName, role: Role, active: list[Condition]) -> Role:
        """The role of a modality: a file that no condition of it takes freezes it."""
        name = stream.value
        if role is Role.freeze and name not in self._given:
            self.missing.append(f"sample.{name}=FILE: mode.{name}=freeze generates the other modality for it")
        if role is Role.absent or name not in self._given:
            return role
        held = any(c.stream is stream and c.kind is not ConditionKind.reference for c in active)
        if role is Role.generate and name in self.used and held:
            return role
        self.used.add(name)
        return Role.freeze

    def refuse(self) -> None:
        if self.missing:
            raise ConfigError("the mode needs " + "; and ".join(self.missing))
        left = [f"sample.{name}" for name in _GIVEN if name in self._given - self.used]
        if left:
            named = ", ".join(c.name for c in self._mode.conditions) or "no conditions"
            raise ConfigError(
                f"{', '.join(left)}: not used by this mode (video {self._mode.video.value}, audio "
                f"{self._mode.audio.value}, {named}): leave it out, or choose the mode that was trained (mode=...)"
            )

    def _unused(self, name: str) -> bool:
        if name not in self._given or name in self.used:
            return False
        self.used.add(name)
        return True

    def _first_frame(self, condition: Condition) -> Condition | None:
        if self._unused("image"):
            return condition
        if condition.p >= 1:
            self.missing.append("sample.image=FILE for its first frame")
        return None

    def _reference(self, condition: Condition) -> Condition | None:
        s, stream = self._sample, condition.stream
        own = "reference_audio" if stream is ModalityName.audio else "reference_video"
        if condition.source in s.references:
            self.used.add("references")
            return self._bound(condition, s.references[condition.source])
        first = next(c for c in self._mode.references if c.stream is stream)
        if first.name == condition.name and self._unused(own):
            return self._bound(condition, str(getattr(s, own)))
        if condition.p >= 1 and not s.without_references:
            setting = f"sample.{own}=FILE" if first.name == condition.name else ""
            setting = setting or f"sample.references={{{condition.source}: FILE}}"
            self.missing.append(f"{setting} (sample.without_references=true: without it)")
        return None

    def _bound(self, condition: Condition, file: str) -> Condition:
        self.references[condition.name] = file
        return condition

    def _part_of_the_target(self, condition: Condition) -> Condition | None:
        """A prefix, suffix, rectangle or mask of the clip in sample.video or sample.audio."""
        stream = condition.stream.value
        needed = {stream: f"sample.{stream}=FILE"}
        if condition.kind is ConditionKind.mask:
            needed |= (
                {"mask": "sample.mask=FILE, white where it stays"}
                if condition.stream is ModalityName.video
                else {"audio_mask": "sample.audio_mask=0-1.2, the seconds that stay"}
            )
        if condition.kind is ConditionKind.spatial_crop and not condition.region:
            needed["region"] = "sample.region=[top,left,bottom,right] in pixels, the part that stays"
        absent = [text for name, text in needed.items() if name not in self._given]
        if len(absent) == len(needed) and condition.p < 1:
            return None
        self.missing += absent
        self.used |= needed.keys()
        if condition.kind is ConditionKind.spatial_crop and not condition.region:
            return replace(condition, region=list(self._sample.region))
        return condition
