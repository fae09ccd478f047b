"""`ltx-train check`: counts, findings, and decoded previews of prepared data."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from ltx_train.assembly import from_config, model_source, resolve
from ltx_train.assembly.closing import close
from ltx_train.config import Config
from ltx_train.contracts import Exit
from ltx_train.data.audit import audit
from ltx_train.data.index import Index
from ltx_train.data.reader import AUDIO, VIDEO, Reader
from ltx_train.sampling import media


def run(config: Config) -> int:
    """Prints counts and findings. Returns 78 on any error, otherwise 0, even with warnings."""
    root, index, stale = from_config.prepared(config)
    _print_counts(index)
    findings = audit(root, index, from_config.data_requirements(config), stale)
    for finding in findings:
        print(f"{'ERROR  ' if finding.error else 'warning'} {finding.text}")
    errors = sum(f.error for f in findings)
    previews = None
    if not errors and config.check.previews:
        previews = _write_previews(config, root, index)
    print(f"check: {errors} errors, {len(findings) - errors} warnings in {len(index.records)} samples")
    close(previews, f"ltx-train prepare {root}" if errors else f"ltx-train fit {root}")
    return Exit.DATA if errors else Exit.DONE


def _print_counts(index: Index) -> None:
    for split in sorted({r.split for r in index.records}):
        records = index.split(split)
        seconds = sum(r.seconds for r in records)
        print(f"{split}: {len(records)} clips, {seconds:.1f} s, {sum(r.has_audio for r in records)} with sound")
        for title, field in (("speaker", "speaker"), ("bucket", "bucket")):
            counts = Counter(getattr(r, field) for r in records)
            listed = ", ".join(f"{name} {count}" for name, count in sorted(counts.items())[:12])
            print(f"  {len(counts)} {title}s: {listed}{' ...' if len(counts) > 12 else ''}")


def _write_previews(config: Config, root: Path, index: Index) -> Path:
    """Decodes latents of some clips to mp4 files. They show the data that the model sees, which differs from clips."""
    folder = root / "previews"
    decoder = media.open_decoder(model_source.weights(config), resolve.device(config), from_config.dtype(config))
    reader = Reader(root, index, seed=0)
    step = max(1, len(index.records) // config.check.previews)
    for record in index.records[::step][: config.check.previews]:
        tensors = reader.tensors(record)
        path = folder / f"{record.key}.mp4"
        media.write_mp4(path, *media.decode(decoder, tensors.get(VIDEO), tensors.get(AUDIO)), record.fps)
        print(f"preview: {path}")
    return folder
