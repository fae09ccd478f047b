"""The files that a clip is given, as the tensors of a batch: target latents, masks, references and the sound.

Owns the lengths: how much of a file is used, and the error for a file that is too short. `config.clip_inputs` decides
which files are used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ltx_train.assembly import model_source
from ltx_train.config import Config, counted_fps, sample_bucket
from ltx_train.config.clip_inputs import ClipInputs
from ltx_train.contracts import Condition, ConditionKind, DataError, ModalityName, Mode, Role
from ltx_train.data.prepare import extras
from ltx_train.data.prepare.encode import Encoders
from ltx_train.data.prepare.media import TOLERANCE_FRAMES, Part, probe, read_pixels
from ltx_train.data.prepare.sound import read_audio
from ltx_train.data.reader import CONTROL
from ltx_train.diffusion.grid import AUDIO_LATENTS_PER_S, FRAMES_PER_LATENT, Bucket, audio_latents, latent_frames
from ltx_train.model import codecs
from ltx_train.sampling import media
from ltx_train.sampling.media import Sound

_SPANS = (ConditionKind.prefix, ConditionKind.suffix)
# A file's declared length may be this much too short.
_TOLERANCE_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenMedia:
    """mode: as `ClipInputs.mode`, with the lengths of what is given. video (1, C, F, H, W), audio (1, c, T, f): the
    target's, zero where nothing is given. sound: a frozen sound in its original quality, for the file."""

    mode: Mode
    video: Tensor
    audio: Tensor
    masks: dict[str, Tensor]
    references: dict[str, Tensor]
    sound: Sound | None


def of_clip(config: Config, inputs: ClipInputs, encoders: Encoders) -> GivenMedia:
    """DataError names a file that cannot be read or is too short."""
    reading = _Reading(config, encoders)
    mode = replace(inputs.mode, conditions=[reading.with_length(c) for c in inputs.mode.conditions])
    references = {c.name: reading.reference(c, inputs.reference_files[c.name])[None] for c in mode.references}
    masks = {c.source: reading.mask(c)[None] for c in mode.conditions if c.kind is ConditionKind.mask}
    video = reading.video(mode) if mode.video is not Role.absent else reading.no_video()
    sound = reading.sound(reading.seconds) if inputs.gives_audio and _whole(mode, ModalityName.audio) else None
    audio = reading.audio(mode, sound) if inputs.gives_audio else reading.no_audio()
    frozen = mode.audio is Role.freeze
    return GivenMedia(
        mode=mode, video=video, audio=audio, masks=masks, references=references, sound=sound if frozen else None
    )


def _whole(mode: Mode, stream: ModalityName) -> bool:
    """Whether all of a modality's file is needed: where it is frozen, and under a mask or a rectangle."""
    kinds = (ConditionKind.mask, ConditionKind.spatial_crop)
    return mode.role(stream) is Role.freeze or any(c.stream is stream and c.kind in kinds for c in mode.conditions)


