"""Media files of sampling: writes latents as an mp4 with sound, reads images as pixels.

Owns decoding with the checkpoint's decoders, and reading and writing with PyAV.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

from ltx_train.contracts import DataError
from ltx_train.data.prepare.pictures import picture_to_bucket
from ltx_train.model import codecs, loaders
from ltx_train.model.checkpoint import TensorSource

# In the metadata of every file that is written here.
_COMMENT = "ltx-train"
_TICK = Fraction(1, 25)


@dataclass(frozen=True)
class Decoder:
    """The decoders of a checkpoint."""

    video_vae: Any
    audio_vae: Any
    vocoder: Any


@dataclass(frozen=True, slots=True)
class Sound:
    """waveform (channels, samples) in [-1, 1] at `rate` Hz. original: a given sound, which is written without loss."""

    waveform: Tensor
    rate: int
    original: bool = False


def open_decoder(source: TensorSource, device: torch.device, dtype: torch.dtype, *, tile: int | None = None) -> Decoder:
    """tile: the edge of the tiles that the video is decoded in, None for the whole picture."""
    return Decoder(
        loaders.load_video_vae(source, device=device, dtype=dtype, tile=tile),
        loaders.load_audio_vae(source, device=device),
        loaders.load_vocoder(source, device=device),
    )


@torch.no_grad()
def decode(decoder: Decoder, video: Tensor | None, audio: Tensor | None) -> tuple[Tensor | None, Sound | None]:
    """video (C, F, H, W) -> pixels (frames, height, width, 3) uint8; audio (c, T, f) -> 48 kHz stereo; None -> None."""
    pixels = sound = None
    if video is not None:
        pixels = codecs.unscaled(codecs.decode_video(decoder.video_vae, video[None].to(decoder.video_vae.device))[0])
    if audio is not None:
        waveform = codecs.decode_waveform(decoder.audio_vae, decoder.vocoder, audio[None].to(decoder.audio_vae.device))
        sound = Sound(waveform[0].float().cpu(), codecs.VOCODER_RATE)
    return pixels, sound


def write_mp4(path: Path, pixels: Tensor | None, sound: Sound | None, fps: float) -> None:
    """Writes H.264 video and AAC sound atomically; None leaves a stream out.

    Raises DataError if the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        with av.open(str(temporary), "w", format="mp4") as container:
            container.metadata["comment"] = _COMMENT
            streams: list[tuple[Any, Any]] = []
            if pixels is not None:
                streams.append((_video_stream(container, pixels, fps), _pictures(pixels)))
            if sound is not None:
                streams.append((_sound_stream(container, sound), _sound_frames(sound)))
            for stream, frames in streams:
                for frame in frames:
                    container.mux(stream.encode(frame))
                container.mux(stream.encode())
        os.replace(temporary, path)
    except (av.FFmpegError, OSError) as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"{path} could not be written ({error})") from error


def jpeg(picture: Tensor) -> bytes:
    """A picture (H, W, 3) uint8 with even sides as a JPEG file."""
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture.numpy()), "rgb24").reformat(format="yuvj420p")
    context: Any = av.CodecContext.create("mjpeg", "w")
    context.width, context.height, context.pix_fmt, context.time_base = frame.width, frame.height, "yuvj420p", _TICK
    return b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode(None)])


def is_own(path: Path) -> bool:
    """Whether `write_mp4` wrote the file."""
    try:
        with av.open(str(path)) as container:
            return container.metadata.get("comment") == _COMMENT
    except (av.FFmpegError, OSError):
        return False


def image_to_pixels(path: str | Path, width: int, height: int, *, crf: int = 0) -> Tensor:
    """The first picture of a file, resized and cropped to a size: (1, 3, 1, H, W) float32 in [-1, 1].

    crf: it is compressed with H.264 before that, as the model's training videos were; 0: not. Raises DataError if the
    file cannot be read.
    """
    try:
        with av.open(str(path)) as container:
            frame: Any = next(container.decode(video=0))
            if crf:
                from diffusers.pipelines.ltx2.utils import apply_image_conditioning_crf

                compressed = apply_image_conditioning_crf(frame.to_ndarray(format="rgb24"), crf)
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(compressed), "rgb24")
            picture = picture_to_bucket(frame, width, height)
    except (av.FFmpegError, OSError, StopIteration, IndexError) as error:
        raise DataError(f"{path} cannot be read as a picture ({error})") from error
    return torch.from_numpy(picture).permute(2, 0, 1)[None, :, None].float() / 127.5 - 1


def _video_stream(container: Any, pixels: Tensor, fps: float) -> Any:
    stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "16"})
    stream.height, stream.width = pixels.shape[1:3]
    stream.pix_fmt = "yuv420p"
    return stream


def _pictures(pixels: Tensor) -> Any:
    return (av.VideoFrame.from_ndarray(np.ascontiguousarray(p.numpy()), "rgb24") for p in pixels)


def _sound_stream(container: Any, sound: Sound) -> Any:
    layout = _layout(sound)
    if sound.original:
        stream = container.add_stream("flac", rate=sound.rate, layout=layout)
        stream.format = "s32"  # 24 bits, which hold every sample of a 16-bit recording
        return stream
    stream = container.add_stream("aac", rate=sound.rate, layout=layout)
    stream.bit_rate = 192_000
    return stream


def _layout(sound: Sound) -> str:
    return "mono" if sound.waveform.shape[0] == 1 else "stereo"


def _sound_frames(sound: Sound) -> Any:
    samples = np.ascontiguousarray(sound.waveform.numpy())
    frame = av.AudioFrame.from_ndarray(samples, "fltp", _layout(sound))
    if sound.original:
        whole = np.clip(np.round(samples.T.astype(np.float64) * 2**23), -(2**23), 2**23 - 1).astype(np.int32) << 8
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(whole.reshape(1, -1)), "s32", _layout(sound))
    frame.sample_rate, frame.pts, frame.time_base = sound.rate, 0, Fraction(1, sound.rate)
    return (frame,)
