"""`ltx-train prepare`: media and captions to a prepared folder."""

from __future__ import annotations

import os
import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import torch

from ltx_train import config as configuration
from ltx_train import durable
from ltx_train.assembly import encoder_builder, from_config
from ltx_train.assembly.closing import close
from ltx_train.config import Config
from ltx_train.contracts import ConfigError, Exit
from ltx_train.data import store
from ltx_train.data.findings import of_clips
from ltx_train.data.index import Index
from ltx_train.data.prepare import build
from ltx_train.data.prepare.sources import UNNAMED, read_source
from ltx_train.distributed.ranks import process_group, ranks_from_environment
from ltx_train.jobs.folder_lock import FolderLock

_LONGEST_WAIT_S = 7 * 86400.0


def run(config: Config) -> int:
    """Encodes new and changed clips, and reuses the unchanged ones."""
    assert config.data.source is not None  # config.require has refused it
    if store.is_url(config.data.root):
        raise ConfigError(f"data.root={config.data.root}: prepare writes to a folder; copy it to the store afterwards")
    source, ranks, root = config.data.source, ranks_from_environment(os.environ), Path(config.data.root)
    # Control messages alone: the encoders of different ranks exchange nothing. A rank may wait for hours for another.
    with ExitStack() as stack:
        stack.enter_context(process_group(ranks, torch.device("cpu"), _LONGEST_WAIT_S))
        ranks.lead(lambda: _enter(stack, FolderLock(root)))
        clips = ranks.lead(lambda: read_source(source, config.data.caption))
        recipe, encoders = from_config.recipe(config), encoder_builder.encoders(config, ranks)
        outcome = build.prepare(clips, recipe, encoders, root, _progress if ranks.leads else _silent, ranks=ranks)
        ranks.lead(lambda: _keep_settings(config, root))
    if not ranks.leads:
        return Exit.DONE
    _print_summary(outcome)
    unread = sum(not clip.reviewed for clip in clips)
    if unread:
        print(f"  {unread} captions are a model's that nobody has reviewed (column reviewed)")
    close(root, f"ltx-train check {root}")
    return Exit.DONE


def _enter(stack: ExitStack, lock: FolderLock) -> None:
    """Returns nothing: a lock cannot be sent to other ranks."""
    stack.enter_context(lock)


def _silent(_number: int, _total: int, _key: str) -> None:
    """Of ranks whose progress nobody watches."""


def _keep_settings(config: Config, root: Path) -> None:
    """Writes the folder's config.yaml, so that `check` and `fit` need no other settings."""
    durable.write(root / "config.yaml", configuration.dump(config))


def _progress(number: int, total: int, key: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{number}/{total} {key}", end="\n" if number == total else "", file=sys.stderr, flush=True)
    elif number == total or number % max(1, total // 5) == 0:
        print(f"prepare {number}/{total} {key}", file=sys.stderr)


def _print_summary(outcome: build.Outcome) -> None:
    index = outcome.index
    print(f"{outcome.encoded} clips encoded, {outcome.reused} unchanged")
    print(f"  {_used(index)}")
    unnamed = sum(r.speaker == UNNAMED for r in index.records)
    if unnamed:
        print(f"  {unnamed} clips name no speaker (column speaker): they count as one person, {UNNAMED!r}")
    for split, count in sorted(Counter(r.split for r in index.records).items()):
        speakers = len({r.speaker for r in index.records if r.split == split})
        print(f"  {split}: {count} clips of {speakers} speakers")
    for bucket, count in sorted(Counter(r.bucket for r in index.records).items()):
        print(f"  bucket {bucket}: {count}")
    for finding in of_clips(index):
        print(f"  warning: {finding.text}")
    if outcome.quarantined:
        print(f"  set aside: {len(outcome.quarantined)}")
        for key, reason in outcome.quarantined.items():
            print(f"    {key}: {reason}")


def _used(index: Index) -> str:
    """How much of the footage is trained."""
    given = {(r.recording, r.measured.get("given_s", r.seconds)) for r in index.records}
    used = sum(r.seconds for r in index.records)
    return f"{used:.1f} of {sum(seconds for _, seconds in given):.1f} s of footage are used"
