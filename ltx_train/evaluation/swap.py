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
from ltx_train.evaluation.traits import Traits
from ltx_train.evaluation.verdicts import Kind, Verdict

ON, OFF, SILENCE, DROPPED = "adapter on", "adapter off", "silence", "no reference"
_DRAWS = 2000
# Fewer voiced frames than this share of those at strength 0: the sound is garbled.
_GARBLED = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """A generated clip. reference: the speaker whose voice it was given, empty for none. variant: the change of that
    recording, empty for none. latent: flat, of what was generated. traits: None where there is no sound. strength: of
    the adapter."""

    arm: str
    reference: str
    prompt: str
    seed: int
    latent: np.ndarray
    traits: Traits | None
    strength: float = 1.0
    variant: str = ""


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


class Measure(StrEnum):
    """What the distance of two outputs is measured in."""

    latents = "latents"
    mel = "log-mel"


def distance(outputs: Sequence[Output], arm: str, measure: Measure = Measure.latents) -> Effect:
    """How much farther apart outputs are when the reference is swapped than when the seed is, as a share of the latter:
    0 is the floor. Distances are root mean squares."""
    own = [o for o in _plain(outputs, arm) if len(_measured(o, measure))]
    swapped = _pairs(own, lambda o: (o.prompt, o.seed), lambda o: o.reference)
    reseeded = _pairs(own, lambda o: (o.prompt, o.reference), lambda o: o.seed)
    if not swapped or not reseeded:
        return Effect(math.nan, math.nan, math.nan)
    floor = float(np.mean([_rms(a, b, measure) for a, b in reseeded]))
    if not floor:
        return Effect(math.nan, math.nan, math.nan)
    return _bootstrapped(
        {(a.reference, b.reference, a.prompt, a.seed): _rms(a, b, measure) / floor - 1 for a, b in swapped}
    )


class Aspect(StrEnum):
    """What of a person the output may take over."""

    pitch = "pitch"
    spectrum = "spectrum"
    speaker = "speaker embedding"
    face = "face embedding"


def aspects(references: Mapping[str, Traits]) -> list[Aspect]:
    """Those that are measured in two references."""
    return [a for a in Aspect if sum(len(_of(traits, a)) > 0 for traits in references.values()) > 1]


def followed(
    outputs: Sequence[Output], arm: str, references: Mapping[str, Traits], aspect: Aspect, *, strength: float = 1.0,
    variant: str = "",
) -> Effect:  # fmt: skip
    """Share of the difference between two references that the outputs take over: 0 for a model that ignores them, 1 for
    one that becomes them. For the pitch, semitones per semitone; for spectrum and embeddings, along the difference of
    the two.

    Pairs share prompt and seed, so what these do by themselves cancels.
    """
    return _bootstrapped(_shares(outputs, arm, references, aspect, strength=strength, variant=variant))


def gained(outputs: Sequence[Output], references: Mapping[str, Traits], aspect: Aspect) -> Effect:
    """The same with the adapter minus without it, pair by pair: what the base does by itself is not the adapter's."""
    on, off = (_shares(outputs, arm, references, aspect) for arm in (ON, OFF))
    return _bootstrapped({pair: value - off[pair] for pair, value in on.items() if pair in off})


def matrix(outputs: Sequence[Output], arm: str, references: Mapping[str, Traits]) -> np.ndarray:
    """(references, references): mean distance of the outputs with a row's reference to each column's, in z-scores of
    pitch and spectrum together. A small diagonal is what following looks like."""
    names = sorted(references)
    targets = {who: _point(references[who]) for who in names}
    spread = np.nanstd(np.stack(list(targets.values())), axis=0) + 1e-9
    found = np.full((len(names), len(names)), np.nan)
    for row, who in enumerate(names):
        own = [o.traits for o in _plain(outputs, arm) if o.reference == who and o.traits]
        points = [point for traits in own if np.isfinite(point := _point(traits)).all()]
        if points:
            mean = np.mean(np.stack(points), axis=0)
            for column, other in enumerate(names):
                found[row, column] = float(np.sqrt(np.mean(((mean - targets[other]) / spread) ** 2)))
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
        if o.arm == ON and o.traits is not None and not o.variant:
            shares.setdefault(o.strength, []).append(o.traits.voiced)
    means = {strength: float(np.mean(values)) for strength, values in sorted(shares.items())}
    base = means.get(0.0)
    lost = [s for s, share in means.items() if base is not None and share < _GARBLED * base]
    return means, min(lost, default=None)


