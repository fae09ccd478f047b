"""Scenes and speech of a recording, by PySceneDetect and Silero VAD (the extra `cut`)."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import av

from ltx_train.contracts import ConfigError, DataError
from ltx_train.data.footage.pieces import Span
from ltx_train.data.prepare.sound import read_audio
from ltx_train.model import mel

_RATE = 16000


def scenes(path: Path, seconds: float) -> list[Span]:
    """The scenes of a video, in order; the whole video when it has one."""
    detector = library("scenedetect")
    level = av.logging.get_level()
    try:
        video = detector.open_video(str(path), backend="pyav")
        manager = detector.SceneManager()
        # Compares with the frames around: fast motion is no cut.
        manager.add_detector(detector.AdaptiveDetector())
        manager.detect_scenes(video)
        found: list[Any] = manager.get_scene_list()
    except (detector.VideoOpenFailure, OSError) as error:
        raise DataError(f"{path} cannot be decoded ({error})") from error
    finally:
        av.logging.set_level(level)  # the library makes ffmpeg talk
    spans = [Span(start.seconds, end.seconds) for start, end in found]
    return spans or [Span(0.0, seconds)]


def speech(path: Path) -> list[Span] | None:
    """When somebody speaks, in order; None when the recording has no sound."""
    vad = library("silero_vad")
    waveform, rate = read_audio(path)
    if waveform is None:
        return None
    mono = mel.resample(waveform.mean(dim=0, keepdim=True), rate)[0]
    found = vad.get_speech_timestamps(
        mono, vad.load_silero_vad(), sampling_rate=_RATE, return_seconds=True, time_resolution=3
    )
    return [Span(float(entry["start"]), float(entry["end"])) for entry in found]


def library(name: str) -> Any:
    """A library of the extra `cut`. ConfigError without it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"`cut` needs {name} ({error}): pip install 'ltx-train[cut]'") from error
