"""Outputs replace the files of ltx-train alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ltx_train.assembly.outputs import check_output
from ltx_train.config import Config, compose_config
from ltx_train.contracts import ConfigError
from ltx_train.model import export
from ltx_train.sampling import media
from tests.conftest import command


@pytest.fixture
def config() -> Config:
    return compose_config([])


def own_weights(path: Path) -> None:
    export.write(path, {"w": torch.zeros(2)}, {"trainer": export.TRAINER})


def own_clip(path: Path) -> None:
    media.write_mp4(path, torch.zeros(2, 32, 32, 3, dtype=torch.uint8), None, 24.0)


def own_records(path: Path) -> None:
    path.write_text(json.dumps([{"case": "x"}]))


@pytest.mark.parametrize(
    ("name", "write"), [("a.safetensors", own_weights), ("a.mp4", own_clip), ("a.json", own_records)]
)
def test_own_files_are_replaced(name: str, write, config: Config, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / name
    check_output(config, "x.out", str(path))
    write(path)
    check_output(config, "x.out", str(path))


def foreign_weights(path: Path) -> None:
    save_file({"w": torch.zeros(2)}, path)


@pytest.mark.parametrize("name", ["a.safetensors", "a.mp4", "a.json"])
@pytest.mark.parametrize("content", [b"", b"precious", b"{}", b'["x"]', None])
def test_other_files_are_kept_unless_the_user_permits_it(
    name: str, content: bytes | None, config: Config, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is None:
        foreign_weights(path)
    else:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"x\.out=.*ltx-train did not write it.*run\.overwrite=true"):
        check_output(config, "x.out", str(path))
    check_output(compose_config(["run.overwrite=true"]), "x.out", str(path))


def test_a_folder_is_no_output(config: Config, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        check_output(config, "sample.out", str(tmp_path / "a.mp4"))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("sample", "sample.out="), "a.mp4"),
        (("export", "export.out="), "a.safetensors"),
        (("bench", "bench.out="), "a.json"),
    ],
)
def test_commands_refuse_before_any_work(
    arguments: tuple[str, str], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    path.write_bytes(b"precious")
    more = ("model.weights=random", "strategy.device=cpu", f"run.root={tmp_path}", "data.root=x", "sample.prompt=x")
    assert command(arguments[0], *more, f"{arguments[1]}{path}") == 77
    assert "ltx-train did not write it" in capsys.readouterr().err
    assert path.read_bytes() == b"precious"
