"""Clips of `eval.prompts` while a run trains: of the base once, and of the weights of each generation.

Owns the requests, which are encoded before the model is loaded, and the folder `samples/prompts`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from ltx_train import config as configuration
from ltx_train.assembly import encoder_builder, requests
from ltx_train.assembly.requests import SampleRequest
from ltx_train.assembly.setup import Setup
from ltx_train.config import Config
from ltx_train.contracts import Clip, UserError
from ltx_train.evaluation import heldout
from ltx_train.model import adapter
from ltx_train.model.transformer import Pair, Transformer

SECONDS = "perf/generate_s"
_BASE = "base"


class PromptedClips:
    """Encodes the prompts of a run. The leading rank does, for all; no encoder stays on the device."""

    def __init__(self, setup: Setup, folder: Path) -> None:
        self._setup, self._folder = setup, folder / "samples" / "prompts"
        configs = configuration.prompted(setup.config)
        self._requests = list(zip(configs, setup.ranks.lead(lambda: _encoded(setup, configs)), strict=False))
        # Of ranks that share each sample's tokens one writes.
        self._writes = setup.ranks.rank % setup.sharing.sequence == 0

    def generate(self, transformer: Transformer, step: int) -> tuple[list[Clip], Mapping[str, float]]:
        """The clips of a step, and the seconds that they took. Step 0 has those of the base: a new adapter changes
        nothing. A failure is printed and costs the clips alone."""
        if not self._requests:
            return [], {}
        started = time.perf_counter()
        name = f"step-{step:06d}" if step else _BASE
        with heldout.undisturbed(transformer):
            off = adapter.disabled(transformer) if step == 0 and not self._setup.sharing.full else nullcontext()
            with off:
                clips = self._generated(transformer, self._folder / name)
        self._setup.ranks.any(False)  # a barrier: all ranks have written theirs
        return clips, {SECONDS: time.perf_counter() - started}

    def _generated(self, transformer: Transformer, folder: Path) -> list[Clip]:
        setup = self._setup
        made: list[tuple[int, SampleRequest, Pair]] = []
        numbered = list(enumerate(self._requests))
        try:
            for (number, (config, request)), counts in setup.share.turns(numbered):
                with adapter.at_strength(transformer, config.sample.strength):
                    latents = requests.generate(transformer, config, request, setup.device)
                if counts and self._writes:
                    made.append((number, request, latents))
            self._write(made, folder)
        except (UserError, OSError, torch.OutOfMemoryError) as error:
            if setup.sharing.measures_together:
                raise  # the other ranks wait for this one's passes
            print(f"ltx-train: no clips in {folder}: {error}; the run goes on", file=sys.stderr)
            if setup.device.type == "cuda":
                torch.cuda.empty_cache()
            return []
        return [Clip(config.sample.prompt, _path(folder, n)) for n, (config, _) in enumerate(self._requests)]

    def _write(self, made: Sequence[tuple[int, SampleRequest, Pair]], folder: Path) -> None:
        """The decoders come after the last pass of the transformer, and go before the training goes on."""
        if not made:
            return
        decoder = encoder_builder.decoder(self._setup.config, self._setup.device)
        for number, request, latents in made:
            requests.write(decoder, request, latents, _path(folder, number))


def of_run(config: Config, folder: Path) -> dict[str, list[Clip]]:
    """The clips that a run has generated so far, by prompt and seed: the base's first, then those of its steps."""
    found: dict[str, list[Clip]] = {}
    root = folder / "samples" / "prompts"
    for number, made in enumerate(configuration.prompted(config)):
        paths = [path for name in sorted(root.glob("*")) if (path := _path(name, number)).is_file()]
        clips = [Clip(path.parent.name.replace("step-", "step "), path) for path in paths]
        if clips:
            found[f"{made.sample.prompt} (clip {number + 1}, seed {made.sample.seed})"] = clips
    return found


def _encoded(setup: Setup, configs: Sequence[Config]) -> list[SampleRequest]:
    """The text encoder comes first and goes before the others come. Nothing, with a line, where that fails: a run does
    without clips rather than not at all."""
    try:
        encoders = encoder_builder.encoders(setup.config, setup.ranks)
        texts = [requests.contexts(config, encoders) for config in configs]
        encoders.release_text()
        return [requests.request(config, encoders, text) for config, text in zip(configs, texts, strict=True)]
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        print(f"ltx-train: no clips of eval.prompts: {error}; the run goes on", file=sys.stderr)
        return []


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number + 1:02d}.mp4"
