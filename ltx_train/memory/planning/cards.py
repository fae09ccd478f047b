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
CARDS = (
    Card(
        name="RTX 3060",
        memory_gib=12,
        bf16_tflops=25.6,
        fp8_tflops=0,
        int8_tops=102,
        memory_gbs=360,
        host_gbs=25,
        peer_gbs=12,
    ),
    Card(
        name="RTX 4070",
        memory_gib=12,
        bf16_tflops=58,
        fp8_tflops=117,
        int8_tops=233,
        memory_gbs=504,
        host_gbs=25,
        peer_gbs=12,
    ),
    Card(
        name="RTX 4080",
        memory_gib=16,
        bf16_tflops=97,
        fp8_tflops=195,
        int8_tops=390,
        memory_gbs=717,
        host_gbs=25,
        peer_gbs=12,
    ),
    Card(
        name="RTX 5080",
        memory_gib=16,
        bf16_tflops=113,
        fp8_tflops=225,
        int8_tops=450,
        memory_gbs=960,
        host_gbs=55,
        peer_gbs=27,
    ),
    Card(
        name="RTX 3090",
        memory_gib=24,
        bf16_tflops=71,
        fp8_tflops=0,
        int8_tops=284,
        memory_gbs=936,
        host_gbs=25,
        peer_gbs=12,
    ),
    Card(
        name="RTX 4090",
        memory_gib=24,
        bf16_tflops=165,
        fp8_tflops=330,
        int8_tops=660,
        memory_gbs=1008,
        host_gbs=25,
        peer_gbs=12,
    ),
    Card(
        name="RTX 5090",
        memory_gib=32,
        bf16_tflops=209,
        fp8_tflops=419,
        int8_tops=838,
        memory_gbs=1792,
        host_gbs=55,
        peer_gbs=27,
    ),
    Card(
        name="L40S",
        memory_gib=48,
        bf16_tflops=362,
        fp8_tflops=733,
        int8_tops=733,
        memory_gbs=864,
        host_gbs=25,
        peer_gbs=12,
    ),
    Card(
        name="A100 40GB",
        memory_gib=40,
        bf16_tflops=312,
        fp8_tflops=0,
        int8_tops=624,
        memory_gbs=1555,
        host_gbs=25,
        peer_gbs=300,
    ),
    Card(
        name="A100 80GB",
        memory_gib=80,
        bf16_tflops=312,
        fp8_tflops=0,
        int8_tops=624,
        memory_gbs=2039,
        host_gbs=25,
        peer_gbs=300,
    ),
    Card(
        name="H100",
        memory_gib=80,
        bf16_tflops=989,
        fp8_tflops=1979,
        int8_tops=1979,
        memory_gbs=3350,
        host_gbs=55,
        peer_gbs=450,
    ),
    Card(
        name="H200",
        memory_gib=140,
        bf16_tflops=989,
        fp8_tflops=1979,
        int8_tops=1979,
        memory_gbs=4800,
        host_gbs=55,
        peer_gbs=450,
    ),
    Card(
        name="RTX PRO 6000",
        memory_gib=96,
        bf16_tflops=504,
        fp8_tflops=1007,
        int8_tops=1007,
        memory_gbs=1792,
        host_gbs=55,
        peer_gbs=27,
    ),
)


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
