"""Where a run's model comes from: its tensors, its sizes, and its modules on the meta device. Opened once a process."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from ltx_train.config import Config
from ltx_train.model.checkpoint import CheckpointFile, RandomWeights, TensorSource
from ltx_train.model.loaders import TRANSFORMER_PREFIX, EncoderWeights, build_transformer, weights_of_encoders
from ltx_train.model.merged import MergedSource
from ltx_train.model.transformer import Transformer


def weights(config: Config) -> TensorSource:
    """The checkpoint file or seeded random numbers, with model.merge added."""
    model = config.model
    if model.weights == "random":
        source: TensorSource = RandomWeights(model.preset, model.seed)
    else:
        assert model.path is not None  # config.require has refused it
        source = _opened(model.path, _stamp(model.path))
    return source if model.merge is None else MergedSource.open(source, model.merge, model.merge_strength)


def layout(config: Config) -> TensorSource:
    """Where the sizes come from: the checkpoint if there is one, else the preset."""
    return weights(config) if config.model.path else RandomWeights(config.model.preset, config.model.seed)


def is_other_base(config: Config, metadata: Mapping[str, str]) -> bool:
    """Whether a LoRA file names another base than the configuration's; files of other trainers name none."""
    trained_on = metadata.get("base_fingerprint")
    return trained_on is not None and trained_on != weights(config).fingerprint(TRANSFORMER_PREFIX)


def skeleton(config: Config) -> Transformer:
    """The transformer on the meta device. It is shared: nobody may change it."""
    preset = config.model.preset
    path = config.model.path if config.model.weights == "file" else None
    return _skeleton(path, _stamp(path) if path else (0, 0), preset)


def encoder_weights(config: Config, dtype_bytes: int) -> EncoderWeights:
    """Bytes of the encoders' weights. Counted once: the search for what fits needs them for each candidate."""
    path = config.model.path if config.model.weights == "file" else None
    return _encoder_weights(path, _stamp(path) if path else (0, 0), config.model.preset, dtype_bytes)


@lru_cache(maxsize=4)
def _encoder_weights(path: str | None, stamp: tuple[int, int], preset: str, dtype_bytes: int) -> EncoderWeights:
    return weights_of_encoders(_opened(path, stamp) if path else RandomWeights(preset), dtype_bytes)


@lru_cache(maxsize=4)
def _skeleton(path: str | None, stamp: tuple[int, int], preset: str) -> Transformer:
    return build_transformer(_opened(path, stamp) if path else RandomWeights(preset))


@lru_cache(maxsize=4)
def _opened(path: str, _stamp: tuple[int, int]) -> CheckpointFile:
    return CheckpointFile.open(path)


def _stamp(path: str) -> tuple[int, int]:
    """Tells a file from another one that has taken its place."""
    try:
        status = Path(path).stat()
    except OSError:
        return (0, 0)
    return (status.st_mtime_ns, status.st_size)
