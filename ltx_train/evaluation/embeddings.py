"""Embeddings of voices and faces, by models that the user has: directions that a network trained on identities gives.

Owns what these models get and that their vectors have length 1. Both work on the CPU, because the device is the
transformer's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ltx_train.contracts import ConfigError, DataError
from ltx_train.data.footage import looking
from ltx_train.data.footage.listening import library
from ltx_train.model import mel

Vector = tuple[float, ...]
# Pictures of a clip that are searched for a face, and the side of an ArcFace network's input.
_PICTURES, _SIDE = 5, 112


class SpeakerModel:
    """A model of transformers with an x-vector head, as WavLM's for speaker verification: a folder or a name."""

    def __init__(self, name: str) -> None:
        from transformers import AutoFeatureExtractor, AutoModelForAudioXVector

        try:
            self._extractor: Any = AutoFeatureExtractor.from_pretrained(name)
            loaded: Any = AutoModelForAudioXVector.from_pretrained(name, use_safetensors=True, output_loading_info=True)
        except (OSError, ValueError) as error:
            raise ConfigError(f"swap.speaker_model={name} is no speaker model of transformers ({error})") from error
        self._model: Any = loaded[0].eval()
        missing = sorted(loaded[1]["missing_keys"])
        if missing:
            raise ConfigError(
                f"swap.speaker_model={name} has no x-vector head ({missing[0]} is missing): take a model for speaker "
                "verification, such as WavLM's"
            )

    @torch.no_grad()
    def of_sound(self, waveform: Tensor, rate: int) -> Vector:
        """waveform (channels, samples)."""
        wanted = int(self._extractor.sampling_rate)
        mono = mel.resample(waveform.float().mean(dim=0, keepdim=True).cpu(), rate, wanted)[0]
        inputs = self._extractor(mono.numpy(), sampling_rate=wanted, return_tensors="pt")
        return _unit(self._model(**inputs).embeddings[0].double().numpy())


class FaceModel:
    """An ArcFace network in a file (ONNX, 3x112x112 in, a vector out). Faces are found by OpenCV's cascades."""

    def __init__(self, path: str) -> None:
        runtime = library("onnxruntime")
        try:
            self._session: Any = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors have no common base
            raise DataError(f"swap.face_model={path} is no network that onnxruntime reads ({error})") from error
        self._input = self._session.get_inputs()[0].name

    def of_pictures(self, pixels: Tensor) -> Vector:
        """pixels (frames, height, width, 3) uint8. The mean over some pictures; empty where no face is seen."""
        chosen = np.linspace(0, len(pixels) - 1, min(_PICTURES, len(pixels))).round().astype(int)
        faces = [face for number in chosen if (face := _crop(pixels[int(number)].numpy())) is not None]
        if not faces:
            return ()
        seen = [self._session.run(None, {self._input: face})[0].ravel() for face in faces]
        return _unit(np.stack(seen).astype(np.float64).mean(axis=0))


def _crop(picture: NDArray[np.uint8]) -> NDArray[np.float32] | None:
    """The largest face as (1, 3, 112, 112) in [-1, 1], RGB."""
    box = looking.face(picture)
    if box is None:
        return None
    height, width = picture.shape[:2]
    left, top, right, bottom = (round(e * size) for e, size in zip(box, (width, height) * 2, strict=True))
    face = library("cv2").resize(picture[top:bottom, left:right], (_SIDE, _SIDE))
    return ((face.astype(np.float32) - 127.5) / 127.5).transpose(2, 0, 1)[None]


def _unit(vector: NDArray[np.float64]) -> Vector:
    length = float(np.linalg.norm(vector))
    return tuple((vector / length).tolist()) if length > 0 and np.isfinite(length) else ()
