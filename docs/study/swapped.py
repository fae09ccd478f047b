"""The swap test on data whose truth is known: clips are generated with every speaker's reference, and compared with
the speakers' own identities.

Owns which clips are generated. A clip is an identity's numbers, so the generated latent itself is compared, as the
spectrum of a voice is in the swap test of sounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ltx_train.assembly import requests
from ltx_train.assembly.setup import Setup
from ltx_train.data.collate import collate
from ltx_train.data.index import HELDOUT, Index
from ltx_train.data.order import Address
from ltx_train.data.reader import Reader, ReadRequest
from ltx_train.evaluation import heldout, swap
from ltx_train.evaluation.swap import OFF, ON, Aspect, Output
from ltx_train.evaluation.traits import Traits
from ltx_train.model import adapter
from ltx_train.model.transformer import Transformer

SPEAKERS, SEEDS = 12, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class SwappedClips:
    """What is generated from. identities: each speaker's numbers (n,)."""

    run: Setup
    root: Path
    index: Index
    identities: Mapping[str, Tensor]

    def measured(self, transformer: Transformer) -> dict[str, object]:
        """The verdict of the swap test, and the shares of the identities' differences that its sentence is made of."""
        with heldout.undisturbed(transformer):
            outputs = list(self._outputs(transformer))
        references = {who: _traits(numbers) for who, numbers in self.identities.items()}
        return {
            "found": swap.verdict(outputs, references).kind.value,
            "adapter": asdict(swap.followed(outputs, ON, references, Aspect.spectrum)),
            "base": asdict(swap.followed(outputs, OFF, references, Aspect.spectrum)),
            "gained": asdict(swap.gained(outputs, references, Aspect.spectrum)),
            "beyond_seed": asdict(swap.distance(outputs, ON)),
        }

    def _outputs(self, transformer: Transformer) -> Iterator[Output]:
        """Every speaker's reference under both arms, for one prompt and all seeds."""
        config = self.run.config
        reader = Reader(self.root, self.index, seed=config.eval.seed, request=ReadRequest.of([config.mode]))
        clips = {r.speaker: r for r in self.index.split(HELDOUT)}
        prompt = next(iter(clips.values()))
        for who in self.identities:
            sample = reader.with_references_of(Address(prompt.key, 0), clips[who].key)
            request = requests.of_batch(config.mode, collate([sample]), None, prompt.fps)
            for seed in range(SEEDS):
                chosen = replace(
                    config, sample=replace(config.sample, seed=seed, steps=8, video_cfg=1.0, audio_cfg=1.0)
                )
                for arm in (ON, OFF):
                    with adapter.disabled(transformer) if arm == OFF else nullcontext():
                        _, latent = requests.generate(transformer, chosen, request, self.run.device)
                    assert latent is not None
                    numbers = latent.transpose(0, 1).flatten(1).mean(dim=0)  # (c, T, f) -> (c * f,)
                    yield Output(
                        arm=arm, reference=who, prompt=prompt.key, seed=seed, latent=numbers.numpy(),
                        traits=_traits(numbers),
                    )  # fmt: skip


def speakers(index: Index) -> list[str]:
    """The first held-out speakers."""
    return sorted({r.speaker for r in index.split(HELDOUT)})[:SPEAKERS]


def _traits(numbers: Tensor) -> Traits:
    """Of a clip without pitch: its numbers in the place of a spectrum."""
    return Traits(semitones=math.nan, voiced=1.0, spectrum=tuple(numbers.to(torch.float64).tolist()))
