"""Arithmetic on LoRA files: strengths by stream, splitting, merging, resizing and extraction.

Owns these changes of A and B. Pure; knows no files. All tensors are named as `lora_file.read_lora` returns them, with
a scale of 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor

from ltx_train import rng
from ltx_train.contracts import DataError
from ltx_train.model.lora_file import DORA, merged_weight, module_of

Tensors = Mapping[str, Tensor]
_BRIDGES = ("audio_to_video_attn", "video_to_audio_attn")
# Singular values below this share of the largest are rounding.
_NOTHING = 1e-7
# Of the random projection: directions beside those that are kept, and power iterations.
_SPARE, _POWERS = 16, 4


class Stream(StrEnum):
    """Where a layer works: on the video, on the audio, or between them."""

    video = "video"
    audio = "audio"
    bridge = "bridge"


def stream_of(module: str) -> Stream:
    """Layers outside the blocks belong to the modality that their name begins with."""
    parts = module.split(".")
    part = parts[2] if parts[0] == "transformer_blocks" and len(parts) > 2 else parts[0]
    if part in _BRIDGES or part.startswith("av_"):
        return Stream.bridge
    return Stream.audio if part.startswith("audio_") else Stream.video


def scaled(tensors: Tensors, strengths: Mapping[Stream, float]) -> dict[str, Tensor]:
    """B times the strength of its stream, 1 where none is given. Layers of strength 0 are left out.

    DataError for DoRA's magnitudes at strengths between: they are no multiple of anything.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module = module_of(name)
        strength = strengths.get(stream_of(module), 1.0)
        if strength == 0:
            continue
        if strength != 1 and f"{module}.{DORA}" in tensors:
            raise DataError(f"{module} has DoRA's magnitudes, which have no strength but 0 and 1 (lora.do=plain)")
        found[name] = (tensor.float() * strength).to(tensor.dtype) if ".lora_B." in name else tensor
    return found


