"""The index of a prepared folder: its samples, the location of their bytes, and their sources.

Owns `index.safetensors`: the samples' records by column, and everything else as JSON in its metadata. It imports no
torch, because reading an index must be instant.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save as save_arrays

from ltx_train import durable
from ltx_train.contracts import DataError
from ltx_train.data.columns import Columns, Rows
from ltx_train.data.record import Record

# 5: by column, and the text contexts in the shards.
SCHEMA = 5
INDEX_NAME = "index.safetensors"
TRAIN, HELDOUT = "train", "heldout"
# One value in the metadata: safetensors writes several in another order every time.
_ABOUT = "index"
_DTYPES = {"F64": np.float64, "I64": np.int64, "U32": np.uint32, "U8": np.uint8, "BOOL": np.bool_}
_BLOCK = 8 * 2**20


@dataclass(frozen=True, slots=True)
class Shard:
    name: str
    size: int
    sha256: str
    count: int


@dataclass(frozen=True, kw_only=True)
class Index:
    """The content of a prepared folder.

    settings, encoders: what the latents depend on. The folder is stale when they differ from the run's.
    """

    settings: Mapping[str, Any]
    encoders: Mapping[str, str]
    shards: tuple[Shard, ...]
    records: Rows
    quarantined: Mapping[str, str] = field(default_factory=dict[str, str])

    def split(self, name: str) -> Rows:
        return self.records.where("split", name)

    @cached_property
    def by_clip(self) -> bool:
        """Whether recordings of the same people are held out, not people."""
        return bool({*self.split(HELDOUT).distinct("speaker")} & {*self.split(TRAIN).distinct("speaker")})

    def unit(self, record: Record) -> str:
        """What counts once in intervals: the identity, or the recording where those are held out."""
        return record.recording if self.by_clip else record.speaker


def save(index: Index, root: Path) -> None:
    """Writes the index atomically. `prepare` writes it last, so a folder with an index is complete."""
    arrays = {name: np.ascontiguousarray(array) for name, array in index.records.columns.arrays.items()}
    facts = {field.name: getattr(index, field.name) for field in fields(index) if field.name != "records"}
    facts["shards"] = [asdict(shard) for shard in index.shards]
    described, data = _parts(save_arrays(arrays))
    digest = hashlib.sha256(_text([SCHEMA, facts, described]).encode())
    digest.update(data)
    about = _text({"schema": SCHEMA, "sha256": digest.hexdigest(), **facts})
    durable.write(root / INDEX_NAME, save_arrays(arrays, {_ABOUT: about}))


def load(root: str | Path) -> Index:
    """Reads the index of a prepared folder. Its columns stay in the file, and are mapped from it.

    DataError when the folder is not completely prepared, or when its index is damaged or from another release.
    """
    path = Path(root) / INDEX_NAME
    if not path.is_file():
        raise DataError(f"no prepared data at {root}: run `ltx-train prepare` with the same data settings first")
    try:
        with path.open("rb") as file:
            header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            facts = json.loads(header.pop("__metadata__")[_ABOUT])
            if facts.pop("schema") != SCHEMA:
                raise DataError(f"{path} was written by another release: run `ltx-train prepare` again")
            start, expected = file.tell(), facts.pop("sha256")
            digest = hashlib.sha256(_text([SCHEMA, facts, header]).encode())
            while block := file.read(_BLOCK):
                digest.update(block)
        if digest.hexdigest() != expected:
            raise ValueError("its content does not match its digest")
        shards = tuple(_shard(**shard) for shard in facts.pop("shards"))
        return Index(**facts, shards=shards, records=Rows(Columns(_mapped(path, start, header))))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError, MemoryError) as error:
        raise DataError(f"{path} is damaged ({error}): run `ltx-train prepare` again") from error


def _mapped(path: Path, start: int, header: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """The arrays of a safetensors file whose data begin at `start`."""
    whole = np.memmap(path, np.uint8, "r", offset=0) if header else np.zeros(0, np.uint8)
    found: dict[str, NDArray[Any]] = {}
    for name, about in header.items():
        first, end = about["data_offsets"]
        found[name] = whole[start + first : start + end].view(_DTYPES[about["dtype"]]).reshape(about["shape"])
    return found


def _parts(file: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    end = 8 + int.from_bytes(file[:8], "little")
    return json.loads(file[8:end]), file[end:]


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _shard(**values: Any) -> Shard:
    """ValueError for a name that is no plain name of a file."""
    shard = Shard(**values)
    if "/" in shard.name or not shard.name.isprintable():
        raise ValueError(f"the name {shard.name!r}")
    return shard


def stale_reasons(index: Index, settings: Mapping[str, Any], encoders: Mapping[str, str]) -> list[str]:
    """Every difference between the settings and encoders of the latents and those of the run, as text."""
    pairs = [("data." + k, index.settings.get(k), v) for k, v in settings.items()]
    pairs += [(f"the {k}", index.encoders.get(k), v) for k, v in encoders.items()]
    return [f"{name} was {old!r}, now {new!r}" for name, old, new in pairs if old != new]
