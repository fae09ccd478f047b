"""What a data set takes, beside what a prepared one has taken."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from ltx_train import config
from ltx_train.assembly import footage_plan
from ltx_train.data import index
from tests.conftest import REPOSITORY, command, settings


def test_bytes_are_those_of_a_prepared_folder(prepared: Path, clips: Path) -> None:
    one = footage_plan.of_config(config.compose_config(settings(prepared, clips)))
    for record in index.load(prepared).records:
        assert one.sample_bytes < record.tensors.size < one.sample_bytes + 1100
        assert one.context_bytes < record.contexts[0].size < one.context_bytes + 1000


@pytest.mark.parametrize("caption", ["null", "one for all"])
def test_shards_hold_as_many_contexts_as_counted(caption: str, clips: Path, tmp_path: Path) -> None:
    """Of clips that have captions of their own."""
    root, table = tmp_path / "data", tmp_path / "table.json"
    rows = json.loads((clips / "CAPTIONS.json").read_text())["captions"]
    own = [{**row, "file": str(clips / row["file"]), "caption": str(number)} for number, row in enumerate(rows)]
    table.write_text(json.dumps({"captions": own}))
    made = [*settings(root, table, "data.heldout_speakers=0"), f"data.caption={caption}", "data.samples_per_shard=6"]
    assert command("prepare", *made) == 0
    found = index.load(root)
    contexts = 0
    for shard in found.shards:
        with tarfile.open(root / "shards" / shard.name) as tar:
            contexts += sum(name.startswith("contexts/") for name in tar.getnames())
    assert footage_plan.shards(config.compose_config(made), len(found.records)) == (len(found.shards), contexts)


def test_the_documented_table_is_this_one() -> None:
    asked = ["experiment=voice_reference_22b", "model.weights=random", "data.caption=null", "plan.price_per_hour=3"]
    page = (REPOSITORY / "docs" / "data.md").read_text()
    for name, value in footage_plan.rows(config.compose_config(asked), 10_000_000):
        assert f"| {name} | {value} |" in page


def test_a_table_for_many_clips(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["experiment=talking_head_22b", "model.weights=random", "data.buckets=[1280x704x153]"]
    assert command("plan", *asked, "plan.clips=75", "plan.price_per_hour=2", "data.root=x", "data.source=y") == 0
    shown = capsys.readouterr().out
    assert shown.count(" 75 ") == 2
    assert "a text context 12.58 MB" in shown
    hours = 75 * (0.873 + 0.082) / 3600
    one = footage_plan.of_config(config.compose_config(asked))
    assert one.hours(75, 75) == pytest.approx(hours)
    assert one.hours(75, 1, 8) == pytest.approx((75 * 0.873 + 0.082) / 3600 / 8)