class _Reading:
    """Reads and encodes the files of one clip."""

    def __init__(self, config: Config, encoders: Encoders) -> None:
        self._sample, self._data, self._encoders = config.sample, config.data, encoders
        self._bucket = sample_bucket(config)
        self._fps = config.sample.fps or counted_fps(config)
        self._channels = model_source.weights(config).config["transformer"]
        self.seconds = self._bucket.frames / self._fps

    def no_video(self) -> Tensor:
        return torch.zeros(1, self._channels["in_channels"], *self._bucket.latents)

    def no_audio(self) -> Tensor:
        bins = codecs.LATENT_MEL_BINS
        return torch.zeros(1, self._channels["audio_in_channels"] // bins, self._bucket.audio_tokens(self._fps), bins)

    def with_length(self, condition: Condition) -> Condition:
        """A prefix or suffix as long as its file allows, within the lengths of the mode."""
        if condition.kind not in _SPANS:
            return condition
        lowest, highest = condition.latents[0], condition.latents[-1]
        path, found = self._span_file(condition)
        if found < lowest:
            raise DataError(f"{path} has {found} latents, and the mode continues at least {lowest}: give a longer file")
        return replace(condition, latents=[min(highest, found)])

    def video(self, mode: Mode) -> Tensor:
        """The target's latents with what is given of them."""
        latent, s = self.no_video(), self._sample
        if s.video is not None and _whole(mode, ModalityName.video):
            latent[:] = self._encoded(Path(s.video), self._part(Path(s.video)))
        for condition in mode.conditions:
            if condition.kind is ConditionKind.first_frame and s.image is not None:
                latent[:, :, :1] = self._picture(s.image)
            elif condition.kind in _SPANS and condition.stream is ModalityName.video and s.video is not None:
                self._fill(latent, condition, Path(s.video))
        return latent

    def audio(self, mode: Mode, sound: Sound | None) -> Tensor:
        """The same of the sound. sound: that of the whole clip, where all of it is needed."""
        latent = self.no_audio()
        count = latent.shape[2]
        if sound is not None:
            latent[:] = self._encoders.sound(sound.waveform, sound.rate)[None, :, :count].cpu()
        for condition in mode.conditions:
            if condition.kind in _SPANS and condition.stream is ModalityName.audio:
                length = condition.latents[0]
                made = self.sound(length / AUDIO_LATENTS_PER_S, at_end=condition.kind is ConditionKind.suffix)
                given = self._encoders.sound(made.waveform, made.rate)[None, :, :length].cpu()
                if condition.kind is ConditionKind.prefix:
                    latent[:, :, :length] = given
                else:
                    latent[:, :, count - length :] = given
        return latent

    def mask(self, condition: Condition) -> Tensor:
        s = self._sample
        if condition.stream is ModalityName.video:
            path = Path(s.mask or "")
            return extras.video_mask(path, self._part(path))
        return extras.audio_mask(s.audio_mask or "", self._bucket.audio_tokens(self._fps), "sample.audio_mask")

    def reference(self, condition: Condition, file: str) -> Tensor:
        """(c, R, f) or (C, F, H, W)."""
        if condition.stream is ModalityName.audio:
            return self._encoders.reference(Path(file), self._data.reference_s).cpu()
        if condition.at_s is not None:
            if condition.at_s >= self.seconds:
                raise DataError(f"sample.frames: {condition.at_s:g} s is behind the clip's end at {self.seconds:.2f} s")
            return self._picture(file)[0]
        is_control = condition.source == CONTROL
        scale = self._data.reference_scale if is_control else condition.spatial_scale or 1
        stride = self._data.reference_stride if is_control else condition.temporal_scale or 1
        path = Path(file)
        return self._encode(extras.control(path, self._part(path), scale, stride))[0]

    def sound(self, seconds: float, *, at_end: bool = False) -> Sound:
        """sample.audio from sample.audio_start on. sample.audio_short decides about one that is shorter than
        `seconds`."""
        s = self._sample
        path, available = Path(s.audio or ""), self._audio_seconds()
        used = seconds if s.audio_short == "silence" or available + _TOLERANCE_S >= seconds else available
        if used < seconds and s.audio_short == "refuse":
            raise DataError(
                f"{path} has {available:.2f} s of sound from {s.audio_start:g} s on, and {seconds:.2f} s are needed: "
                "give a longer one, or sample.audio_short=loop or silence"
            )
        start = s.audio_start + (max(0.0, available - seconds) if at_end else 0.0)
        waveform, rate = read_audio(path, start, min(used, available))
        if waveform is None:
            raise DataError(f"{path} has no sound")
        count = round(seconds * rate)
        if used < seconds:
            waveform = waveform.repeat(1, -(-count // waveform.shape[1]))
        padded = torch.nn.functional.pad(waveform[:, :count], (0, max(0, count - waveform.shape[1])))
        return Sound(padded, rate, original=True)

    def _audio_seconds(self) -> float:
        """Seconds of sample.audio from its start on."""
        s = self._sample
        facts = probe(Path(s.audio or ""))
        if not facts.has_sound:
            raise DataError(f"{s.audio} has no sound")
        left = facts.seconds - s.audio_start
        if left <= 0:
            raise DataError(f"{s.audio} lasts {facts.seconds:.2f} s: sample.audio_start={s.audio_start:g} is behind it")
        return left if s.audio_seconds is None else min(left, s.audio_seconds)

    def _span_file(self, condition: Condition) -> tuple[Path, int]:
        """The file of a prefix or suffix, and its length in latents."""
        if condition.stream is ModalityName.audio:
            return Path(self._sample.audio or ""), audio_latents(self._audio_seconds() + _TOLERANCE_S)
        path = Path(self._sample.video or "")
        found = latent_frames(self._frames_of(path))
        # The first latent of what is encoded of an end holds one frame, which no latent inside a clip does.
        return path, found if condition.kind is ConditionKind.prefix else found - 1

    def _fill(self, latent: Tensor, condition: Condition, path: Path) -> None:
        length = condition.latents[0]
        if condition.kind is ConditionKind.prefix:
            latent[:, :, :length] = self._encoded(path, self._part(path, (length - 1) * FRAMES_PER_LATENT + 1))
            return
        frames = length * FRAMES_PER_LATENT + 1
        last = self._part(path, frames)
        start = max(0.0, (self._frames_of(path) - frames) / self._fps)
        latent[:, :, -length:] = self._encoded(path, replace(last, start=start))[:, :, 1:]

    def _part(self, path: Path, frames: int | None = None) -> Part:
        """The first frames of a video, the clip's number by default. DataError when it has fewer."""
        frames = frames or self._bucket.frames
        found = self._frames_of(path)
        if found < frames:
            raise DataError(
                f"{path} has {found} frames at {self._fps:g} fps, and {frames} are needed: give a longer one"
            )
        return Part(bucket=Bucket(self._bucket.width, self._bucket.height, frames), fps=self._fps)

    def _frames_of(self, path: Path) -> int:
        facts = probe(path)
        if facts.width == 0:
            raise DataError(f"{path} has no pictures")
        return int(facts.seconds * self._fps + TOLERANCE_FRAMES)

    def _encoded(self, path: Path, part: Part) -> Tensor:
        return self._encode(read_pixels(path, part))

    def _encode(self, pixels: Tensor) -> Tensor:
        vae = self._encoders.video_vae
        return codecs.encode_video(vae, codecs.scaled(pixels, vae.device, vae.dtype)).float().cpu()

    def _picture(self, file: str) -> Tensor:
        size = (self._bucket.width, self._bucket.height)
        pixels = media.image_to_pixels(file, *size, crf=self._sample.image_crf)
        vae = self._encoders.video_vae
        return codecs.encode_video(vae, pixels.to(vae.device)).float().cpu()
