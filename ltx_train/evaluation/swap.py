"""The swap test: the same prompts and the same noise, and only the reference changes. Does the output follow it?

Owns the comparison of outputs and its verdict. Pure. Everything is measured against the floor of swapping the seed, and
against the base with the same references.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import combinations

import numpy as np
import torch

from ltx_train import rng
from ltx_train.evaluation.voice_features import Voice

ON, OFF, SILENCE, DROPPED = "adapter on", "adapter off", "silence", "no reference"
_DRAWS = 2000
# Fewer voiced frames than this share of those at strength 0: the sound is garbled.
_GARBLED = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """A generated clip. reference: the speaker whose voice it was given, empty for none. latent: flat, of what was
    generated. voice: None where there is no sound. strength: of the adapter."""

    arm: str
    reference: str
    prompt: str
    seed: int
    latent: np.ndarray
    voice: Voice | None
    strength: float = 1.0


@dataclass(frozen=True, slots=True)
class Effect:
    """A mean with its 95 % bootstrap interval over speakers."""

    mean: float
    low: float
    high: float

    @property
    def is_above_zero(self) -> bool:
        return self.low > 0

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


class Kind(StrEnum):
    """The finding behind the verdict."""

    follows = "follows"
    changes = "changes"
    ignores = "ignores"
    too_few = "too_few"


@dataclass(frozen=True, slots=True)
class SwapVerdict:
    """One sentence. Named as the verdicts of a page are."""

    kind: Kind
    text: str


def distance(outputs: Sequence[Output], arm: str) -> Effect:
    """How much farther apart outputs are when the reference is swapped than when the seed is, as a share of the latter:
    0 is the floor. Distances are root mean squares of latents."""
    own = [o for o in outputs if o.arm == arm and o.strength == 1]
    swapped = _pairs(own, lambda o: (o.prompt, o.seed), lambda o: o.reference)
    reseeded = _pairs(own, lambda o: (o.prompt, o.reference), lambda o: o.seed)
    if not swapped or not reseeded:
        return Effect(math.nan, math.nan, math.nan)
    floor = float(np.mean([_rms(a, b) for a, b in reseeded]))
    return _bootstrapped([(a.reference, b.reference, _rms(a, b) / floor - 1) for a, b in swapped])


def pitch(outputs: Sequence[Output], arm: str, references: Mapping[str, Voice], strength: float = 1.0) -> Effect:
    """Semitones that the output's pitch moves per semitone between two references: 0 for a model that ignores them, 1
    for one that takes the pitch over. Pairs share prompt and seed, so what they do by themselves cancels."""
    return _followed(outputs, arm, {who: v.semitones for who, v in references.items()}, lambda v: v.semitones, strength)


def timbre(outputs: Sequence[Output], arm: str, references: Mapping[str, Voice]) -> Effect:
    """The same along the difference between two references' mean spectra."""
    moves: list[tuple[str, str, float]] = []
    for a, b in _pairs([o for o in outputs if o.arm == arm and o.strength == 1], _same, lambda o: o.reference):
        if a.voice is None or b.voice is None:
            continue
        first, second = (np.asarray(references[o.reference].spectrum) for o in (a, b))
        wanted = first - second
        got = np.asarray(a.voice.spectrum) - np.asarray(b.voice.spectrum)
        moves.append((a.reference, b.reference, float(got @ wanted / max(1e-9, wanted @ wanted))))
    return _bootstrapped(moves)


def matrix(outputs: Sequence[Output], arm: str, references: Mapping[str, Voice]) -> np.ndarray:
    """(references, references): mean distance of the outputs with a row's reference to each column's, in z-scores of
    pitch and spectrum together. A small diagonal is what following looks like."""
    names = sorted(references)
    targets = {who: _point(references[who]) for who in names}
    spread = np.nanstd(np.stack(list(targets.values())), axis=0) + 1e-9
    found = np.full((len(names), len(names)), np.nan)
    for row, who in enumerate(names):
        own = [o.voice for o in outputs if o.arm == arm and o.reference == who and o.strength == 1 and o.voice]
        if own:
            mean = np.nanmean(np.stack([_point(voice) for voice in own]), axis=0)
            for column, other in enumerate(names):
                found[row, column] = float(np.sqrt(np.nanmean(((mean - targets[other]) / spread) ** 2)))
    return found


def hits(distances: np.ndarray) -> tuple[float, float]:
    """Share of rows whose smallest distance is on the diagonal, and that by chance."""
    rows = [row for row in range(len(distances)) if np.isfinite(distances[row]).all()]
    if not rows:
        return math.nan, math.nan
    return float(np.mean([int(np.argmin(distances[row])) == row for row in rows])), 1 / len(distances)


