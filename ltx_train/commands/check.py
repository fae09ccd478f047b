"""`ltx-train check`: counts, findings, and decoded previews of prepared data."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from ltx_train.commands import session
from ltx_train.config import Config
from ltx_train.contracts import DataError, Exit
from ltx_train.data.audit import Finding, audit
from ltx_train.data.index import Index
from ltx_train.data.reader import AUDIO, VIDEO, Reader
from ltx_train.sampling import media


def run(config: Config) -> int:
    """Exit code 78 on any error, 0 otherwise (warnings included)."""
    root, index, stale = session.prepared(config)
    _print_counts(index)
    findings = audit(root, index, session.asked(config), stale)
    for finding in findings:
        print(f"{'ERROR  ' if finding.error else 'warning'} {finding.text}")
    errors = sum(f.error for f in findings)
    if not errors and config.check.previews:
        _previews(config, root, index)
    print(f"check: {errors} errors, {len(findings) - errors} warnings in {len(index.records)} samples")
    return Exit.DATA if errors else Exit.DONE


def refuse_bad(findings: list[Finding], root: Path) -> None:
    """For `fit`: DataError with all errors; warnings pass."""
    errors = [f.text for f in findings if f.error]
    if errors:
        shown = "\n  ".join(errors[:10]) + (f"\n  and {len(errors) - 10} more" if len(errors) > 10 else "")
        raise DataError(f"the data in {root} fail the check:\n  {shown}")


def _print_counts(index: Index) -> None:
    for split in sorted({r.split for r in index.records}):
        records = index.split(split)
        seconds = sum(r.seconds for r in records)
        print(f"{split}: {len(records)} clips, {seconds:.1f} s, {sum(r.has_audio for r in records)} with sound")
        for title, field in (("speaker", "speaker"), ("bucket", "bucket")):
            counts = Counter(getattr(r, field) for r in records)
            listed = ", ".join(f"{name} {count}" for name, count in sorted(counts.items())[:12])
            print(f"  {len(counts)} {title}s: {listed}{' ...' if len(counts) > 12 else ''}")


def _previews(config: Config, root: Path, index: Index) -> None:
    """Decodes what the model will see, which is not what the clip was: listen to it."""
    folder = root / "previews"
    decoder = media.open_decoder(session.weights(config), session.device(config), session.dtype(config))
    reader = Reader(root, index, seed=0)
    step = max(1, len(index.records) // config.check.previews)
    for record in index.records[::step][: config.check.previews]:
        tensors = reader.tensors(record)
        path = folder / f"{record.key}.mp4"
        media.write_mp4(path, *media.decode(decoder, tensors.get(VIDEO), tensors.get(AUDIO)), record.fps)
        print(f"preview: {path}")