def split(tensors: Tensors) -> dict[Stream, dict[str, Tensor]]:
    """The tensors of each stream; streams without any are left out."""
    parts: dict[Stream, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parts.setdefault(stream_of(module_of(name)), {})[name] = tensor
    return parts


def merged(files: Sequence[tuple[Tensors, float]]) -> dict[str, Tensor]:
    """One adapter with the sum of all products, each times its strength: ranks add up, nothing is rounded away."""
    _refuse_magnitudes(tensors for tensors, _ in files)
    found: dict[str, Tensor] = {}
    for module in sorted({module for tensors, _ in files for module in _modules(tensors)}):
        pairs = [(*_pair(tensors, module), strength) for tensors, strength in files if module in set(_modules(tensors))]
        downs, ups = zip(*((a, b.float() * strength) for a, b, strength in pairs), strict=True)
        dtype = pairs[0][0].dtype
        found |= _named(module, torch.cat([a.float() for a in downs]).to(dtype), torch.cat(ups, dim=1).to(dtype))
    return found


def resized(tensors: Tensors, rank: int) -> tuple[dict[str, Tensor], float]:
    """The nearest adapter of a rank in Frobenius norm, by SVD of each product, and the share of the norm that is lost.

    The product is never formed: B A = Q_b R_b R_a^T Q_a^T, and the middle is as small as the rank.
    """
    _refuse_magnitudes([tensors])
    found: dict[str, Tensor] = {}
    kept = whole = 0.0
    for module in _modules(tensors):
        a, b = _pair(tensors, module)
        q_b, r_b = torch.linalg.qr(b.double())
        q_a, r_a = torch.linalg.qr(a.double().T)
        u, s, v = torch.linalg.svd(r_b @ r_a.T)
        found |= _factors(module, _Svd(q_b @ u, s, v @ q_a.T), rank, a.dtype)
        whole, kept = whole + float(s.square().sum()), kept + float(s[:rank].square().sum())
    return found, (max(0.0, 1 - kept / whole)) ** 0.5 if whole else 0.0


def extracted(
    pairs: Iterable[tuple[str, Tensor, Tensor]], rank: int, dtype: torch.dtype
) -> tuple[dict[str, Tensor], float]:
    """An adapter of the difference between tuned and base weights (module, base, tuned), and the share of its norm that
    a rank loses. Layers that are equal are left out."""
    found: dict[str, Tensor] = {}
    kept = whole = 0.0
    for module, base, tuned in pairs:
        difference = tuned.float() - base.float()
        if not bool(difference.any()):
            continue
        svd = _largest(difference, rank, module)
        found |= _factors(module, svd, rank, dtype)
        whole, kept = whole + float(difference.double().square().sum()), kept + float(svd.s[:rank].square().sum())
    if not found:
        raise DataError("the checkpoints do not differ in any linear layer: there is nothing to extract")
    return found, max(0.0, 1 - kept / whole) ** 0.5


def plain(tensors: Tensors, weights: Mapping[str, Tensor], rank: int) -> tuple[dict[str, Tensor], float]:
    """A file with DoRA's magnitudes as a low-rank file, which every loader applies: the nearest of a rank to what the
    magnitudes make of the base's weights, and the share of the norm that is lost. weights: the base's, by module."""
    changed = ((m, weights[m], merged_weight(weights[m].float(), tensors, m, 1.0)) for m in _modules(tensors))
    dtype = next(iter(tensors.values())).dtype
    return extracted(changed, rank, dtype)


def norms(tensors: Tensors) -> dict[str, float]:
    """Frobenius norm of the product of every module, without forming it: |B A|^2 = sum((A A^T) * (B^T B))."""
    return {module: _inner(tensors, tensors, module) ** 0.5 for module in _modules(tensors)}


def norms_by_block(tensors: Tensors) -> dict[Stream, dict[int, float]]:
    """The norm of the changes of a block's layers together, by stream and block. Layers outside the blocks are left
    out."""
    squares: dict[Stream, dict[int, float]] = {}
    for module, norm in norms(tensors).items():
        place, _, rest = module.partition(".")
        if place == "transformer_blocks":
            blocks = squares.setdefault(stream_of(module), {})
            block = int(rest.partition(".")[0])
            blocks[block] = blocks.get(block, 0.0) + norm**2
    return {
        stream: {block: blocks[block] ** 0.5 for block in sorted(blocks)}
        for stream in Stream if (blocks := squares.get(stream))
    }  # fmt: skip


def likeness(first: Tensors, second: Tensors) -> dict[Stream, float]:
    """Cosine between the changes of two files by stream: 1 for the same direction, 0 for unrelated ones. A module that
    one of them lacks counts as zero there."""
    found: dict[Stream, float] = {}
    for stream in Stream:
        parts = [{m for m in _modules(tensors) if stream_of(m) is stream} for tensors in (first, second)]
        shared = sum(_inner(first, second, module) for module in parts[0] & parts[1])
        lengths = [sum(_inner(t, t, m) for m in some) for t, some in ((first, parts[0]), (second, parts[1]))]
        if all(lengths):
            found[stream] = shared / (lengths[0] * lengths[1]) ** 0.5
    return found


def _inner(first: Tensors, second: Tensors, module: str) -> float:
    """The inner product of B A of both files: sum((A1 A2^T) * (B1^T B2))."""
    (a, b), (c, d) = _pair(first, module), _pair(second, module)
    return float(((a.double() @ c.double().T) * (b.double().T @ d.double())).sum())


def _modules(tensors: Tensors) -> Iterator[str]:
    yield from (name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight"))


def _pair(tensors: Tensors, module: str) -> tuple[Tensor, Tensor]:
    up = f"{module}.lora_B.weight"
    if up not in tensors:
        raise DataError(f"{module} has no lora_B: the file is no whole LoRA")
    return tensors[f"{module}.lora_A.weight"], tensors[up]


def _named(module: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    return {f"{module}.lora_A.weight": down.contiguous(), f"{module}.lora_B.weight": up.contiguous()}


class _Svd(NamedTuple):
    """u (out, k), s (k,) falling, v (k, in)."""

    u: Tensor
    s: Tensor
    v: Tensor


def _largest(matrix: Tensor, rank: int, module: str) -> _Svd:
    """The largest singular values of a matrix, and some more. Of a large matrix by random projection with power
    iterations (Halko, Martinsson and Tropp 2011, algorithm 4.4)."""
    count = min(rank + _SPARE, *matrix.shape)
    if count * 4 > min(matrix.shape):
        return _Svd(*torch.linalg.svd(matrix.double(), full_matrices=False))
    basis = torch.linalg.qr(matrix @ rng.normal((matrix.shape[1], count), 0, "lora/extract", module)).Q
    for _ in range(_POWERS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    u, s, v = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return _Svd((basis @ u).double(), s.double(), v.double())


def _factors(module: str, svd: _Svd, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Both factors get the root of the singular values, so that neither has numbers much larger than the other."""
    count = max(1, min(rank, int((svd.s > _NOTHING * svd.s[0]).sum())))
    root = svd.s[:count].sqrt()
    return _named(module, (root[:, None] * svd.v[:count]).to(dtype), (svd.u[:, :count] * root).to(dtype))


def _refuse_magnitudes(files: Iterable[Tensors]) -> None:
    if any(name.endswith(DORA) for tensors in files for name in tensors):
        raise DataError("DoRA's magnitudes are no low-rank product: make the file plain first (lora.do=plain)")
