"""GPUs by name with memory and rates, for planning on a machine without them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ltx_train.contracts import UserError

GIB = 2**30
# Memory that the driver, the CUDA context and a desktop occupy.
_OVERHEAD_GIB = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A GPU by its datasheet: nominal memory; dense bfloat16 and float8 TFLOP/s and int8 TOPS; GB/s of memory, from the
    host, and from another device of the machine.

    fp8_tflops is 0 when the card has no float8 products.
    """

    name: str
    memory_gib: float
    bf16_tflops: float
    fp8_tflops: float
    int8_tops: float
    memory_gbs: float
    host_gbs: float
    peer_gbs: float

    @property
    def budget_gib(self) -> float:
        """Memory in GiB that a process may reserve."""
        return self.memory_gib - _OVERHEAD_GIB


# Vendors' datasheets: dense rates with float32 accumulation; PCIe 4 x16 moves about 25 GB/s, PCIe 5 about 55.
# Between devices: one direction of NVLink, otherwise through the host.
# name, memory, bfloat16, float8, int8, memory bandwidth, from the host, from another device
_DATA_SHEETS: tuple[tuple[str, float, float, float, float, float, float, float], ...] = (
    ("RTX 3060", 12, 25.6, 0, 102, 360, 25, 12),
    ("RTX 4070", 12, 58, 117, 233, 504, 25, 12),
    ("RTX 4080", 16, 97, 195, 390, 717, 25, 12),
    ("RTX 5080", 16, 113, 225, 450, 960, 55, 27),
    ("RTX 3090", 24, 71, 0, 284, 936, 25, 12),
    ("RTX 4090", 24, 165, 330, 660, 1008, 25, 12),
    ("RTX 5090", 32, 209, 419, 838, 1792, 55, 27),
    ("L40S", 48, 362, 733, 733, 864, 25, 12),
    ("A100 40GB", 40, 312, 0, 624, 1555, 25, 300),
    ("A100 80GB", 80, 312, 0, 624, 2039, 25, 300),
    ("H100", 80, 989, 1979, 1979, 3350, 55, 450),
    ("H200", 140, 989, 1979, 1979, 4800, 55, 450),
    ("RTX PRO 6000", 96, 504, 1007, 1007, 1792, 55, 27),
)
CARDS = tuple(
    Card(
        name=name, memory_gib=memory, bf16_tflops=bf16, fp8_tflops=fp8, int8_tops=int8, memory_gbs=bandwidth,
        host_gbs=host, peer_gbs=peer,
    )
    for name, memory, bf16, fp8, int8, bandwidth, host, peer in _DATA_SHEETS
)  # fmt: skip


def card_by_name(name: str) -> Card:
    """The largest card whose name contains all words of `name`. UserError lists the known cards."""
    words = name.lower().replace("nvidia", "").replace("geforce", "").replace("-", " ").split()
    matches = [card for card in CARDS if words and all(word in card.name.lower() for word in words)]
    if not matches:
        raise UserError(f"plan.card={name!r} is not known; there are: {', '.join(card.name for card in CARDS)}")
    return max(matches, key=lambda card: card.memory_gib)


def card_of_device(name: str, memory_gib: float) -> Card:
    """The card of a GPU in this machine by the name that its driver reports, with the memory that it really has."""
    known = [card for card in CARDS if card.name.lower().split()[-1] in name.lower().replace("gb", "")]
    nearest = min(known or CARDS, key=lambda card: abs(card.memory_gib - memory_gib))
    return replace(nearest, name=name, memory_gib=memory_gib)
