"""about.json: where, when and on what a run was made; and the facts about it that its page lists.

Owns that file. `fit` writes it at every start; the first start's date stays.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import ltx_train
from ltx_train import __version__, durable
from ltx_train.assembly import from_config, resolve
from ltx_train.assembly.setup import Setup
from ltx_train.config import Config
from ltx_train.data.index import HELDOUT, TRAIN, Index

NAME = "about.json"
TRAINED_S = "run/trained_s"


def record(setup: Setup, folder: Path, index: Index) -> None:
    """Writes the file, keeping the date of the run's first start."""
    device = setup.device
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    about = {
        "started": _read(folder).get("started") or datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "version": __version__, "commit": commit(), "devices": f"{setup.ranks.world} x {card}",
        "train": _counted(index, TRAIN), "heldout": _counted(index, HELDOUT), "by_clip": index.by_clip,
    }  # fmt: skip
    durable.write(folder / NAME, json.dumps(about, ensure_ascii=False, indent=1))


def facts(config: Config, folder: Path, metrics: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """What the page lists about a run; without what is not known of runs of earlier releases."""
    about = _read(folder)
    kind = resolve.trained_kind(config)
    rank = "" if resolve.trains_all_weights(config) else f", rank {config.adapter.rank}, alpha {config.adapter.alpha:g}"
    merged = f" + {config.model.merge_strength:g} x {config.model.merge}" if config.model.merge else ""
    last = max((int(row["step"]) for row in metrics), default=0)
    listed = {
        "folder": str(folder),
        "started": about.get("started", ""),
        "trained": f"{last} of {config.optim.steps} steps{_duration(metrics)}",
        "on": about.get("devices", ""),
        "ltx-train": " ".join(filter(None, (about.get("version", ""), about.get("commit", "")))),
        "base": (config.model.path or f"random {config.model.preset}") + merged,
        "mode": ", ".join(f"{k} {v}" for k, v in from_config.mode_facts(config).items()),
        "weights": kind + rank,
        "optimizer": f"{config.optim.name}, learning rate {config.optim.lr:g}, {config.optim.schedule}",
        "seed": str(config.run.seed),
        "noise levels": f"{config.sigma.kind}, {config.mode.sigma.value} by both modalities",
        "data": _data(config.data.root, about.get("train")),
        "held out": _heldout(about),
    }
    return {name: text for name, text in listed.items() if text}


def commit() -> str:
    """The commit of the checkout that runs; empty for an installed package."""
    root = Path(ltx_train.__file__).parents[1]
    if not (root / ".git").exists():
        return ""
    with suppress(OSError, subprocess.SubprocessError):
        call = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
        return subprocess.run(call, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    return ""


def _counted(index: Index, split: str) -> dict[str, float]:
    records = index.split(split)
    seconds = sum(record.seconds for record in records)
    return {"clips": len(records), "speakers": len({r.speaker for r in records}), "seconds": round(seconds, 1)}


def _data(root: str, counted: Mapping[str, float] | None) -> str:
    return root if counted is None else f"{root}: {_sizes(counted)}"


def _heldout(about: Mapping[str, Any]) -> str:
    counted = about.get("heldout")
    if not counted:
        return ""
    if not counted["clips"]:
        return "nothing"
    rule = "other clips of people who are trained on" if about.get("by_clip") else "people who are not trained on"
    return f"{_sizes(counted)}: {rule}"


def _sizes(counted: Mapping[str, float]) -> str:
    speakers = counted["speakers"]
    return f"{counted['clips']} clips of {speakers} speaker{'s' if speakers != 1 else ''}, {counted['seconds']:.0f} s"


def _duration(metrics: Sequence[Mapping[str, float]]) -> str:
    seconds = next((row[TRAINED_S] for row in reversed(metrics) if TRAINED_S in row), None)
    if seconds is None:
        return ""
    minutes = seconds / 60
    return f" in {seconds:.0f} s" if minutes < 2 else f" in {minutes // 60:.0f} h {minutes % 60:.0f} min"


def _read(folder: Path) -> dict[str, Any]:
    try:
        raw = json.loads((folder / NAME).read_text(encoding="utf-8"))
        return raw if isinstance(raw, dict) else {}
    except (OSError, ValueError):
        return {}
