"""What quantized weights cost in held-out loss, on a trained tiny model: writes quantization.json beside itself.

python docs/performance/quantization.py   (after `make demo`, whose base and shards it uses; about 4 minutes)
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean

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
}


def rows(name: str, overrides: list[str]) -> list[dict[str, float]]:
    """The metrics of one run of 200 steps, adapter from zero, the same draws in every variant."""
    run_id = name.replace(" ", "_")
    folder = DEMO / "quantization" / "audio_reference" / run_id
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run(
        [
            sys.executable, "-W", "ignore", "-m", "ltx_train", "fit", "experiment=audio_reference", "logger=local",
            f"run.root={DEMO / 'quantization'}", f"run.id={run_id}", f"data.root={DEMO / 'data'}",
            f"model.path={DEMO / 'base.safetensors'}", "model.dtype=bfloat16", f"optim.steps={STEPS}",
            f"eval.interval={STEPS}", "logger.every=1", "memory=auto", *overrides,
        ],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    return read_rows(folder / "metrics.jsonl")


def main() -> None:
    found = {name: rows(name, overrides) for name, overrides in VARIANTS.items()}
    plain = found["bf16"]
    records = []
    for name, curve in found.items():
        last, last_plain = curve[-1], plain[-1]
        base = last["val/loss"] - last["val/adapter_gain"]
        base_plain = last_plain["val/loss"] - last_plain["val/adapter_gain"]
        apart = [abs(a["train/loss"] / b["train/loss"] - 1) for a, b in zip(curve, plain, strict=True)]
        records.append(
            {
                "weights": name,
                "heldout_base": round(base, 5),
                "heldout_base_penalty": round(base / base_plain - 1, 5),
                "heldout_trained": round(last["val/loss"], 5),
                "heldout_trained_penalty": round(last["val/loss"] / last_plain["val/loss"] - 1, 5),
                "curve_mean_difference": round(mean(apart), 5),
                "curve_largest_difference": round(max(apart), 5),
                "steps": STEPS,
            }
        )
        print(records[-1])
    (HERE / "quantization.json").write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
