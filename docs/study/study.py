"""`make study`: do the measurements measure? Five data sets whose truth is known, three seeds each, on the tiny model.

A clip is an identity's 32 numbers, as one audio latent or as many; a reference is another clip of the identity, seen
through a fixed rotation. The report's verdict must come out right for each. Then: does training at higher noise
levels raise the reference gap where the target shows the identity anyway?
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import study_page
import swapped
import torch
from safetensors.torch import save
from torch import Tensor

from ltx_train import config as configuration
from ltx_train import rng
from ltx_train.assembly import memory_plan, model_builder, model_source, run_builder
from ltx_train.assembly.heldout_measurement import Measurement
from ltx_train.assembly.run_builder import RunStart
from ltx_train.assembly.setup import setup
from ltx_train.config import Config
from ltx_train.data import index
from ltx_train.data.columns import Rows
from ltx_train.data.index import Index
from ltx_train.data.prepare import pack
from ltx_train.data.reader import AUDIO, AUDIO_CONTEXT, REFERENCE, VIDEO_CONTEXT, VOICE
from ltx_train.data.record import Record
from ltx_train.evaluation import attention_mass, verdicts
from ltx_train.evaluation.heldout import Neutral
from ltx_train.evaluation.rows import BASE, CORRECT, DROPPED, NEUTRAL, OFF, WRONG, Row, differences, gained, has, paired
from ltx_train.evaluation.statistics import Interval, by_identity
from ltx_train.evaluation.verdicts import Kind
from ltx_train.model import adapter, export
from ltx_train.training.checkpoints import commit
from ltx_train.training.watchdog import Watchdog

HERE = Path(__file__).parent
SEEDS = (11, 12, 13)
IDENTITIES, HELDOUT, CLIPS = 640, 48, 2
DIM, TEXT, TEXT_WIDTH, VIDEO_WIDTH = 32, 4, 32, 64
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Case:
    """steps: latents of a clip. carries: whether reference and target share the identity. caption: whether the
    caption tells it. own: whether the reference is the target itself. fog: noise on the reference. known: how many of
    the identity's numbers the reference has; the others are a stranger's, new in every clip."""

    name: str
    expected: Kind
    steps: int
    carries: bool = True
    caption: bool = False
    own: bool = False
    fog: float = 0.2
    known: int = DIM


CASES = (
    Case("only carrier", Kind.reference_used, 1),
    Case("decoration", Kind.reference_decorative, 1, carries=False),
    Case("target leaks", Kind.reference_leaked, 33, fog=2.0),
    Case("caption leaks", Kind.caption_carries, 1, caption=True, fog=3.0),
    Case("reference is target", Kind.reference_is_target, 1, own=True),
)
# A base that uses references already: it reads half of an identity. Adapters on it are trained on all of it (CARRIER).
CARRIER = CASES[0]
HALF = Case("half carrier", Kind.reference_used, 1, known=DIM // 2)
HIGH = "target leaks, high noise levels"
UNTRAINED, TRAINED = "base reads references, adapter untrained", "base reads references, adapter trained"
LORA = ("adapter=audio_only", "adapter.dropout=0", "model.weights=file")


def rotation(name: str) -> Tensor:
    """A fixed orthogonal map: what the model has to learn to see through."""
    return torch.linalg.qr(rng.normal((DIM, DIM), 0, "study/rotation", name))[0]


def latent(tokens: Tensor) -> Tensor:
    """(T, 32) -> (2, T, 16)."""
    return tokens.unflatten(1, (2, 16)).transpose(0, 1).contiguous()


def identity_of(who: str, seed: int) -> Tensor:
    return rng.normal((DIM,), seed, "study/identity", who)


def clip(case: Case, who: str, number: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors of a clip, and its caption's context (4, 32)."""
    identity = identity_of(who, seed)
    other = identity if case.carries else rng.normal((DIM,), seed, "study/other", who)

    def noise(what: str, shape: tuple[int, ...]) -> Tensor:
        return rng.normal(shape, seed, f"study/{what}", who, number)

    target = identity + 0.2 * noise("target", (case.steps, DIM))
    heard = torch.cat([other[: case.known], noise("stranger", (DIM,))[case.known :]])
    voice = heard @ rotation("voice") + case.fog * noise("voice", (4, DIM))
    tensors = {AUDIO: latent(target), VOICE: latent(voice)}
    if case.own:
        tensors[REFERENCE] = latent(target).clone()
    told = identity @ rotation("caption") if case.caption else torch.ones(DIM)
    return tensors, told.expand(TEXT, -1).clone()


def neutral(config: Config) -> Neutral:
    """A reference of zeros, which every identity's numbers are centred on: the silence of this data."""
    lengths = (1, 4, 33)  # a reference that is its own target is as long as that
    return {(c.name, (2, n, 16)): torch.zeros(2, n, 16) for c in config.mode.references for n in lengths}


