"""The latent upsampler, which doubles width and height of a video's latents between the stages of a generation.

Owns reading its file, in the original layout or of diffusers, and the normalization around it. The network is that of
diffusers. It must not know how the latents were made.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ltx_train.contracts import DataError
from ltx_train.model.checkpoint import TensorSource

if TYPE_CHECKING:
    from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel

_STATISTICS = "vae.per_channel_statistics."
_FIRST, _RESAMPLER, _PLAIN = "initial_conv.weight", "upsampler.conv.weight", "upsampler.0.weight"
# A doubled picture has four pixels for one, each with all channels.
_PIXELS = 4


def load(path: str | Path, *, device: torch.device, dtype: torch.dtype) -> LTX2LatentUpsamplerModel:
    """The upsampler in a file. Its sizes come from the tensors, because files of the original layout and of diffusers
    describe them differently. DataError for a file that is none, or that does not double width and height alone."""
    from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel

    tensors = _read(Path(path))
    with torch.device("meta"):
        model: Any = LTX2LatentUpsamplerModel(**_sizes(Path(path), {name: t.shape for name, t in tensors.items()}))
    # A constant of the resampler that thins out; for a factor of 2 it does nothing, and not every file has it.
    tensors.setdefault("upsampler.blur_down.kernel", torch.zeros(1, 1, 5, 5))
    expected = model.state_dict()
    wrong = sorted(n for n, t in expected.items() if n not in tensors or tensors[n].shape != t.shape)
    if wrong:
        raise DataError(f"{path} is no whole latent upsampler: {len(wrong)} tensors do not fit (first: {wrong[0]})")
    model.load_state_dict({name: tensors[name] for name in expected}, assign=True)
    return model.to(device, dtype).requires_grad_(False).eval()


@torch.no_grad()
def doubled(upsampler: LTX2LatentUpsamplerModel, latents: Tensor, source: TensorSource) -> Tensor:
    """Normalized latents (C, F, H, W) of a video -> normalized latents (C, F, 2 H, 2 W), float32 on the device of the
    input. The upsampler works on latents that are not normalized. source: the checkpoint, for the channel statistics.
    """
    mean, std = (_statistic(source, name, latents.shape[0]) for name in ("mean-of-means", "std-of-means"))
    raw = latents.float() * std.to(latents.device) + mean.to(latents.device)
    made = upsampler(raw[None].to(upsampler.device, upsampler.dtype))[0].to(latents.device, torch.float32)
    return (made - mean.to(latents.device)) / std.to(latents.device)


def _statistic(source: TensorSource, name: str, channels: int) -> Tensor:
    return source.read(_STATISTICS + name, (channels,), torch.device("cpu")).float().view(-1, 1, 1, 1)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is not a readable safetensors file ({error}): download it again") from error


def _sizes(path: Path, shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    """The arguments of diffusers' class."""
    first, resampler = shapes.get(_FIRST), shapes.get(_RESAMPLER) or shapes.get(_PLAIN)
    if first is None or resampler is None:
        raise DataError(f"{path} is no latent upsampler: it lacks {_FIRST if first is None else _RESAMPLER}")
    if len(resampler) != 4 or resampler[0] != _PIXELS * resampler[1]:
        raise DataError(f"{path} does not double width and height alone: take the spatial upscaler x2 of the model")
    names = {name.split(".")[1] for name in shapes if name.startswith("res_blocks.")}
    return {
        "in_channels": first[1], "mid_channels": first[0], "num_blocks_per_stage": len(names), "dims": len(first) - 2,
        "spatial_upsample": True, "temporal_upsample": False, "use_rational_resampler": _RESAMPLER in shapes,
    }  # fmt: skip
