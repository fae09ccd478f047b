"""swap.html: the swap test's verdict, clips to listen to, effects, matrix and strengths, in one file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from markupsafe import Markup

from ltx_train import durable
from ltx_train.contracts import Clip
from ltx_train.evaluation import swap
from ltx_train.evaluation.report import groups
from ltx_train.evaluation.swap import OFF, ON, Aspect, Measure, Output
from ltx_train.evaluation.traits import Traits
from ltx_train.evaluation.verdicts import Verdict
from ltx_train.pages.figures import picture, subplots
from ltx_train.pages.render import embedded, render
from ltx_train.pages.sections import Section, Table


def write(
    path: Path, title: str, outputs: Sequence[Output], references: Mapping[str, Traits], *,
    clips: Mapping[str, Sequence[Clip]], verdict: Verdict,
) -> None:  # fmt: skip
    """Writes the page atomically."""
    sections = [
        effects(outputs, references), _matrices(outputs, references), _variants(outputs, references),
        _strengths(outputs, references),
    ]  # fmt: skip
    report = SimpleNamespace(verdicts=[verdict])
    page = render(
        "run.html.j2", title=title, groups=groups(clips, embedded), report=report, sections=[s for s in sections if s]
    )
    durable.write(path, page)


def effects(outputs: Sequence[Output], references: Mapping[str, Traits]) -> Section:
    """The effects with the adapter on and off."""
    rows: list[list[str]] = []
    found = swap.aspects(references)
    for arm in (ON, OFF):
        share, chance = swap.hits(swap.matrix(outputs, arm, references))
        shares = [str(swap.followed(outputs, arm, references, aspect)) for aspect in found]
        apart = [str(swap.distance(outputs, arm, measure)) for measure in Measure]
        rows.append([arm, *shares, *apart, _share(share, chance)])
    rows.append(["gained", *(str(swap.gained(outputs, references, aspect)) for aspect in found), "", "", ""])
    head = ("arm", *(f"{aspect.value} followed" for aspect in found),
            *(f"{measure.value} beyond the seed" for measure in Measure), "nearest to the own reference")  # fmt: skip
    note = (
        "1 means that the output takes over all of the difference between two references; 95 % intervals over speakers."
    )
    return Section(title="Effects", note=note, tables=[Table(head=head, rows=rows)])


def _matrices(outputs: Sequence[Output], references: Mapping[str, Traits]) -> Section:
    names = sorted(references)
    figure, axes = subplots(1, 2, figsize=(10, 4.2))
    for axis, arm in zip(axes, (ON, OFF), strict=True):
        found = swap.matrix(outputs, arm, references)
        axis.imshow(np.ma.masked_invalid(found), cmap="viridis")
        axis.set_xticks(range(len(names)), names, rotation=60, fontsize=7)
        axis.set_yticks(range(len(names)), names, fontsize=7)
        axis.set_title(arm, fontsize=9)
        axis.set_xlabel("reference's voice")
    axes[0].set_ylabel("output generated with")
    figure.tight_layout()
    drawn = picture(
        figure, "distance of outputs to references, in pitch and spectrum; dark is near, blank has no pitch"
    )
    return Section(title="Which reference an output is nearest to", figures=[drawn])


def _variants(outputs: Sequence[Output], references: Mapping[str, Traits]) -> Section | None:
    """What is followed of references whose recordings were changed; none without such."""
    names = sorted({o.variant for o in outputs if o.variant})
    if not names:
        return None
    found = swap.aspects(references)
    # Variants are generated for one prompt and seed; the plain recording counts with the same.
    same = {(o.prompt, o.seed) for o in outputs if o.variant}
    outputs = [o for o in outputs if (o.prompt, o.seed) in same]
    rows = [
        [variant or "as recorded", *(str(swap.followed(outputs, ON, references, a, variant=variant)) for a in found)]
        for variant in ("", *names)
    ]
    note = "Each output is compared with the voice as recorded, not with the changed recording that it was given."
    table = Table(head=("recording of the reference", *(f"{aspect.value} followed" for aspect in found)), rows=rows)
    return Section(title="By recording of the reference", note=note, tables=[table])


def _strengths(outputs: Sequence[Output], references: Mapping[str, Traits]) -> Section | None:
    """What the adapter's strength does to pitch and to speech; none with a single strength."""
    voiced, garbled = swap.garbling(outputs)
    if len(voiced) < 2:
        return None
    followed = {s: swap.followed(outputs, ON, references, Aspect.pitch, strength=s) for s in voiced}
    note = "The sound keeps its voice at all strengths." if garbled is None else (
        f"From strength {garbled:g} on less than half of the voiced sound is left."
    )  # fmt: skip
    return Section(title="By strength of the adapter", note=note, figures=[_drawn(voiced, followed)])


def _drawn(voiced: Mapping[float, float], followed: Mapping[float, swap.Effect]) -> Markup:
    figure, axis = subplots(figsize=(6, 3.2))
    known = {s: effect for s, effect in followed.items() if np.isfinite(effect.mean)}
    errors = np.abs([[e.mean - e.low, e.high - e.mean] for e in known.values()]).T
    axis.errorbar(list(known), [e.mean for e in known.values()], errors if known else None, capsize=2, marker=".",
                  label="pitch followed")  # fmt: skip
    axis.plot(list(voiced), list(voiced.values()), marker=".", label="voiced share")
    axis.axhline(0, color="black", lw=0.7)
    axis.set_xlabel("strength of the adapter")
    axis.set_ylabel("share")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=7)
    figure.tight_layout()
    return picture(figure, "pitch followed and voiced share by strength, 95 % intervals")


def _share(share: float, chance: float) -> str:
    return "" if np.isnan(share) else f"{100 * share:.0f} % (chance {100 * chance:.0f} %)"
