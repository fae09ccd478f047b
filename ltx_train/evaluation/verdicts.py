"""Verdicts: sentences a person can act on, about what measurements show and what they cannot show.

Owns the rules and their thresholds; pure. Every rule uses intervals over identities, never a mean alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from ltx_train.evaluation.history import Measured, difference
from ltx_train.evaluation.rows import (
    BASE,
    CAPTION,
    CORRECT,
    DROPPED,
    NEUTRAL,
    OFF,
    WRONG,
    Grid,
    Row,
    gained,
    has,
    mean,
    paired,
)
from ltx_train.evaluation.statistics import Interval

# An effect smaller than this share of the loss is no effect in practice, however narrow its interval.
_RELEVANT = 0.01
# A reference that resembles its own target this much more than chance is a copy of it.
_COPY = 0.9
_BY_CLIP = (
    "Held out are recordings of people who are also trained on, and below an identity is one recording: the numbers "
    "show whether clips are memorised, not how new people fare."
)
_ONE = "From one identity there is no interval and no conclusion."
_NO_NOISE: Mapping[str, float] = {}
_LOW_NOISE, _HIGH_NOISE, _FADED = 0.5, 0.75, 0.5


class Kind(StrEnum):
    """The finding behind a sentence. Tests and tables use the kind, people read the sentence."""

    nothing_heldout = "nothing_heldout"
    adapter_helps = "adapter_helps"
    adapter_hurts = "adapter_hurts"
    adapter_no_effect = "adapter_no_effect"
    reference_used = "reference_used"
    reference_leaked = "reference_leaked"
    reference_decorative = "reference_decorative"
    reference_misleads = "reference_misleads"
    reference_is_the_bases = "reference_is_the_bases"
    reference_unlearned = "reference_unlearned"
    reference_is_target = "reference_is_target"
    caption_carries = "caption_carries"
    too_few_identities = "too_few_identities"
    heldout_by_clip = "heldout_by_clip"
    not_learning = "not_learning"
    plateau = "plateau"
    overfitting = "overfitting"
    improving = "improving"
    swap_follows = "swap_follows"
    swap_follows_the_base = "swap_follows_the_base"
    swap_changes = "swap_changes"
    swap_ignores = "swap_ignores"


@dataclass(frozen=True, slots=True)
class Verdict:
    """One finding and its sentence."""

    kind: Kind
    text: str


def of_rows(
    rows: Sequence[Row], grid: Grid, likeness: float | None = None, *, by_clip: bool = False,
    noise: Mapping[str, float] = _NO_NOISE,
) -> list[Verdict]:  # fmt: skip
    """Verdicts on one adapter. Totals cover the grid's main levels; effects are searched for at every level.

    likeness: resemblance of references to their own targets beyond chance, at most 1 (`likeness.beyond_chance`).
    by_clip: recordings of trained people are held out, and each counts as an identity. noise: of repeated measuring
    (`rows.noise`).
    """
    if not rows:
        return [Verdict(Kind.nothing_heldout, "Nothing is held out, so there is no result for new identities.")]
    main = [row for row in rows if row.sigma in grid.main]
    verdicts = [Verdict(Kind.heldout_by_clip, _BY_CLIP)] if by_clip else list[Verdict]()
    if has(main, BASE):
        verdicts.append(_gain(paired(main, CORRECT, BASE), mean(main, BASE).mean, noise.get("val/adapter_gain_noise")))
    if has(main, WRONG):
        verdicts += _reference(main, rows, likeness, noise.get("val/gained_gap_noise"))
    elif has(main, CAPTION):
        verdicts += _caption(main)
    return verdicts


def _gain(gain: Interval, loss: float, noise: float | None) -> Verdict:
    intro = f"Adapter on minus off: {_sized(gain, loss)} without it, {loss:.4f}. {_repeated(noise)}"
    if math.isnan(gain.half):
        return Verdict(Kind.too_few_identities, intro + _ONE)
    if not gain.excludes_zero:
        text = intro + "The interval contains zero: no effect is shown." + _more(gain)
        return Verdict(Kind.adapter_no_effect, text)
    if gain.mean > 0:
        return Verdict(Kind.adapter_hurts, intro + "The adapter raises the held-out loss.")
    return Verdict(Kind.adapter_helps, intro + "The adapter lowers the held-out loss.")


def _reference(main: Sequence[Row], rows: Sequence[Row], likeness: float | None, noise: float | None) -> list[Verdict]:
    """By the gained gap: what the base does with a reference is not the adapter's. All weights have no base beside
    them; their own gap counts then."""
    gap, loss = _gap(main, WRONG), mean(main, CORRECT).mean
    intro = _introduced(main, gap, loss) + _repeated(noise)
    if math.isnan(gap.half):
        return [Verdict(Kind.too_few_identities, intro + _ONE)]
    if likeness is not None and likeness >= _COPY:
        text = intro + (
            f"The references are their own targets (likeness {likeness:.2f}): the gap shows copying, and "
            "nothing about identities. Take references from other clips and prepare again."
        )
        return [Verdict(Kind.reference_is_target, text)]
    levels, dropped = _levels_with_effect(rows), _beside(main)
    if gap.excludes_zero and gap.mean > 0 and not levels:
        return [_worse(main, intro + dropped)]
    if levels and not _fades(rows):
        user = "The adapter uses" if has(main, OFF[WRONG]) else "The model uses"
        text = intro + f"{user} the reference, at noise levels from {min(levels):g} to {max(levels):g}." + dropped
        return [Verdict(Kind.reference_used, text)]
    if levels:
        text = intro + (
            "The reference helps at high noise and fades where the noise is low: there the noised target itself shows "
            "the same information as the reference. That is expected where the target carries the identity; the swap "
            "test (`evaluate swap`) decides what the model makes of it. Higher noise levels in training "
            "(sigma.kind=high) give the reference more to do." + dropped
        )
        return [Verdict(Kind.reference_leaked, text)]
    return _unused(main, intro, dropped + _more(gap))


def _introduced(rows: Sequence[Row], gap: Interval, loss: float) -> str:
    if not has(rows, OFF[WRONG]):
        return f"Reference gap (correct minus wrong): {_sized(gap, loss)}. "
    on, off = paired(rows, CORRECT, WRONG), paired(rows, BASE, OFF[WRONG])
    return (
        f"Gained gap: {_sized(gap, loss)}. It is the reference gap (correct minus wrong) with the adapter, "
        f"{on.mean:+.4f}, minus that of the base, {off.mean:+.4f}. "
    )


def _worse(rows: Sequence[Row], intro: str) -> Verdict:
    if paired(rows, CORRECT, WRONG).mean > 0:
        return Verdict(Kind.reference_misleads, intro + " A wrong reference serves better than the right one.")
    text = intro + " With the adapter the model uses the reference less than the base does by itself."
    return Verdict(Kind.reference_unlearned, text)


def _unused(rows: Sequence[Row], intro: str, dropped: str) -> list[Verdict]:
    caption = _gap(rows, CAPTION) if has(rows, CAPTION) else None
    loss = mean(rows, CORRECT).mean
    if caption is not None and _relevant(caption, loss):
        text = intro + (
            f"No effect of the reference is shown, while another clip's caption changes the loss by {caption}: the "
            "caption carries what the reference should. Train with a constant caption or with "
            "data.caption_dropout." + dropped
        )
        return [Verdict(Kind.caption_carries, text)]
    if has(rows, OFF[WRONG]) and _relevant(paired(rows, BASE, OFF[WRONG]), loss):
        text = intro + (
            "The base uses the reference by itself. The adapter shows no use of its own: what a clip takes from the "
            "reference is the base's." + dropped
        )
        return [Verdict(Kind.reference_is_the_bases, text)]
    text = intro + (
        "No effect of the reference is shown at any noise level: it is decoration. Either it does not carry what the "
        "target has, or the model has not learned to read it yet, or, where identities are to be kept, the noised "
        "target still shows them at all these levels, and near zero is what is to be expected: the swap test "
        "(`evaluate swap`) decides." + dropped
    )
    return [Verdict(Kind.reference_decorative, text)]


def _gap(rows: Sequence[Row], other: str) -> Interval:
    """The gained gap to an arm, or the gap itself where the base was not measured."""
    return gained(rows, other) if has(rows, OFF[other]) else paired(rows, CORRECT, other)


def _levels_with_effect(rows: Sequence[Row]) -> list[float]:
    """Noise levels at which the gap is below zero by a relevant share of the loss and by its interval."""
    levels: list[float] = []
    for sigma in sorted({row.sigma for row in rows}):
        level_rows = [row for row in rows if row.sigma == sigma]
        if _relevant(_gap(level_rows, WRONG), mean(level_rows, CORRECT).mean):
            levels.append(sigma)
    return levels


def _fades(rows: Sequence[Row]) -> bool:
    """Whether the gap at low noise is less than half of the gap at high noise.

    Information that only the reference carries lowers the loss by 1 / ((1 - s)^2 + s^2) per unit of its variance at
    level s. That is about equal at low and at high noise (a ratio of 1.3 for 0.1, 0.3, 0.5 against 0.8, 0.9, 0.95).
    """
    levels = sorted({row.sigma for row in rows})
    low = [s for s in levels if s <= _LOW_NOISE] or levels[:1]
    high = [s for s in levels if s >= _HIGH_NOISE] or levels[-1:]
    low_gap, high_gap = (_gap([r for r in rows if r.sigma in group], WRONG).mean for group in (low, high))
    return high_gap < 0 and low_gap > _FADED * high_gap


def _relevant(difference: Interval, loss: float) -> bool:
    return difference.excludes_zero and difference.mean < -_RELEVANT * abs(loss)


def _sized(effect: Interval, loss: float) -> str:
    """An effect with its interval, and as a share of the loss."""
    known = "" if math.isnan(effect.half) else ", 95 %"
    return f"{effect}{known}, {100 * effect.mean / loss:+.1f} % of the loss" if loss else f"{effect}{known}"


def _more(effect: Interval) -> str:
    """How many more identities would halve the interval, whose width falls with the root of their number."""
    return f" About {3 * effect.identities} more held-out identities would halve the interval." if effect.half else ""


def _beside(rows: Sequence[Row]) -> str:
    """The gaps to the other arms of the reference."""
    arms = {DROPPED: "no reference at all", NEUTRAL: "a neutral one (silence, grey pictures)"}
    return "".join(f" Against {name}: {_gap(rows, arm)}." for arm, name in arms.items() if has(rows, arm))


def _repeated(noise: float | None) -> str:
    return "" if noise is None else f"Measured again with other noise it changes by about {noise:.4f}. "


def _caption(rows: Sequence[Row]) -> list[Verdict]:
    caption = _gap(rows, CAPTION)
    if not _relevant(caption, mean(rows, CORRECT).mean):
        return []
    text = f"Caption gap (own minus another clip's): {caption}, 95 %. The caption shows the model what the clip holds."
    return [Verdict(Kind.caption_carries, text)]


def of_metrics(row: Mapping[str, float]) -> list[Verdict]:
    """The verdict on the reference from one row of a metrics file; empty if the row has no gap with an interval."""
    name = "val/gained_gap" if "val/gained_gap_ci95" in row else "val/reference_gap"
    if f"{name}_ci95" not in row:
        return []
    gap, half, loss = row[name], row[f"{name}_ci95"], row["val/loss"]
    own = name == "val/gained_gap"
    intro = (
        f"{'Gained' if own else 'Reference'} gap: {gap:+.4f} ± {half:.4f}, 95 %, {100 * gap / loss:+.1f} % of the loss"
    )
    intro += f"; the base's own gap is {row['val/base_gap']:+.4f}. " if own else ". "
    if gap < -half and gap < -_RELEVANT * abs(loss):
        user = "The adapter uses" if own else "The model uses"
        return [Verdict(Kind.reference_used, intro + f"{user} the reference; `evaluate` lists the noise levels.")]
    if gap > half:
        better = "With the adapter a wrong reference costs less than without it." if own else (
            "A wrong reference serves better than the right one."
        )  # fmt: skip
        return [Verdict(Kind.reference_unlearned if own else Kind.reference_misleads, intro + better)]
    text = intro + "No use of the reference by the adapter is shown on the whole; `evaluate` looks level by level."
    return [Verdict(Kind.reference_decorative, text)]


def of_history(measured: Sequence[Measured], training: Mapping[int, float]) -> list[Verdict]:
    """The verdict on a run's course, empty for fewer than two steps that were measured on the same as the last.
    training: logged losses by step."""
    measured = [m for m in measured if m.on == measured[-1].on]
    if len(measured) < 2:
        return []
    first, last = measured[0], measured[-1]
    best = min(measured, key=lambda m: sum(m.loss.values()) / max(1, len(m.loss)))
    since_first, since_best = difference(last, first), difference(last, best)
    if math.isnan(since_first.half):
        text = "Held-out losses come from one identity: no interval, no verdict."
        return [Verdict(Kind.too_few_identities, text)]
    trend = _trend(training, best.step)
    if since_best.excludes_zero and since_best.mean > 0 and trend < 0:
        text = (
            f"Since step {best.step} the held-out loss has risen by {since_best} while the training loss went on "
            f"falling ({trend:+.4f}): overfitting. Take step {best.step}."
        )
        return [Verdict(Kind.overfitting, text)]
    gain = difference(best, first)
    if not (gain.excludes_zero and gain.mean < 0):
        text = (
            f"From step {first.step} to the best, {best.step}, the held-out loss changed by {gain}: the run is not "
            "learning what the held-out clips show. Look at optim.lr, the targets and the data."
        )
        return [Verdict(Kind.not_learning, text)]
    first_part = measured[: max(1, 2 * len(measured) // 3)]
    earlier = min(first_part, key=lambda m: sum(m.loss.values()) / max(1, len(m.loss)))
    recent = difference(best, earlier)
    if earlier.step == best.step or not recent.excludes_zero:
        text = (
            f"The held-out loss has not fallen since step {earlier.step} ({recent}): a plateau. Take step {best.step}."
        )
        return [Verdict(Kind.plateau, text)]
    text = f"The held-out loss still falls ({gain} since step {first.step}): more steps may help."
    return [Verdict(Kind.improving, text)]


def _trend(training: Mapping[int, float], since: int) -> float:
    """Change of the training loss around step `since`; nan if either side has no losses.

    The mean over the second half of the steps after `since`, minus the mean over the second half of those up to it.
    """
    later = [loss for step, loss in sorted(training.items()) if step > since]
    before = [loss for step, loss in sorted(training.items()) if step <= since]
    if not later or not before:
        return math.nan
    later, before = later[len(later) // 2 :], before[len(before) // 2 :]
    return sum(later) / len(later) - sum(before) / len(before)