def prepared(case: Case, seed: int, root: Path) -> Index:
    """A prepared folder, as `prepare` would leave it."""
    items: dict[str, bytes] = {}
    contexts: dict[str, bytes] = {}
    records: list[Record] = []
    frames = {1: 1, 33: 33}[case.steps]
    for number in range(IDENTITIES + HELDOUT):
        who = f"id{number:04d}"
        for take in range(CLIPS):
            key = f"{who}_{take}"
            tensors, told = clip(case, who, take, seed)
            context = who if case.caption else "constant"
            contexts[context] = save({AUDIO_CONTEXT: told, VIDEO_CONTEXT: torch.zeros(TEXT, VIDEO_WIDTH)})
            items[key] = save(tensors)
            records.append(Record(
                key=key, split="heldout" if number >= IDENTITIES else "train", speaker=who, caption=context,
                bucket=f"32x32x{frames}", fps=25.0, seconds=frames / 25, context=context, has_audio=True, voice=True,
                own_reference=case.own, rms_db=0.0, recording=key, start=0.0, weight=1.0, source_fps=25.0, averaged="",
                source=key, source_sha256=key, item=key,
            ))  # fmt: skip
    sources = pack.Sources(lambda r: items[r.key], contexts.__getitem__, dropped=records[0].context)
    shards, placed = pack.write_shards(records, sources, root / "shards", 512)
    made = Index(settings={}, encoders={}, shards=tuple(shards), records=Rows.of(placed))
    index.save(made, root)
    return made


def settings(root: Path, runs: Path, name: str, seed: int, *more: str) -> Config:
    overrides = [
        "mode=a2a_ic", "adapter=full", "model.weights=random", "model.path=null", f"model.seed={seed}",
        f"run.seed={seed}", f"run.root={runs}", f"run.experiment={name}", f"data.root={root}", "data.source=x",
        "optim.lr=3e-3", "optim.final_lr=1e-4", "optim.schedule=cosine", "optim.warmup=20", "optim.steps=700",
        "optim.batch_size=32", "memory=none", "logger=local", "logger.every=50", "checkpoint.interval=700",
        "eval.interval=0", "eval.quantiles=0", f"eval.sigmas=[{','.join(map(str, LEVELS))}]",
        "eval.batch_size=96", "eval.wrong_references=3", "eval.strengths=[0.5,1.5]", *more,
    ]  # fmt: skip
    # The last value of a setting counts; a group cannot be given twice.
    made = configuration.compose_config([*{word.partition("=")[0]: word for word in overrides}.values()])
    return configuration.continued(made, None, 1)


