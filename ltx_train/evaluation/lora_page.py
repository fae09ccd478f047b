"""The page of `inspect`: where in the model a LoRA changes the base.

Owns the drawing. The norms come from `model.lora_tools`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

from ltx_train import durable
from ltx_train.pages.figures import picture, subplots
from ltx_train.pages.render import render
from ltx_train.pages.sections import Section, Table

# Norms by block, by stream.
ByBlock = Mapping[str, Mapping[int, float]]
_STYLES = ("-", "--")


def write(path: Path, title: str, files: Mapping[str, ByBlock]) -> None:
    """Writes the page atomically. files: the norms of one file, or of two that are compared, by name."""
    sections = [_figure(files), _table(files)]
    page = render("run.html.j2", title=title, groups=[], report=SimpleNamespace(verdicts=[]), sections=sections)
    durable.write(path, page)


def _figure(files: Mapping[str, ByBlock]) -> Section:
    figure, axis = subplots(figsize=(9, 3.6))
    for style, (name, streams) in zip(_STYLES, files.items(), strict=False):
        for number, (stream, norms) in enumerate(streams.items()):
            label = f"{stream}, {name}" if len(files) > 1 else stream
            axis.plot(list(norms), list(norms.values()), style, marker=".", color=f"C{number}", label=label)
    axis.set_xlabel("block")
    axis.set_ylabel("Frobenius norm of the change")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, fontsize=8)
    return Section(title="Change by block", figures=[picture(figure, "norms of the changes of a block's layers")])


def _table(files: Mapping[str, ByBlock]) -> Section:
    rows: list[list[str]] = []
    for name, streams in files.items():
        for stream, norms in streams.items():
            largest = max(norms, key=lambda block: norms[block])
            whole = sum(norm**2 for norm in norms.values()) ** 0.5
            rows.append([name, stream, str(len(norms)), f"{whole:.4g}", f"block {largest} ({norms[largest]:.3g})"])
    head = ("file", "stream", "blocks", "norm of the whole", "most in")
    return Section(title="In all", tables=[Table(head=head, rows=rows)])
