"""The model: weights in the original layout, this project's forward pass, adapters, codecs and exports."""

from ltx_train.model.lean_imports import import_libraries

import_libraries()  # before other modules import them

from ltx_train.model.loaders import (  # noqa: E402
    load_audio_vae,
    load_text_connectors,
    load_transformer,
    load_video_vae,
    load_vocoder,
)

__all__ = ["load_audio_vae", "load_text_connectors", "load_transformer", "load_video_vae", "load_vocoder"]