def garbling(outputs: Sequence[Output]) -> tuple[dict[float, float], float | None]:
    """Voiced share by strength, and the lowest strength at which less than half of the base's is left."""
    shares: dict[float, list[float]] = {}
    for o in outputs:
        if o.arm == ON and o.voice is not None:
            shares.setdefault(o.strength, []).append(o.voice.voiced)
    means = {strength: float(np.mean(values)) for strength, values in sorted(shares.items())}
    base = means.get(0.0)
    lost = [s for s, share in means.items() if base is not None and share < _GARBLED * base]
    return means, min(lost, default=None)


def verdict(outputs: Sequence[Output], references: Mapping[str, Voice]) -> SwapVerdict:
    """Whether the output follows the reference, in a sentence."""
    if len(references) < 3:
        text = f"{len(references)} references: the swap test needs three held-out speakers or more for an interval."
        return SwapVerdict(Kind.too_few, text)
    moved, base, apart = pitch(outputs, ON, references), pitch(outputs, OFF, references), distance(outputs, ON)
    shape = timbre(outputs, ON, references)
    numbers = (
        f"Per semitone between two references the output moves {moved} semitones (base: {base}); along the difference "
        f"of their spectra {shape}. Swapping the reference moves the latents {apart} beyond swapping the seed."
    )
    voice_moves = moved.is_above_zero and moved.mean > base.mean
    if voice_moves or (shape.is_above_zero and shape.mean > timbre(outputs, OFF, references).mean):
        return SwapVerdict(Kind.follows, f"The output follows the reference. {numbers}")
    if apart.is_above_zero:
        return SwapVerdict(Kind.changes, f"The reference changes the output, but not towards its voice. {numbers}")
    return SwapVerdict(Kind.ignores, f"No effect of the reference on the output is shown. {numbers}")


def _same(output: Output) -> tuple[str, int]:
    return output.prompt, output.seed


def _followed(
    outputs: Sequence[Output], arm: str, wanted: Mapping[str, float], value: Callable[[Voice], float], strength: float
) -> Effect:
    """Least squares through zero of the outputs' differences on the references' differences, pair by pair."""
    pairs: list[tuple[str, str, float, float]] = []
    for a, b in _pairs([o for o in outputs if o.arm == arm and o.strength == strength], _same, lambda o: o.reference):
        if a.voice is None or b.voice is None:
            continue
        x, y = wanted[a.reference] - wanted[b.reference], value(a.voice) - value(b.voice)
        if math.isfinite(x) and math.isfinite(y):
            pairs.append((a.reference, b.reference, x, y))
    if not pairs:
        return Effect(math.nan, math.nan, math.nan)
    square = float(np.mean([x * x for _, _, x, _ in pairs])) or 1.0
    return _bootstrapped([(a, b, x * y / square) for a, b, x, y in pairs])


def _pairs(
    outputs: Iterable[Output], same: Callable[[Output], object], other: Callable[[Output], object]
) -> list[tuple[Output, Output]]:
    """Pairs that agree in `same` and differ in `other`."""
    groups: dict[object, list[Output]] = {}
    for output in outputs:
        groups.setdefault(same(output), []).append(output)
    return [(a, b) for group in groups.values() for a, b in combinations(group, 2) if other(a) != other(b)]


def _bootstrapped(values: Sequence[tuple[str, str, float]]) -> Effect:
    """The mean of values of pairs of speakers. Speakers are drawn again, because pairs of one are not independent: a
    pair counts as often as both of its speakers were drawn."""
    names = sorted({who for a, b, _ in values for who in (a, b)})
    if len(names) < 2:
        return Effect(math.nan, math.nan, math.nan)
    place = {who: number for number, who in enumerate(names)}
    first = np.array([place[a] for a, _, _ in values])
    second = np.array([place[b] for _, b, _ in values])
    numbers = np.array([value for *_, value in values])
    draws = torch.randint(len(names), (_DRAWS, len(names)), generator=rng.generator(0, "swap/bootstrap"))
    counts = torch.nn.functional.one_hot(draws, len(names)).sum(dim=1).numpy()
    weights = (counts[:, first] * counts[:, second]).astype(float)
    totals = weights.sum(axis=1)
    means = (weights[totals > 0] @ numbers) / totals[totals > 0]
    low, high = np.quantile(means, (0.025, 0.975))
    return Effect(float(numbers.mean()), float(low), float(high))


def _rms(a: Output, b: Output) -> float:
    return float(np.sqrt(np.mean((a.latent - b.latent) ** 2)))


def _point(voice: Voice) -> np.ndarray:
    """Pitch and spectrum with equal weight."""
    spectrum = np.asarray(voice.spectrum)
    return np.concatenate([np.full(len(spectrum), voice.semitones), spectrum])
