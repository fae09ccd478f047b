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
    ("RTX 5070", 12, 61.7, 123.5, 246.9, 672, 55, 27),
    ("RTX 4060 Ti 16GB", 16, 44.1, 88.2, 176.5, 288, 12, 6),
    ("RTX 4070 Ti Super", 16, 88.2, 176.4, 352.8, 672, 25, 12),
    ("RTX 5070 Ti", 16, 87.9, 175.8, 351.5, 896, 55, 27),
    ("RTX 4080", 16, 97, 195, 390, 717, 25, 12),
    ("RTX 5080", 16, 113, 225, 450, 960, 55, 27),
    ("RTX 3090", 24, 71, 0, 284, 936, 25, 12),
    ("RTX 4090", 24, 165, 330, 660, 1008, 25, 12),
    ("RTX 5090", 32, 209, 419, 838, 1792, 55, 27),
    ("RTX A6000", 48, 154.8, 0, 309.7, 768, 25, 56),
    ("RTX 6000 Ada", 48, 364.2, 728.5, 728.5, 960, 25, 12),
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
    """The card of that name, or the largest whose name has all words of `name`. UserError lists the known cards."""
    words = _words(name)
    matches = [card for card in CARDS if words and all(word in card.name.lower() for word in words)]
    if not matches:
        raise UserError(f"plan.card={name!r} is not known; there are: {', '.join(card.name for card in CARDS)}")
    return max(matches, key=lambda card: (_words(card.name) == words, card.memory_gib))


def card_of_device(name: str, memory_gib: float) -> Card:
    """The card of a GPU in this machine by the name that its driver reports, with the memory that it really has."""
    words = set(_words(name))
    known = [card for card in CARDS if words >= set(_words(card.name)) - {"rtx", "16gb", "40gb", "80gb"}]
    if known:  # an RTX 5070 Ti is one, and an RTX 5070 too
        most = max(len(_words(card.name)) for card in known)
        known = [card for card in known if len(_words(card.name)) == most]
    nearest = min(known or CARDS, key=lambda card: abs(card.memory_gib - memory_gib))
    return replace(nearest, name=name, memory_gib=memory_gib)


def _words(name: str) -> list[str]:
    return name.lower().replace("nvidia", "").replace("geforce", "").replace("-", " ").split()