def trained(case: Case, seed: int, place: Path, *more: str, name: str = "") -> tuple[list[Row], dict[str, object]]:
    """Trains and measures one case; the check that refuses copies is left out, to see what the numbers would say."""
    started = time.perf_counter()
    root = place / "data"
    made = index.load(root) if root.exists() else prepared(case, seed, root)
    name = (name or case.name).replace(" ", "_").replace(",", "")
    config = settings(root, place / "runs", name, seed, *more)
    folder = place / "runs" / name / "main"
    folder.mkdir(parents=True)
    run = setup(memory_plan.settle(config)[0])
    with Watchdog(folder, 0, start_s=0, step_s=0) as watchdog:
        run_builder.train(run, RunStart(folder=folder, root=root, index=made, checkpoint=None), watchdog)
    transformer = model_builder.open_trainable(run)
    adapter.load_state(transformer, commit.load(commit.committed(folder / "checkpoints")[-1]).weights)
    measurement = Measurement(setup=run, root=root, index=made, neutral=neutral(run.config))
    rows = measurement.rows(transformer)
    likeness = measurement.likeness()
    found = verdicts.of_rows(rows, measurement.grid, likeness)[-1]
    gap, dropped = paired(rows, CORRECT, WRONG), paired(rows, CORRECT, DROPPED)
    own: dict[str, object] = {"gap_neutral": asdict(paired(rows, CORRECT, NEUTRAL))}
    if has(rows, BASE):
        own |= {"gained": asdict(gained(rows, WRONG)), "base_gap": asdict(paired(rows, BASE, OFF[WRONG]))}
        by_strength = measurement.by_strength(transformer, rows)
        own["gained_by_strength"] = {s: asdict(gained(some, WRONG)) for s, some in by_strength.items()}
        identities = {who: identity_of(who, seed) for who in swapped.speakers(made)}
        clips = swapped.SwappedClips(run=run, root=root, index=made, identities=identities)
        own["swap"] = clips.measured(transformer)
    by_level: dict[float, object] = {}
    for s in LEVELS:
        some = [r for r in rows if r.sigma == s]
        by_level[s] = asdict(gained(some, WRONG) if has(rows, BASE) else paired(some, CORRECT, WRONG))
    attention = attention_mass.summary(measurement.masses(transformer))
    return rows, {
        "case": case.name, "seed": seed, "expected": case.expected.value, "found": found.kind.value,
        "sentence": found.text, "gap": asdict(gap), "gap_dropped": asdict(dropped), "gap_by_level": by_level,
        "likeness": likeness, **own, **attention,
        "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip


def high_levels(place: Path, seed: int, plain: list[Row]) -> dict[str, object]:
    """The leaking data once more, with 60 % of the noise levels from [0.7, 1]; compared by identity on one grid."""
    case = next(c for c in CASES if c.expected is Kind.reference_leaked)
    rows, record = trained(case, seed, place, "sigma.kind=high", name="high levels")
    first, second = ({who: sum(v) / len(v) for who, v in differences(r, CORRECT, WRONG).items()} for r in (rows, plain))
    change = by_identity({who: [first[who] - second[who]] for who in first})
    by_level: dict[float, object] = {}
    for s in LEVELS:
        pair = [differences([r for r in some if r.sigma == s], CORRECT, WRONG) for some in (rows, plain)]
        by_level[s] = asdict(by_identity({w: [sum(pair[0][w]) / len(pair[0][w]) - sum(pair[1][w]) / len(pair[1][w])]
                                          for w in pair[0]}))  # fmt: skip
    return {**record, "case": HIGH, "change_of_gap": asdict(change), "by_level": by_level}


def on_a_base(place: Path, seed: int) -> list[dict[str, object]]:
    """An adapter that was never trained, and one that was, on a base that reads half of an identity.

    alone: the gaps of the base and of the base with the adapter merged into it, each measured as a model of its own.
    Their difference is what the adapter gained, found without any adapter that is switched.
    """
    trained(HALF, seed, place / "base", name="base")
    weights, folder = place / "base.safetensors", place / "adapters"
    source = model_source.weights(settings(place, place, "base", seed))
    made = commit.load(commit.committed(place / "base" / "runs" / "base" / "main" / "checkpoints")[-1])
    export.write_full(weights, source, made.weights, torch.float32)
    on_base = (*LORA, f"model.path={weights}")
    records: list[dict[str, object]] = []
    still = ("optim.lr=0", "optim.final_lr=0", "optim.steps=1", "optim.warmup=0")
    for name, expected, expected_swap, more in (
        (UNTRAINED, Kind.reference_is_the_bases, Kind.swap_follows_the_base, still),
        (TRAINED, Kind.reference_used, Kind.swap_follows, ()),
    ):
        _, record = trained(CARRIER, seed, folder, *on_base, *more, name=name)
        run = folder / "runs" / name.replace(" ", "_").replace(",", "") / "main"
        lora = max((run / "adapters").glob("step-*.safetensors"))
        alone = [gap_alone(folder, seed, *on_base), gap_alone(folder, seed, *on_base, f"model.merge={lora}")]
        records.append({
            **record, "case": name, "expected": expected.value, "expected_swap": expected_swap.value,
            "alone": [asdict(gap) for gap in alone],
        })  # fmt: skip
    return records


def gap_alone(place: Path, seed: int, *more: str) -> Interval:
    run = setup(memory_plan.settle(settings(place / "data", place / "runs", "alone", seed, *more))[0])
    measurement = Measurement(setup=run, root=place / "data", index=index.load(place / "data"))
    return paired(measurement.rows(model_builder.open_frozen(run), with_base=False), CORRECT, WRONG)


def is_right(record: dict[str, Any]) -> bool:
    """The expected verdicts, and what the adapter gained is what the models differ by."""
    if "alone" not in record:
        return record["expected"] == record["found"]
    base, merged = (gap["mean"] for gap in record["alone"])
    agrees = abs(merged - base - record["gained"]["mean"]) < 1e-3
    return record["expected"] == record["found"] and record["expected_swap"] == record["swap"]["found"] and agrees


def main(write: Callable[[str], object] = print) -> int:
    torch.set_num_threads(1)
    results: list[dict[str, Any]] = []
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        for seed in SEEDS:
            for case in CASES:
                place = Path(scratch) / f"{case.name.replace(' ', '_')}-{seed}"
                rows, record = trained(case, seed, place)
                results.append(record)
                write(f"{record['case']:<20} seed {seed}: {record['found']:<22} ({record['seconds']} s)")
                if case.expected is Kind.reference_leaked:
                    results.append(high_levels(place, seed, rows))
                    write(f"{'  higher levels':<20} seed {seed}: gap changes by {results[-1]['change_of_gap']}")
            for record in on_a_base(Path(scratch) / f"on_a_base-{seed}", seed):
                results.append(record)
                write(f"{record['case']:<20} seed {seed}: {record['found']:<22} gained {record['gained']}")
    seconds = round(time.perf_counter() - started)
    wrong = [r for r in results if "change_of_gap" not in r and not is_right(r)]
    (HERE / "results.json").write_text(json.dumps({"seconds": seconds, "results": results}, indent=1) + "\n")
    names = [*(c.name for c in CASES), HIGH, UNTRAINED, TRAINED]
    study_page.plot(results, names, HERE / "gaps.png")
    study_page.page(results, seconds, HERE.parent / "study.md")
    write(f"{len(results) - len(SEEDS) - len(wrong)} of {len(results) - len(SEEDS)} verdicts are right; {seconds} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
