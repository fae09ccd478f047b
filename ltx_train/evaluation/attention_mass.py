"""The share of the target's attention that goes to the references: a second measure beside the reference gap.

Owns the measurement only. Attention shows that the model reads the references, not that it uses them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ltx_train.contracts import Modality, ModalityName
from ltx_train.data.index import Index
from ltx_train.data.reader import Reader
from ltx_train.evaluation import heldout
from ltx_train.evaluation.heldout import MeasurementSettings
from ltx_train.evaluation.share import ALL, Share
from ltx_train.memory.blocks.runner import BlockRunner
from ltx_train.model.attention import key_mass
from ltx_train.model.transformer import Block, Stream, Transformer

_QUERIES = 256


@dataclass(frozen=True, slots=True)
class Mass:
    """Attention on the references in one block at one noise level.

    share: mean over heads and target queries; even: the share under uniform attention over all keys.
    """

    block: int
    sigma: float
    share: float
    even: float


class Probe:
    """Block probe: collects (block, share, even) of one modality's self-attention.

    share: the part of the target queries' attention on keys behind the target's `targets` tokens.
    """

    def __init__(self, modality: ModalityName, targets: int) -> None:
        self._name, self._targets = modality, targets
        self.shares: list[tuple[int, float, float]] = []

    def __call__(self, index: int, block: Block, video: object, audio: object, *streams: object, **_: bool) -> None:
        hidden, stream = (video, streams[0]) if self._name is ModalityName.video else (audio, streams[1])
        assert isinstance(hidden, torch.Tensor)
        assert isinstance(stream, Stream)
        if stream.token_slice is not None:
            hidden, stream = stream.token_slice.whole(hidden), stream.whole()
        prefix = "" if self._name is ModalityName.video else "audio_"
        keys = hidden.shape[1]
        if keys == self._targets:
            return
        step = max(1, self._targets // _QUERIES)
        rows = torch.arange(0, self._targets, step, device=hidden.device)
        inputs = block.attended(hidden, stream, prefix)
        attention = block.get_submodule(f"{prefix}attn1")
        share = key_mass(attention, inputs, stream.rotary, bias=stream.self_bias, rows=rows, first_key=self._targets)
        self.shares.append((index, share, 1 - self._targets / keys))


def measure(
    transformer: Transformer, root: str, index: Index, settings: MeasurementSettings, *,
    levels: Sequence[float], device: torch.device, share: Share = ALL,
) -> list[Mass]:  # fmt: skip
    """Masses of this process's share of the held-out split under its correct references; empty if the mode has no
    reference."""
    streams = {c.stream for c in settings.mode.references}
    runner = transformer.run_block
    if not streams or not isinstance(runner, BlockRunner):
        return []
    reader = Reader(root, index, seed=settings.seed, request=heldout.read_request(settings))
    masses: list[Mass] = []
    with heldout.undisturbed(transformer):
        for addresses, counts in share.turns(heldout.batches(index, settings)):
            arm = next(heldout.arms(reader, addresses, settings, with_base=False))
            for sigma in levels:
                inputs = heldout.inputs(arm, settings, sigma, device)
                for name in sorted(streams):
                    modality = inputs.video if name is ModalityName.video else inputs.audio
                    velocity = inputs.video_velocity if name is ModalityName.video else inputs.audio_velocity
                    assert isinstance(modality, Modality)
                    assert velocity is not None
                    probe = Probe(name, velocity.target.shape[1])
                    with runner.probed(probe):
                        transformer(inputs.video, inputs.audio)
                    if counts:
                        masses += [Mass(block, sigma, mass, even) for block, mass, even in probe.shares]
    return masses


def summary(masses: Sequence[Mass], base: Sequence[Mass] = ()) -> dict[str, float]:
    """`val/reference_attention`: mean share of attention on the references, divided by the mean even share.

    base: masses with the adapter off; then `val/gained_attention` is what the adapter adds to theirs.
    """
    if not masses:
        return {}
    found = {"val/reference_attention": _relative(masses)}
    return found | ({"val/gained_attention": _relative(masses) - _relative(base)} if base else {})


def _relative(masses: Sequence[Mass]) -> float:
    return sum(m.share for m in masses) / sum(m.even for m in masses)
