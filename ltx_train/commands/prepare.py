"""`ltx-train prepare`: media and captions to a prepared folder."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from ltx_train.commands import session
from ltx_train.config import Config
from ltx_train.contracts import Exit
from ltx_train.data.prepare import build
from ltx_train.data.prepare.sources import read_source
from ltx_train.training.lock import FolderLock


def run(config: Config) -> int:
    """Encodes what is new; unchanged clips are taken from earlier work."""
    assert config.data.source is not None  # config.require has asked for it
    clips = read_source(config.data.source)
    recipe = session.recipe(config)
    root = Path(config.data.root)
    with FolderLock(root):
        outcome = build.prepare(clips, recipe, session.encoders(config), root, _progress)
    _print_summary(outcome, root)
    return Exit.DONE


def _progress(number: int, total: int, key: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{number}/{total} {key}", end="\n" if number == total else "", file=sys.stderr, flush=True)
    elif number == total or number % max(1, total // 5) == 0:
        print(f"prepare {number}/{total} {key}", file=sys.stderr)


def _print_summary(outcome: build.Outcome, root: Path) -> None:
    index = outcome.index
    print(f"prepared {root}: {outcome.encoded} clips encoded, {outcome.reused} unchanged")
    for split, count in sorted(Counter(r.split for r in index.records).items()):
        speakers = len({r.speaker for r in index.records if r.split == split})
        print(f"  {split}: {count} clips of {speakers} speakers")
    for bucket, count in sorted(Counter(r.bucket for r in index.records).items()):
        print(f"  bucket {bucket}: {count}")
    if outcome.quarantined:
        print(f"  set aside: {len(outcome.quarantined)}")
        for key, reason in outcome.quarantined.items():
            print(f"    {key}: {reason}")
