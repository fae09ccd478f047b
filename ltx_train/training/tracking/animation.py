"""A clip as TensorBoard shows it: moving pictures as a GIF, sound as a WAV file.

Owns the conversion. Knows no tracker's files.
"""

from __future__ import annotations

import io
import wave
from pathlib import Path
from typing import Any

import av
import numpy as np

from ltx_train.contracts import Clip

# A GIF has no prediction between pictures: more and larger ones would make event files of many megabytes.
_EVERY, _WIDEST = 2, 320


def summary(clip: Clip) -> Any:
    """A tensorboard Summary with the pictures and the sound of a clip, as far as it has them."""
    from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

    name = clip.place or clip.path.stem
    made = Summary()
    with av.open(str(clip.path)) as container:
        if container.streams.video:
            width, height, data = _gif(container)
            shown = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
            made.value.add(tag=f"samples/{name}", image=shown)
    sound = _wav(clip.path)
    if sound is not None:
        made.value.add(tag=f"samples/{name}/sound", audio=sound)
    return made


def _gif(container: Any) -> tuple[int, int, bytes]:
    """Width, height and bytes of the pictures of a clip, every second one."""
    stream = container.streams.video[0]
    scale = min(1.0, _WIDEST / stream.width)
    width, height = (max(2, round(side * scale)) for side in (stream.width, stream.height))
    buffer, rate = io.BytesIO(), stream.average_rate / _EVERY
    with av.open(buffer, "w", format="gif") as output:
        made: Any = output.add_stream("gif", rate=rate)
        made.width, made.height, made.pix_fmt = width, height, "rgb8"
        for number, frame in enumerate(container.decode(video=0)):
            if number % _EVERY == 0:
                picture = frame.reformat(width, height, "rgb8")
                picture.pts, picture.time_base = number // _EVERY, 1 / rate
                output.mux(made.encode(picture))
        output.mux(made.encode())
    return width, height, buffer.getvalue()


def _wav(path: Path) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

    with av.open(str(path)) as container:
        if not container.streams.audio:
            return None
        frames = [frame.to_ndarray() for frame in container.decode(audio=0)]
        rate = container.streams.audio[0].rate
    samples = (np.concatenate(frames, axis=-1).clip(-1, 1) * 32767).astype("<i2")
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(samples.shape[0])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.T.tobytes())
    return Summary.Audio(
        sample_rate=rate, num_channels=samples.shape[0], length_frames=samples.shape[1],
        encoded_audio_string=buffer.getvalue(), content_type="audio/wav",
    )  # fmt: skip
