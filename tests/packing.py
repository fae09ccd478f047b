"""Prepared folders with other tensors than `prepare` wrote."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from ltx_train.data import index
from ltx_train.data.columns import Rows
from ltx_train.data.index import Index
from ltx_train.data.prepare import pack
from ltx_train.data.record import Record


def repacked(root: Path, tensors: Callable[[Record], Mapping[str, Tensor]]) -> Index:
    """The index of a prepared folder whose samples were packed again with other tensors."""
    found = index.load(root)
    sources = pack.Sources(
        item=lambda record: save({name: tensor.contiguous() for name, tensor in tensors(record).items()}),
        context=lambda digest: (root / "contexts" / f"{digest}.safetensors").read_bytes(),
        dropped=found.records[0].context,
    )
    shards, placed = pack.write_shards(found.records, sources, root / "shards", 256)
    made = replace(found, shards=tuple(shards), records=Rows.of(placed))
    index.save(made, root)
    return made
