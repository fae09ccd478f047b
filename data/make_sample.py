"""Makes data/sample again: short clips of synthetic speakers, drawn and sung by this file alone.

    python data/make_sample.py [folder]

Every speaker has a pitch, a timbre (formants, tilt) and a face of its own; every clip has its own
syllables; the mouth opens with the loudness of the voice. Nothing is recorded from anyone.
"""

from __future__ import annotations

import colorsys
import json
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

SPEAKERS, CLIPS = 40, 2
RATE, FPS, FRAMES, SIZE = 48000, 25, 36, 64
SAMPLES = RATE * FRAMES // FPS
Array = NDArray[np.float64]


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "sample")
    folder.mkdir(parents=True, exist_ok=True)
    captions: list[dict[str, str]] = []
    for speaker in range(SPEAKERS):
        for clip in range(CLIPS):
            name = f"speaker{speaker:02d}_{clip}.mp4"
            voice, face = np.random.default_rng([7, speaker]), np.random.default_rng([8, speaker])
            loudness = syllables(np.random.default_rng([9, speaker, clip]))
            write(folder / name, frames(face, loudness), speech(voice, loudness))
            caption = "[VISUAL] a drawn face looks ahead. [SPEECH] the face hums a few syllables."
            captions.append({"file": name, "caption": caption, "speaker": f"speaker{speaker:02d}"})
    (folder / "CAPTIONS.json").write_text(json.dumps({"captions": captions}, indent=1) + "\n")


def syllables(rng: np.random.Generator) -> Array:
    """Loudness (SAMPLES,) in [0, 1]: bumps of 0.12 to 0.3 s with short gaps."""
    loudness = np.zeros(SAMPLES)
    start = int(rng.uniform(0, 0.08) * RATE)
    while start < SAMPLES:
        length = int(rng.uniform(0.12, 0.3) * RATE)
        bump = np.hanning(length)[: SAMPLES - start] ** 0.7 * rng.uniform(0.6, 1.0)
        loudness[start : start + length] = bump
        start += length + int(rng.uniform(0.01, 0.06) * RATE)
    return loudness


def speech(voice: np.random.Generator, loudness: Array) -> Array:
    """A voiced hum (SAMPLES,): harmonics of the speaker's pitch under the speaker's formants."""
    pitch = 90 * 3.3 ** voice.uniform()
    formants = np.array([voice.uniform(300, 900), voice.uniform(1000, 2300), voice.uniform(2500, 4500)])
    widths, gains = voice.uniform(80, 250, 3), voice.uniform(0.3, 1.0, 3)
    tilt = voice.uniform(0.3, 1.4)
    glide = pitch * (1 + 0.06 * (loudness - 0.5))
    phase = 2 * np.pi * np.cumsum(glide) / RATE
    total = np.zeros(SAMPLES)
    for harmonic in range(1, int(7800 / pitch)):
        hz = harmonic * pitch
        peak = (gains * np.exp(-(((hz - formants) / widths) ** 2) / 2)).sum()
        total += (0.05 + peak) * harmonic**-tilt * np.sin(harmonic * phase)
    return 0.5 * total / np.abs(total).max() * loudness


def frames(face: np.random.Generator, loudness: Array) -> list[NDArray[np.uint8]]:
    """FRAMES pictures (SIZE, SIZE, 3): a head with eyes, and a mouth as open as the sound is loud."""
    background = np.full(3, 200.0)
    skin = np.array([240.0, 190.0, 150.0]) * face.uniform(0.35, 1.0)
    hair = 255 * np.array(colorsys.hsv_to_rgb(face.uniform(), 0.8, 0.7))
    width, height = face.uniform(0.5, 0.8), face.uniform(0.65, 0.95)
    eyes, mouth_width = face.uniform(0.16, 0.3), face.uniform(0.15, 0.35)
    y, x = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j]
    head = (x / width) ** 2 + (y / height) ** 2 < 1
    pupils = ((np.abs(x) - eyes) ** 2 + (y + 0.2) ** 2) < 0.008
    pictures: list[NDArray[np.uint8]] = []
    for index in range(FRAMES):
        opening = 0.03 + 0.25 * loudness[index * RATE // FPS : (index + 1) * RATE // FPS].mean()
        mouth = (x / mouth_width) ** 2 + ((y - 0.4) / opening) ** 2 < 1
        picture = np.where(head[..., None], skin, background)
        picture = np.where((head & (y < -0.45))[..., None], hair, picture)
        picture = np.where(pupils[..., None], 15.0, picture)
        pictures.append(np.where((mouth & head)[..., None], (120.0, 20.0, 30.0), picture).astype(np.uint8))
    return pictures


def write(path: Path, pictures: list[NDArray[np.uint8]], waveform: Array) -> None:
    """An mp4 with H.264 video and mono AAC sound."""
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        video: Any = container.add_stream("libx264", rate=FPS, options={"crf": "35", "preset": "slow"})
        video.width = video.height = SIZE
        video.pix_fmt = "yuv420p"
        audio: Any = container.add_stream("aac", rate=RATE, layout="mono")
        audio.bit_rate = 24000
        for picture in pictures:
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(video.encode())
        sound = av.AudioFrame.from_ndarray(waveform.astype(np.float32)[None], "fltp", "mono")
        sound.sample_rate, sound.pts, sound.time_base = RATE, 0, Fraction(1, RATE)
        container.mux(audio.encode(sound))
        container.mux(audio.encode())


if __name__ == "__main__":
    main()
