"""Step time against peak memory of the records in h200.json: writes h200.png beside it."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

HERE = Path(__file__).parent
COLORS = {"bf16": "#2563eb", "int8": "#d97706", "fp8": "#059669", "int8mm": "#9333ea"}


def main() -> None:
    """One panel for each work: what a step takes at what peak, and the peer (x) where it was in the same session."""
    records = json.loads((HERE / "h200.json").read_text())
    figure, panels = pyplot.subplots(1, 2, figsize=(13, 6.5))
    for axes, work in zip(panels, "AB", strict=True):
        own = sorted((r for r in records if r["case"].startswith(work)), key=lambda r: r["peak_reserved_gib"])
        peers = {(r["peer_peak_reserved_gib"], r["peer_step_s_median"]) for r in own if "peer_peak_reserved_gib" in r}
        for peer in peers:
            axes.scatter(*peer, color="#6b7280", marker="x", s=36)
        for number, record in enumerate(own):
            kind = record["case"].split("_")[1]
            place = (record["peak_reserved_gib"], record["step_s_median"])
            axes.scatter(*place, color=COLORS[kind], s=36)
            offset = ((5, 6), (5, -12), (-14, -22))[number % 3]
            axes.annotate(record["case"][2:], place, xytext=offset, textcoords="offset points", fontsize=8)
        most = max(r["peak_reserved_gib"] for r in own)
        axes.set(xlabel="peak reserved, GiB", ylabel="step, s", title=f"work {work}", xlim=(0, 1.3 * most))
        axes.set_ylim(0, 1.12 * max(s for _, s in {*peers, *((0, r["step_s_median"]) for r in own)}))
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(HERE / "h200.png", dpi=130)


if __name__ == "__main__":
    main()
