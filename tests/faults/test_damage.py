"""Single flipped bits and cut files, in every kind of file that a run reads.

Each file is damaged, used and restored in this process. Damage is refused by an error for the user, or harmless: what
is read equals what was written. Logs may lose rows, never change one.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ltx_train import config, durable
from ltx_train.assembly import saved_run
from ltx_train.contracts import UserError
from ltx_train.data import index
from ltx_train.data.order import Address
from ltx_train.data.prepare import items
from ltx_train.data.reader import Reader
from ltx_train.model.lora_file import read_lora
from ltx_train.training.checkpoints import commit
from tests.conftest import command
from tests.faults.test_resume import fit

FLIPS, CUTS = 2000, 500
Use = Callable[[], Any]


@pytest.fixture(scope="module")
def data(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("damage") / "data"
    shutil.copytree(prepared, root)
    return root


@pytest.fixture(scope="module")
def run(prepared: Path, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    arguments = fit(prepared, clips, runs, "optim.steps=4", "eval.interval=2", "checkpoint.interval=2")
    assert command(*arguments, "optim.schedule=constant") == 0
    return runs / "audio_reference" / "main"


def uses(data: Path, run: Path) -> dict[Path, Use]:
    """What reads each file, by file."""
    loaded = index.load(data)
    by_item = {record.item: record for record in loaded.records}
    checkpoint = commit.committed(run / "checkpoints")[-1]

    def sample(key: str) -> Use:
        return lambda: Reader(data, index.load(data), seed=0).sample(Address(key, 0))

    whole: dict[Path, Use] = {
        data / "index.safetensors": lambda: index.load(data),
        data / "config.yaml": lambda: config.load(data / "config.yaml"),
        run / "config.yaml": lambda: config.load(run / "config.yaml"),
        run / "metrics.jsonl": lambda: durable.read_lines(run / "metrics.jsonl"),
        run / "heldout.jsonl": lambda: durable.read_lines(run / "heldout.jsonl"),
    }
    for name, record in list(by_item.items())[:3]:
        item = data / "items" / f"{name}.safetensors"
        whole[item] = lambda item=item: items.verified(item)
        whole[data / "contexts" / f"{record.context}.safetensors"] = sample(record.key)
    for path in (run / "adapters").glob("step-*.safetensors"):
        whole[path] = lambda path=path: read_lora(path)
    for path in checkpoint.iterdir():
        whole[path] = lambda: _checkpoint(run)
    return whole


def _checkpoint(run: Path) -> Any:
    """The newest usable checkpoint, as `fit` takes it; a manifest that is damaged leaves the one before it."""
    path = commit.committed(run / "checkpoints")[-1]
    loaded = commit.load(path)
    return {"step": loaded.step, "weights": loaded.weights, "optimizer": loaded.optimizer, "notes": loaded.notes,
            "settings": config.flat(saved_run.settings_of(run, path))}  # fmt: skip


def same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    if hasattr(first, "__dataclass_fields__"):
        return all(same(getattr(first, name), getattr(second, name)) for name in first.__dataclass_fields__)
    return bool(first == second)


def harmless(expected: Any, read: Any, path: Path) -> bool:
    if path.suffix == ".jsonl":
        return all(any(same(row, other) for other in expected) for row in read)
    if path.parent.name == "items":
        return read is None or same(expected, read)  # None: it is encoded again
    if path.parent.parent.name == "checkpoints" and read["step"] < expected["step"]:
        return True  # the checkpoint before it
    return same(expected, read)


@pytest.mark.slow
def test_no_flipped_bit_and_no_cut_is_used(data: Path, run: Path) -> None:
    chance, wrong = random.Random(7), list[str]()
    whole = {path: (use, use(), path.read_bytes()) for path, use in uses(data, run).items()}
    assert {p.name for p in whole} >= {
        "index.safetensors",
        "manifest.json",
        "state.json",
        "config.yaml",
        "weights.safetensors",
    }
    outcomes = {"refused": 0, "harmless": 0}
    for number in range(FLIPS + CUTS):
        path = chance.choice(list(whole))
        use, expected, content = whole[path]
        place = chance.randrange(len(content))
        flipped = bytes([content[place] ^ 1 << chance.randrange(8)])
        path.write_bytes(content[:place] + flipped + content[place + 1 :] if number < FLIPS else content[:place])
        try:
            read = use()
        except UserError:
            outcomes["refused"] += 1
        except Exception as error:
            wrong.append(f"{path.name} at {place}: {type(error).__name__}: {error}")
        else:
            outcomes["harmless"] += 1
            if not harmless(expected, read, path):
                wrong.append(f"{path.name} at {place}: used")
        finally:
            path.write_bytes(content)
    assert not wrong, "\n".join(wrong[:20])
    assert min(outcomes.values()) > 100, outcomes


def test_preparing_again_makes_damaged_items_and_contexts_anew(
    prepared: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "data"
    shutil.copytree(prepared, root)
    record = index.load(root).records[0]
    item, context = root / "items" / f"{record.item}.safetensors", root / "contexts" / f"{record.context}.safetensors"
    content = {path: path.read_bytes() for path in (item, context)}
    for path, data in content.items():
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    made = config.load(root / "config.yaml")
    words = [str(root), f"data.source={made.data.source}"]
    assert command("check", *words, "check.previews=0") == 0, "the shards are whole"
    assert command("prepare", *words) == 0
    assert "1 clips encoded" in capsys.readouterr().out
    for path, data in content.items():
        assert {n: t.tolist() for n, t in load_file(path).items()} == {
            n: t.tolist() for n, t in load_file(_written(tmp_path, data)).items()
        }
    assert command("check", *words, "check.previews=0") == 0


def _written(folder: Path, data: bytes) -> Path:
    (folder / "original.safetensors").write_bytes(data)
    return folder / "original.safetensors"


def test_a_torn_configuration_is_mended_from_the_checkpoint(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Torn, missing, or with another learning rate: the settings of the checkpoint decide."""
    folder = tmp_path / "audio_reference" / "main"
    shutil.copytree(run, folder)
    text = (folder / "config.yaml").read_text()
    for damaged in (text[:1024], "", None):
        (folder / "config.yaml").unlink(missing_ok=True)
        if damaged is not None:
            (folder / "config.yaml").write_text(damaged)
        assert command("fit", str(folder), "optim.lr=0.05", "optim.steps=9") == 77
        assert "optim.lr: 0.0002 -> 0.05" in capsys.readouterr().err
        assert command("fit", str(folder)) == 0
        assert "its settings are read from" in capsys.readouterr().err
    assert command("fit", str(folder), "optim.steps=5") == 0
    assert config.load(folder / "config.yaml").optim.steps == 5


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "audio_reference" / "main"
    shutil.copytree(run, folder)
    for number, text in enumerate(("[]", '{"schema": 1, "files": {}}', "null", '{"files": []}', '{"schema": 1}')):
        for path in (folder / "checkpoints").glob("step-*"):
            (path / "manifest.json").write_text(text)
        assert command("fit", str(folder), "optim.steps=9") == 78, number
        assert "to start over at step 0" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../outside", "a/b", "..", "manifest.json"])
def test_a_manifest_names_only_files_of_its_folder(name: str, run: Path, tmp_path: Path) -> None:
    import json

    path = tmp_path / "step-000004"
    shutil.copytree(commit.committed(run / "checkpoints")[-1], path)
    raw = json.loads((path / "manifest.json").read_text())
    raw["files"][name] = {"size": 4, "sha256": "0"}
    del raw["sha256"]
    (path / "manifest.json").write_text(json.dumps(raw))
    assert commit.committed(tmp_path) == []
    with pytest.raises(UserError, match="outside its folder"):
        commit.load(path)
