"""What 8-bit and 4-bit weights and products cost on a trained tiny model: writes quantization.json beside itself.

python docs/performance/quantization.py   (after `make demo`, whose base and shards it uses; about 6 minutes)

Every format trains the same adapter from the same draws and is measured on the same held-out clips, noise levels and
noise. Differences to bf16 are paired by identity, with 95 % intervals.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean

from ltx_train.evaluation import kept
from ltx_train.evaluation.rows import BASE, CORRECT, WRONG, Row, gains
from ltx_train.evaluation.statistics import Interval, by_identity
from ltx_train.training.tracking.metrics import read_rows

HERE = Path(__file__).parent
DEMO = HERE.parent.parent / "runs" / "demo"
STEPS = 200
VARIANTS = {
    "bf16": [],
    "int8": ["memory.quantize=int8"],
    "float8": ["memory.quantize=float8"],
    "int4": ["memory.quantize=int4"],
    "fp8 products": ["memory.compute=fp8"],
    "int8 products": ["memory.compute=int8"],
}


def run(demo: Path, name: str, overrides: list[str]) -> Path:
    """The folder of one run: the adapter of the recipe, evaluated at its end."""
    run_id = name.replace(" ", "_")
    folder = demo / "quantization" / "audio_reference" / run_id
    shutil.rmtree(folder, ignore_errors=True)
    words = [
        "experiment=audio_reference", "logger=local", f"run.root={demo / 'quantization'}", f"run.id={run_id}",
        f"data.root={demo / 'data'}", f"model.path={demo / 'base.safetensors'}", "model.dtype=bfloat16",
        f"optim.steps={STEPS}", "eval.interval=0", "logger.every=1", "memory=auto", *overrides,
    ]  # fmt: skip
    for command in ("fit", "evaluate"):
        subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "ltx_train", command, *words], check=True, stdout=subprocess.DEVNULL
        )
    return folder


def by_speaker(rows: Sequence[Row], arm: str) -> dict[str, float]:
    """Mean held-out loss of each identity under an arm."""
    losses: dict[str, list[float]] = {}
    for row in rows:
        if row.arm == arm:
            losses.setdefault(row.speaker, []).append(row.loss)
    return {who: mean(values) for who, values in losses.items()}


def paired(values: dict[str, float], plain: dict[str, float]) -> Interval:
    return by_identity({who: [values[who] - plain[who]] for who in plain})


def gained(rows: Sequence[Row]) -> dict[str, float]:
    return {who: value[0] for who, value in gains(rows, WRONG).items()}


def main(demo: Path) -> None:
    folders = {name: run(demo, name, overrides) for name, overrides in VARIANTS.items()}
    curves = {name: [r["train/loss"] for r in read_rows(f / "metrics.jsonl") if "train/loss" in r]
              for name, f in folders.items()}  # fmt: skip
    evaluated = {name: found.rows for name, folder in folders.items() if (found := kept.read(folder)) is not None}
    plain, curve = evaluated["bf16"], curves["bf16"]
    records: list[dict[str, object]] = []
    for name, rows in evaluated.items():
        apart = [abs(a / b - 1) for a, b in zip(curves[name], curve, strict=True)]
        records.append({
            "weights": name, "steps": STEPS,
            "heldout_base": round(mean(by_speaker(rows, BASE).values()), 5),
            "heldout_trained": round(mean(by_speaker(rows, CORRECT).values()), 5),
            "base_to_bf16": asdict(paired(by_speaker(rows, BASE), by_speaker(plain, BASE))),
            "trained_to_bf16": asdict(paired(by_speaker(rows, CORRECT), by_speaker(plain, CORRECT))),
            "gained_gap_to_bf16": asdict(paired(gained(rows), gained(plain))),
            "curve_mean_difference": round(mean(apart), 5), "curve_largest_difference": round(max(apart), 5),
        })  # fmt: skip
        print(records[-1])
    (HERE / "quantization.json").write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DEMO)
