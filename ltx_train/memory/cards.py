"""GPUs by name: memory and rates, for planning on a machine that has none of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ltx_train.contracts import UserError

GIB = 2**30
# What the driver, the CUDA context and a desktop take before the process gets anything.
_OVERHEAD_GIB = 1.0


@dataclass(frozen=True, slots=True)
class Card:
    """memory_gib as sold; dense bfloat16 and float8 TFLOP/s, memory GB/s, host-to-device GB/s and GB/s from another
    device of the machine by datasheet.

    fp8_tflops 0: the card multiplies no float8.
    """

    name: str
    memory_gib: float
    bf16_tflops: float
    fp8_tflops: float
    memory_gbs: float
    host_gbs: float
    peer_gbs: float

    @property
    def budget_gib(self) -> float:
        """What a process may reserve."""
        return self.memory_gib - _OVERHEAD_GIB


# Vendors' datasheets: dense rates with float32 accumulation; PCIe 4 x16 moves about 25 GB/s, PCIe 5 about 55.
# Between devices: one direction of NVLink, otherwise through the host.
CARDS = (
    Card("RTX 3090", 24, 71, 0, 936, 25, 12),
    Card("RTX 4090", 24, 165, 330, 1008, 25, 12),
    Card("RTX 5090", 32, 209, 419, 1792, 55, 27),
    Card("L40S", 48, 362, 733, 864, 25, 12),
    Card("A100 40GB", 40, 312, 0, 1555, 25, 300),
    Card("A100 80GB", 80, 312, 0, 2039, 25, 300),
    Card("H100", 80, 989, 1979, 3350, 55, 450),
    Card("H200", 140, 989, 1979, 4800, 55, 450),
    Card("RTX PRO 6000", 96, 504, 1007, 1792, 55, 27),
)


def card_by_name(name: str) -> Card:
    """The card whose name contains all words of `name`; `A100` is the larger one. UserError lists the known ones."""
    words = name.lower().replace("nvidia", "").replace("geforce", "").replace("-", " ").split()
    found = [card for card in CARDS if words and all(word in card.name.lower() for word in words)]
    if not found:
        raise UserError(f"plan.card={name!r} is not known; there are: {', '.join(card.name for card in CARDS)}")
    return max(found, key=lambda card: card.memory_gib)


def card_of_device(name: str, memory_gib: float) -> Card:
    """A card for the GPU of this machine by its driver's name, with the memory it really has."""
    known = [card for card in CARDS if card.name.lower().split()[-1] in name.lower().replace("gb", "")]
    nearest = min(known or CARDS, key=lambda card: abs(card.memory_gib - memory_gib))
    return replace(nearest, name=name, memory_gib=memory_gib)
