"""Files that hold their own digest: no single flipped bit in their header is used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ltx_train.contracts import DataError
from ltx_train.model import lora_file, sealed

TENSORS = {"a.lora_A.weight": torch.ones(1, 4), "a.lora_B.weight": torch.ones(4, 1)}


def test_every_flipped_bit_of_a_header_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(TENSORS, path, sealed.seal(TENSORS, {"format": "pt", "step": "2"}))
    whole, (tensors, metadata) = path.read_bytes(), lora_file.read_lora(path)
    refused = 0
    for place in range(8, 8 + int.from_bytes(whole[:8], "little")):
        for bit in range(8):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            try:
                read, described = lora_file.read_lora(path)
            except DataError:
                refused += 1
                continue
            assert described == metadata, (place, bit)
            assert read.keys() == tensors.keys()
            assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert refused > 2000


def test_files_of_other_programs_and_of_earlier_releases_have_no_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(TENSORS, path, {"format": "pt"})
    assert lora_file.read_lora(path)[1] == {"format": "pt"}
    save_file(TENSORS, path, {"format": "pt", sealed.DIGEST: "0" * 64})
    with pytest.raises(DataError, match="does not match its digest"):
        lora_file.read_lora(path)