def verdict(outputs: Sequence[Output], references: Mapping[str, Traits]) -> Verdict:
    """Whether the output follows the reference, and whether that is the adapter's, in a sentence."""
    if len(references) < 3:
        text = f"{len(references)} references: the swap test needs three held-out speakers or more for an interval."
        return Verdict(Kind.too_few_identities, text)
    on = {aspect: followed(outputs, ON, references, aspect) for aspect in aspects(references)}
    own = {aspect: gained(outputs, references, aspect) for aspect in on}
    apart = distance(outputs, ON)
    shares = "; ".join(f"{aspect.value} {on[aspect]}, gained {own[aspect]}" for aspect in on)
    numbers = (
        f"Share of the difference between two references that the output takes over: {shares}. Swapping the reference "
        f"moves the latents {apart} beyond swapping the seed."
    )
    if any(effect.is_above_zero for effect in own.values()):
        return Verdict(Kind.swap_follows, f"With the adapter the output follows the reference. {numbers}")
    if any(effect.is_above_zero for effect in on.values()):
        text = f"The output follows the reference, but not more than the base's does by itself. {numbers}"
        return Verdict(Kind.swap_follows_the_base, text)
    if apart.is_above_zero:
        return Verdict(Kind.swap_changes, f"The reference changes the output, but not towards its voice. {numbers}")
    return Verdict(Kind.swap_ignores, f"No effect of the reference on the output is shown. {numbers}")


def _same(output: Output) -> tuple[str, int]:
    return output.prompt, output.seed


_Pair = tuple[str, str, str, int]  # both references, the prompt, the seed


def _shares(
    outputs: Sequence[Output], arm: str, references: Mapping[str, Traits], aspect: Aspect, *, strength: float = 1.0,
    variant: str = "",
) -> dict[_Pair, float]:  # fmt: skip
    """Each pair's part of the slope through zero: its product of differences over the references' mean square."""
    products: dict[_Pair, float] = {}
    squares: list[float] = []
    alike = (o for o in outputs if (o.arm, o.strength, o.variant) == (arm, strength, variant))
    own = sorted(alike, key=lambda o: o.reference)
    for a, b in _pairs(own, _same, lambda o: o.reference):
        if a.traits is None or b.traits is None:
            continue
        vectors = [_of(t, aspect) for t in (references[a.reference], references[b.reference], a.traits, b.traits)]
        if not all(len(vector) for vector in vectors):
            continue
        target, moved = vectors[0] - vectors[1], vectors[2] - vectors[3]
        if np.isfinite(target).all() and np.isfinite(moved).all():
            products[a.reference, b.reference, a.prompt, a.seed] = float(moved @ target)
            squares.append(float(target @ target))
    scale = max(1e-12, float(np.mean(squares))) if squares else 1.0
    return {pair: product / scale for pair, product in products.items()}


def _of(traits: Traits, aspect: Aspect) -> np.ndarray:
    """Empty for what was not measured."""
    by_aspect: dict[Aspect, Sequence[float]] = {
        Aspect.pitch: [traits.semitones] if math.isfinite(traits.semitones) else (),
        Aspect.spectrum: traits.spectrum, Aspect.speaker: traits.speaker, Aspect.face: traits.face,
    }  # fmt: skip
    return np.asarray(by_aspect[aspect])


def _plain(outputs: Iterable[Output], arm: str) -> list[Output]:
    """Outputs of an arm at the adapter's own strength and with the references as recorded."""
    return [o for o in outputs if o.arm == arm and o.strength == 1 and not o.variant]


def _pairs(
    outputs: Iterable[Output], same: Callable[[Output], object], other: Callable[[Output], object]
) -> list[tuple[Output, Output]]:
    """Pairs that agree in `same` and differ in `other`."""
    groups: dict[object, list[Output]] = {}
    for output in outputs:
        groups.setdefault(same(output), []).append(output)
    return [(a, b) for group in groups.values() for a, b in combinations(group, 2) if other(a) != other(b)]


def _bootstrapped(values: Mapping[_Pair, float]) -> Effect:
    """The mean of values of pairs of speakers. Speakers are drawn again, because pairs of one are not independent: a
    pair counts as often as both of its speakers were drawn."""
    names = sorted({who for pair in values for who in pair[:2]})
    if len(names) < 2:
        return Effect(math.nan, math.nan, math.nan)
    place = {who: number for number, who in enumerate(names)}
    first = np.array([place[pair[0]] for pair in values])
    second = np.array([place[pair[1]] for pair in values])
    numbers = np.array(list(values.values()))
    draws = torch.randint(len(names), (_DRAWS, len(names)), generator=rng.generator(0, "swap/bootstrap"))
    counts = torch.nn.functional.one_hot(draws, len(names)).sum(dim=1).numpy()
    weights = (counts[:, first] * counts[:, second]).astype(float)
    totals = weights.sum(axis=1)
    means = (weights[totals > 0] @ numbers) / totals[totals > 0]
    low, high = np.quantile(means, (0.025, 0.975))
    return Effect(float(numbers.mean()), float(low), float(high))


def _measured(output: Output, measure: Measure) -> np.ndarray:
    if measure is Measure.latents:
        return output.latent
    return np.asarray(output.traits.mel if output.traits else ())


def _rms(a: Output, b: Output, measure: Measure) -> float:
    return float(np.sqrt(np.mean((_measured(a, measure) - _measured(b, measure)) ** 2)))


def _point(traits: Traits) -> np.ndarray:
    """Pitch and spectrum with equal weight."""
    spectrum = np.asarray(traits.spectrum)
    return np.concatenate([np.full(len(spectrum), traits.semitones), spectrum])
