"""Several prepared folders in one run."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ltx_train.contracts import Condition, ConditionKind, DataError, Exit
from ltx_train.data import index as indexes
from ltx_train.data import united
from ltx_train.data.columns import Rows
from ltx_train.data.index import HELDOUT, TRAIN
from ltx_train.data.module import training_order
from ltx_train.data.order import Address
from ltx_train.data.reader import Reader, ReadRequest
from ltx_train.data.united import PreparedFolder, UnitedIndex
from ltx_train.training.tracking.metrics import read_rows
from tests.conftest import REPOSITORY, command, settings

pytestmark = pytest.mark.slow
VOICE = ReadRequest(references={"voice": Condition(kind=ConditionKind.reference)})


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six clips of three people whom `prepared` has not seen, under names that it uses."""
    clips, root = tmp_path_factory.mktemp("more"), tmp_path_factory.mktemp("folders") / "other"
    rows = json.loads((REPOSITORY / "data/sample/CAPTIONS.json").read_text())["captions"]
    kept = [row for row in rows if row["speaker"] in ("speaker20", "speaker21", "speaker22")]
    for row in kept:
        shutil.copy(REPOSITORY / "data/sample" / row["file"], clips)
        row["speaker"] = row["speaker"].replace("speaker2", "speaker0")
    (clips / "CAPTIONS.json").write_text(json.dumps({"captions": kept}))
    assert command("prepare", *settings(root, clips, "data.caption=somebody else")) == 0
    return root


def both(prepared: Path, other: Path, weight: float = 1.0) -> UnitedIndex:
    first = PreparedFolder(name="", root=prepared, index=indexes.load(prepared))
    return united.unite(first, [PreparedFolder(name="other", root=other, index=indexes.load(other), weight=weight)])


def test_a_sample_is_that_of_its_folder(prepared: Path, other: Path) -> None:
    together = Reader(prepared, both(prepared, other), seed=3)
    for root, prefix in ((prepared, ""), (other, "other:")):
        alone = Reader(root, indexes.load(root), seed=3)
        for key in alone.records:
            expected, found = alone.sample(Address(key, 5)), together.sample(Address(prefix + key, 5))
            for name in ("video_latent", "audio_latent", "video_context", "audio_context"):
                assert torch.equal(getattr(expected, name), getattr(found, name))


def test_one_name_in_two_folders_is_two_people(prepared: Path, other: Path) -> None:
    reader = Reader(prepared, both(prepared, other), seed=3, request=VOICE)
    condition = VOICE.references["voice"]
    shared = {r.speaker for r in indexes.load(prepared).records} & {r.speaker for r in indexes.load(other).records}
    assert shared
    for key, record in reader.records.items():
        for draw in range(5):
            donor = reader.reference_key(Address(key, draw), condition)
            assert reader.records[donor].speaker == record.speaker
            assert donor.startswith("other:") == key.startswith("other:")


def test_an_error_names_the_file_of_its_folder(prepared: Path, other: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(other, tmp_path / "other")
    record = indexes.load(damaged).records[0]
    shard = damaged / "shards" / record.shard
    shard.write_bytes(bytes(shard.stat().st_size))
    reader = Reader(prepared, both(prepared, damaged), seed=3)
    with pytest.raises(DataError, match=f"{shard}: the bytes of other:{record.key} do not match"):
        reader.sample(Address(f"other:{record.key}", 0))


@pytest.mark.parametrize("weight", [1.0, 3.0, 0.5, 0.0])
def test_an_epoch_uses_a_folder_by_its_weight(weight: float, prepared: Path, other: Path) -> None:
    index = both(prepared, other, weight)
    order = training_order(index, 1, seed=0)
    epochs = 4
    steps = range(epochs * order.batches_per_epoch)
    uses = Counter(address.key.partition(":")[0] == "other" for step in steps for address in order.batch(step))
    trained = Counter(r.key.startswith("other:") for r in index.split(TRAIN))
    assert uses[False] / (epochs * trained[False]) == pytest.approx(1, abs=0.1)
    assert uses[True] / (epochs * trained[True]) == pytest.approx(weight, abs=0.1)


def test_what_is_trained_on_here_must_not_be_held_out_there(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared, tmp_path / "again")
    again = indexes.load(tmp_path / "again")
    swapped = Rows.of([replace(r, split=TRAIN if r.split == HELDOUT else HELDOUT) for r in again.records])
    first = PreparedFolder(name="", root=prepared, index=indexes.load(prepared))
    turned = replace(again, records=swapped)
    with pytest.raises(DataError, match="where it is held out"):
        united.unite(first, [PreparedFolder(name="again", root=tmp_path / "again", index=turned)])


def test_a_run_trains_and_is_measured_on_both(
    prepared: Path, clips: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = [*settings(prepared, clips), f"run.root={tmp_path}", "optim.steps=2", "eval.interval=2", "data.workers=1"]
    assert command("fit", *run, f"data.also=[{other}]", "data.also_weights=[2]", "run.id=both") == 0
    index = both(prepared, other)
    panel = " ".join(capsys.readouterr().out.split())
    assert f"{len(index.split(TRAIN))} training, {len(index.split(HELDOUT))} held-out clips" in panel
    assert command("fit", *run, "run.id=one") == 0
    folders = [tmp_path / "audio_reference" / name for name in ("both", "one")]
    losses = [read_rows(folder / "metrics.jsonl")[-1]["val/loss"] for folder in folders]
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    ("also", "code", "message"),
    [
        ("data.also=[{other},{other}]", Exit.DATA, "two folders in data.also are called 'other'"),
        ("data.also=['{colon}']", Exit.DATA, "give it a name without ':'"),
        ("data.also=[{none}]", Exit.DATA, "no prepared data at"),
        ("data.also=[{changed}]", Exit.DATA, "bucket 96x64x33 is not in data.buckets"),
        ("data.also=[{changed}]", Exit.DATA, "data.reference_s was 9.0, now"),
        ("data.also_weights=[1]", Exit.CONFIG, "1 numbers for 0 folders"),
    ],
)
def test_what_cannot_be_united_is_refused(
    also: str, code: int, message: str, prepared: Path, clips: Path, other: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    changed = tmp_path / "changed"
    shutil.copytree(other, changed)
    made = indexes.load(other)
    records = Rows.of([replace(record, bucket="96x64x33") for record in made.records])
    indexes.save(replace(made, records=records, settings={**made.settings, "reference_s": 9.0}), changed)
    colon = shutil.copytree(other, tmp_path / "a:b")
    given = also.format(other=other, none=tmp_path / "none", changed=changed, colon=colon)
    assert command("fit", *settings(prepared, clips), f"run.root={tmp_path}", given) == code
    assert message in capsys.readouterr().err
    assert not any(tmp_path.rglob("checkpoints"))
