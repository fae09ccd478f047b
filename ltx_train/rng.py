"""Keyed randomness: every random number is a function of (seed, purpose, key, draw).

Owns the only way to make a `torch.Generator` in this project. It must not know ranks, workers,
epochs or history: that is what makes a resumed or re-sharded run see the same numbers.
"""

from __future__ import annotations

import hashlib
from typing import Final

import torch
from torch import Tensor

_SEED_BYTES: Final = 8


def key_seed(seed: int, purpose: str, key: str = "", draw: int = 0) -> int:
    """A 63-bit seed from the four parts; equal parts give equal seeds on any machine and Python."""
    # The unit separator cannot occur in a purpose, so no two tuples share one text.
    text = "\x1f".join((str(seed), purpose, key, str(draw)))
    digest = hashlib.blake2b(text.encode(), digest_size=_SEED_BYTES).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, purpose: str, key: str = "", draw: int = 0) -> torch.Generator:
    """A CPU generator for one purpose of one sample; CPU, because its stream is the same on every machine."""
    return torch.Generator().manual_seed(key_seed(seed, purpose, key, draw))


def normal(shape: tuple[int, ...], seed: int, purpose: str, key: str = "", draw: int = 0) -> Tensor:
    """Standard normal numbers, float32, of the given shape."""
    return torch.randn(shape, generator=generator(seed, purpose, key, draw))


def uniform(seed: int, purpose: str, key: str = "", draw: int = 0, count: int = 1) -> Tensor:
    """`count` numbers from U[0, 1), float32."""
    return torch.rand(count, generator=generator(seed, purpose, key, draw))


def choice(count: int, seed: int, purpose: str, key: str = "", draw: int = 0) -> int:
    """One index in [0, count)."""
    return int(torch.randint(count, (1,), generator=generator(seed, purpose, key, draw)))
