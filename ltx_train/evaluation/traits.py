"""What a generated clip has of a person: pitch, voiced share, spectrum, and embeddings of voice and face.

Owns the measuring of one sound. librosa does the work (probabilistic YIN, Mauch and Dixon 2014); it is an extra,
because nothing else needs it. Embeddings are made in `embeddings`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ltx_train.contracts import UserError

# Speech, sung and spoken, and a frame that holds three periods of the lowest.
_LOWEST_HZ, _HIGHEST_HZ, _FRAME_S = 60.0, 600.0, 0.064
_BANDS, _FLOOR = 40, 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """semitones: median pitch over voiced frames, above 1 Hz; nan without any. voiced: their share. spectrum: mean
    log-mel energies (40,), without their common level. mel: those of all frames, flat. speaker, face: embeddings of
    length 1; empty where there is no model, or no face."""

    semitones: float
    voiced: float
    spectrum: tuple[float, ...]
    mel: tuple[float, ...] = ()
    speaker: tuple[float, ...] = ()
    face: tuple[float, ...] = ()


def of_sound(waveform: Tensor, rate: int) -> Traits:
    """waveform (channels, samples). UserError without librosa."""
    librosa: Any = library()
    mono = waveform.float().mean(dim=0).cpu().numpy()
    length = 1 << int(np.ceil(np.log2(_FRAME_S * rate)))
    pitch, flags, _ = librosa.pyin(mono, fmin=_LOWEST_HZ, fmax=_HIGHEST_HZ, sr=rate, frame_length=length)
    known = pitch[np.isfinite(pitch)]
    energies = librosa.feature.melspectrogram(y=mono, sr=rate, n_mels=_BANDS, power=2.0)
    spectrum = np.log(energies.mean(axis=1) + _FLOOR)
    spectrum = spectrum - spectrum.mean()
    semitones = float(12 * np.log2(np.median(known))) if len(known) else float("nan")
    mel = np.log(energies + _FLOOR).ravel()
    return Traits(
        semitones=semitones, voiced=float(flags.mean()), spectrum=tuple(spectrum.tolist()), mel=tuple(mel.tolist())
    )  # fmt: skip


def library() -> Any:
    """librosa; UserError names how to get it."""
    try:
        import librosa
    except ImportError as error:
        raise UserError("the swap test measures voices with librosa: pip install 'ltx-train[swap]'") from error
    return librosa
