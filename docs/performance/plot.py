"""Step time against peak memory of the records in h200.json: writes h200.png beside it."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

HERE = Path(__file__).parent
COLORS = {"bf16": "#2563eb", "int8": "#d97706", "fp8": "#059669"}


def main() -> None:
    """One panel for each work: what a step takes at what peak, and the peer of the same kind."""
    records = json.loads((HERE / "h200.json").read_text())
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.2))
    for axes, work in zip(panels, "AB", strict=True):
        for record in (r for r in records if r["case"].startswith(work)):
            kind = record["case"].split("_")[1]
            place = (record["peak_reserved_gib"], record["step_s_median"])
            axes.scatter(*place, color=COLORS[kind], s=36)
            axes.annotate(record["case"][2:], place, xytext=(4, 4), textcoords="offset points", fontsize=8)
        axes.set(xlabel="peak reserved, GiB", ylabel="step, s", title=f"work {work}", xlim=(0, None), ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(HERE / "h200.png", dpi=130)


if __name__ == "__main__":
    main()
