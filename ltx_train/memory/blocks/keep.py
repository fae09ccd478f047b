"""What each block keeps between forward and backward, and which blocks are streamed or offloaded.

Pure: counts to indices. Any block may keep everything, a streamed one too: autograd saves the parameters themselves,
whose storage the weight stream refills before backward, so the numbers are the same. A quantized block then also keeps
its dequantized weights. The plan combines an explicit `memory.keep_everything` with streamed blocks where that fits.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Keep(StrEnum):
    """The tensors of a block that stay in memory between forward and backward.

    everything: nothing is computed twice. attention: the outputs of self-attention stay, the rest is recomputed.
    inputs: the whole block is recomputed.
    """

    everything = "everything"
    attention = "attention"
    inputs = "inputs"


@dataclass(frozen=True, slots=True)
class Arrangement:
    """By block index: the streamed blocks, what each block keeps, and the blocks whose inputs wait on the host."""

    streamed: list[int]
    keep: list[Keep]
    offloaded: list[int]


def arrange(layers: int, keep: Keep, *, keep_everything: int, stream_blocks: int, offload_inputs: bool) -> Arrangement:
    """Counts to indices, evenly spaced; resident blocks are the first to keep everything."""
    streamed = evenly_spaced(min(stream_blocks, layers), layers)
    resident = [i for i in range(layers) if i not in set(streamed)]
    keeping: set[int] = set()
    for blocks in (resident, streamed):
        count = min(keep_everything - len(keeping), len(blocks))
        keeping |= {blocks[i] for i in evenly_spaced(count, len(blocks))}
    kept = [Keep.everything if i in keeping else keep for i in range(layers)]
    offloaded = [i for i in range(layers) if offload_inputs and kept[i] is not Keep.everything]
    return Arrangement(streamed, kept, offloaded)


def evenly_spaced(count: int, total: int) -> list[int]:
    """`count` of `total` indices. Between streamed blocks there is computation for their copies to hide behind."""
    return [i for i in range(total) if (i * count) // total != ((i + 1) * count) // total]
