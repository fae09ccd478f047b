"""safetensors files that hold the SHA-256 of their own content, so that a flipped bit in them is found.

The digest covers names, dtypes, shapes and bytes of the tensors and all other metadata. It lies in the metadata, which
readers of safetensors ignore. A mark beside it names the digest: a flipped bit in the digest's own name would otherwise
make the file look like one of another program, which has none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ltx_train.contracts import DataError

DIGEST = "content_sha256"
_MARK = "sealed_by"


def seal(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata with the mark and the digest of the content."""
    marked = {**metadata, _MARK: DIGEST}
    return {**marked, DIGEST: _digest(tensors, marked)}


def pack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a sealed file: the same for the same content, so that shards packed of them are the same too."""
    return _ordered(save(dict(tensors), seal(tensors, metadata)))


def unpack(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a sealed file's bytes. DataError, without the file's name, when they are damaged."""
    try:
        tensors, header = load(data), json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata: dict[str, Any] = dict(header.get("__metadata__", {}))
    except (SafetensorError, ValueError, AttributeError, TypeError) as error:
        raise DataError(f"not a readable safetensors file ({error})") from error
    if DIGEST not in metadata:
        raise DataError("it has no digest of its content")
    verify(tensors, metadata)
    return tensors, metadata


def _ordered(data: bytes) -> bytes:
    """A safetensors file with its metadata by name: safetensors writes them in another order every time."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]


def verify(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """DataError when the content does not have its digest. Files of other programs have none, and no mark."""
    if _MARK in metadata and DIGEST not in metadata:
        raise DataError("it has lost the digest of its content: the file is damaged")
    own = {name: value for name, value in metadata.items() if name != DIGEST}
    if DIGEST in metadata and metadata[DIGEST] != _digest(tensors, own):
        raise DataError("its content does not match its digest: the file is damaged")


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    ordered = sorted(tensors.items())
    described = [[name, str(tensor.dtype), list(tensor.shape)] for name, tensor in ordered]
    digest = hashlib.sha256(json.dumps([described, dict(metadata)], sort_keys=True).encode())
    for _, tensor in ordered:
        content: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(content)
    return digest.hexdigest()
