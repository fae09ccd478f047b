"""How much of the target's attention goes to the references: a second witness beside the reference gap.

Owns the measurement only. Attention says that something is looked at, not that it is used.
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
from ltx_train.memory.blocks.runner import BlockRunner
from ltx_train.model.attention import key_mass
from ltx_train.model.transformer import Block, Stream, Transformer

_QUERIES = 256


@dataclass(frozen=True, slots=True)
class Mass:
    """One block at one noise level: the share of attention, mean over heads and target queries, and the share that
    an even spread over all keys would give."""

    block: int
    sigma: float
    share: float
    even: float


class Probe:
    """Called with every block's arguments; sums up the self-attention of one modality's target on later keys."""

    def __init__(self, modality: ModalityName, targets: int) -> None:
        self._name, self._targets = modality, targets
        self.shares: list[tuple[int, float, float]] = []

    def __call__(self, index: int, block: Block, video: object, audio: object, *streams: object) -> None:
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
        seen = block.attended(hidden, stream, prefix)
        attention = block.get_submodule(f"{prefix}attn1")
        share = key_mass(attention, seen, stream.rotary, bias=stream.self_bias, rows=rows, first_key=self._targets)
        self.shares.append((index, share, 1 - self._targets / keys))


def measure(
    transformer: Transformer, root: str, index: Index, settings: MeasurementSettings, *,
    levels: Sequence[float],
    device: torch.device, share: tuple[int, int] = (0, 1),
) -> list[Mass]:  # fmt: skip
    """Masses of the held-out split with its own references; empty when the mode has none."""
    streams = {c.stream for c in settings.mode.references}
    runner = transformer.run_block
    if not streams or not isinstance(runner, BlockRunner):
        return []
    reader = Reader(root, index, seed=settings.seed, request=heldout.read_request(settings))
    found: list[Mass] = []
    with heldout.undisturbed(transformer):
        for addresses in heldout.batches(index, settings)[share[0] :: share[1]]:
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
                    found += [Mass(block, sigma, mass, even) for block, mass, even in probe.shares]
    return found


def summary(masses: Sequence[Mass]) -> dict[str, float]:
    """`val/reference_attention`: the share that references get, over what an even spread would give them."""
    if not masses:
        return {}
    return {"val/reference_attention": sum(m.share for m in masses) / sum(m.even for m in masses)}
