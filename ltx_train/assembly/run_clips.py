"""The clips of a run below `samples`: generates them, and finds those that were generated.

Owns the layout: `<kind>/<column>/<name>.mp4` with a poster beside it, and `clips.json` with titles and columns. A
column is the base, a step, an adapter, or what the clips are looked at beside.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from ltx_train import durable
from ltx_train.assembly import encoder_builder, requests
from ltx_train.assembly.planned_clips import PlannedClip
from ltx_train.assembly.setup import Setup
from ltx_train.contracts import Clip, UserError
from ltx_train.evaluation import heldout
from ltx_train.model import adapter
from ltx_train.model.transformer import Pair, Transformer
from ltx_train.sampling.media import Decoder

SECONDS = "perf/generate_s"
BASE = "base"
_LISTED = "clips.json"


class RunClips:
    """Generates planned clips with the weights of the moment. The ranks share the clips out."""

    def __init__(self, setup: Setup, root: Path, planned: Sequence[PlannedClip]) -> None:
        self._setup, self._root, self._planned = setup, root, planned
        # Of ranks that share each sample's tokens one writes.
        self._writes = setup.ranks.rank % setup.sharing.sequence == 0

    def generate(self, transformer: Transformer, column: str, label: str) -> list[Clip]:
        """A clip for each planned one, of all ranks, in their order.

        The decoders come after the last pass of the transformer, and go before the training goes on: a budget that the
        run fills holds them only where the plan has left room (`encoder_plan.between_steps_gib`).
        """
        made: list[tuple[PlannedClip, Pair]] = []
        with heldout.undisturbed(transformer):
            for planned, counts in self._setup.share.turns(self._planned):
                with adapter.at_strength(transformer, planned.config.sample.strength):
                    latents = requests.generate(transformer, planned.config, planned.request, self._setup.device)
                if counts and self._writes:
                    made.append((planned, latents))
        self._write(made, column)
        if self._setup.ranks.leads:
            _list(self._root, self._planned, column, label)
        return [Clip(p.title, _path(self._root, p.place, column), p.place) for p in self._planned]

    def with_base(self, transformer: Transformer) -> list[Clip]:
        """The clips with the adapter off, unless they were generated before."""
        if all(_path(self._root, p.place, BASE).is_file() for p in self._planned):
            return []
        with adapter.disabled(transformer):
            return self.generate(transformer, BASE, BASE)

    def _write(self, made: Sequence[tuple[PlannedClip, Pair]], column: str) -> None:
        if not made:
            return
        decoder = encoder_builder.decoder(self._setup.config, self._setup.device)
        for planned, latents in made:
            requests.write(decoder, planned.request, latents, _path(self._root, planned.place, column))
            self._write_given(decoder, planned)

    def _write_given(self, decoder: Decoder, planned: PlannedClip) -> None:
        for name, latents in planned.given.items():
            path = _path(self._root, planned.place, _folder_name(name))
            if not path.is_file():
                requests.write(decoder, planned.request, latents, path)


class TrainingClips:
    """The clips of a run while it trains: a failure is printed and costs the clips alone."""

    def __init__(self, setup: Setup, folder: Path, planned: Sequence[PlannedClip]) -> None:
        self._setup, self._folder = setup, folder
        self._clips = RunClips(setup, folder / "samples", planned)

    def generate(self, transformer: Transformer, step: int) -> tuple[list[Clip], Mapping[str, float]]:
        """The clips of a step and their seconds. Step 0 has those of the base: a new adapter changes nothing."""
        started, setup = time.perf_counter(), self._setup
        column, label = (f"step-{step:06d}", f"step {step}") if step else (BASE, BASE)
        clips: list[Clip] = []
        try:
            with adapter.disabled(transformer) if step == 0 and not setup.sharing.full else nullcontext():
                clips = self._clips.generate(transformer, column, label)
        except (UserError, OSError, torch.OutOfMemoryError) as error:
            if setup.sharing.measures_together:
                raise  # the other ranks wait for this one's passes
            print(f"ltx-train: no clips of {label} in {self._folder}: {error}; the run goes on", file=sys.stderr)
            if setup.device.type == "cuda":
                torch.cuda.empty_cache()
        setup.ranks.any(False)  # a barrier: all ranks have written theirs
        return clips, {SECONDS: time.perf_counter() - started}


def found(root: Path) -> dict[str, list[Clip]]:
    """The clips below a folder by title, each with what it is looked at beside first, then the base and the others."""
    listed = _listed(root)
    groups: dict[str, list[Clip]] = {}
    for place, title in listed["titles"].items():
        paths = {label: _path(root, place, column) for column, label in listed["columns"].items()}
        clips = [Clip(label, path, place) for label, path in paths.items() if path.is_file()]
        if clips:
            groups[title] = clips
    return groups


def _list(root: Path, planned: Sequence[PlannedClip], column: str, label: str) -> None:
    before = _listed(root)
    given = {_folder_name(name): name for p in planned for name in p.given}
    titles = {**before["titles"], **{p.place: p.title for p in planned}}
    columns = {**given, **{c: text for c, text in before["columns"].items() if c != column}, column: label}
    durable.write(root / _LISTED, json.dumps({"titles": titles, "columns": columns}, ensure_ascii=False, indent=1))


def _listed(root: Path) -> dict[str, dict[str, str]]:
    """Titles by place and labels by column; none of either where nothing or nothing readable is listed."""
    try:
        raw: Any = json.loads((root / _LISTED).read_text(encoding="utf-8"))
        return {name: {str(k): str(v) for k, v in raw[name].items()} for name in ("titles", "columns")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {"titles": {}, "columns": {}}


def _path(root: Path, place: str, column: str) -> Path:
    kind, _, name = place.partition("/")
    return root / kind / column / f"{name}.mp4"


def _folder_name(name: str) -> str:
    return re.sub(r"[^\w-]+", "-", name)
