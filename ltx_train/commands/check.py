"""`ltx-train check`: counts, findings, and a page with the clips of prepared data."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from ltx_train import durable
from ltx_train.assembly import clip_cards, from_config
from ltx_train.assembly.closing import close
from ltx_train.config import Config
from ltx_train.contracts import Exit
from ltx_train.data import page
from ltx_train.data.audit import audit
from ltx_train.data.findings import Finding
from ltx_train.data.index import Index
from ltx_train.evaluation import leaks

_PAGE = "check.html"


def run(config: Config) -> int:
    """Prints counts and findings, and writes check.html where all samples can be read.

    Returns 78 on any error, otherwise 0, even with warnings.
    """
    root, index, stale = from_config.prepared(config)
    _print_counts(index)
    findings = audit(root, index, from_config.data_requirements(config), stale)
    measured = leaks.of_index(index)
    findings += [finding for leak in measured if (finding := leak.finding()) is not None]
    facts = [leak.text for leak in measured if leak.finding() is None]
    for fact in facts:
        print(fact)
    for finding in findings:
        print(f"{'ERROR  ' if finding.error else 'warning'} {finding.text}")
    errors = sum(f.error for f in findings)
    # Samples that cannot be read cannot be shown either.
    readable = all(f.kind for f in findings if f.error)
    written = _write_page(config, root, index, findings, facts) if readable else None
    print(f"check: {errors} errors, {len(findings) - errors} warnings in {len(index.records)} samples")
    close(written, f"ltx-train prepare {root}" if errors else f"ltx-train fit {root}")
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


def _write_page(config: Config, root: Path, index: Index, findings: list[Finding], facts: list[str]) -> Path:
    title = f"{root.resolve().name}: {len(index.records)} clips, {sum(r.seconds for r in index.records):.1f} s"
    path = root / _PAGE
    durable.write(path, page.render(title, facts, findings, list(clip_cards.cards(config, root, index))))
    return path
