"""Keyed randomness: every random number is a function of (seed, purpose, key, draw).

Owns the derivation of seeds from keys, and of generators on the CPU from seeds. It must not depend on ranks, workers,
epochs or history, so that a resumed run, or one on another number of ranks, draws the same numbers.
"""

from __future__ import annotations

import hashlib
from typing import Final

import torch
from torch import Tensor

_SEED_BYTES: Final = 8


def key_seed(seed: int, purpose: str, key: str = "", draw: int = 0) -> int:
    """A 63-bit seed from the four arguments. It is the same on any machine and in any Python version."""
    # No purpose contains the unit separator, so different arguments give different texts.
    text = "\x1f".join((str(seed), purpose, key, str(draw)))
    digest = hashlib.blake2b(text.encode(), digest_size=_SEED_BYTES).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, purpose: str, key: str = "", draw: int = 0) -> torch.Generator:
    """A generator for one purpose of one sample, on the CPU because its numbers are the same on every machine."""
    return torch.Generator().manual_seed(key_seed(seed, purpose, key, draw))


def normal(shape: tuple[int, ...], seed: int, purpose: str, key: str = "", draw: int = 0) -> Tensor:
    """Standard normal numbers (*shape), float32."""
    return torch.randn(shape, generator=generator(seed, purpose, key, draw))


def uniform(seed: int, purpose: str, key: str = "", draw: int = 0, count: int = 1) -> Tensor:
    """`count` numbers from U[0, 1), float32."""
    return torch.rand(count, generator=generator(seed, purpose, key, draw))


def choice(count: int, seed: int, purpose: str, key: str = "", draw: int = 0) -> int:
    """One index in [0, count)."""
    return int(torch.randint(count, (1,), generator=generator(seed, purpose, key, draw)))
