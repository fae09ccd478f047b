"""From the configuration and the machine to a memory plan: settled settings, or a refusal that names mends."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from ltx_train import config as configuration
from ltx_train.commands import session
from ltx_train.config import Config, parse_bucket
from ltx_train.contracts import ModalityName, Mode, Role, UserError
from ltx_train.diffusion import positions
from ltx_train.memory import plan
from ltx_train.memory.cards import GIB, Card, card_by_name, card_of_device
from ltx_train.memory.footprint import Choice, Trained, Work, sizes
from ltx_train.memory.plan import Allowed, Need, Planned
from ltx_train.memory.recompute import Keep
from ltx_train.model import adapter
from ltx_train.model.checkpoint import CheckpointFile, RandomWeights
from ltx_train.model.loaders import build_transformer
from ltx_train.model.transformer import Transformer

# Left to the rest of the machine when weights or activations wait in host memory.
_HOST_SHARE = 0.9
# Fidelity is dearer than time: a mend that changes the result counts as so many times slower.
_CHANGES_RESULT = 2.0


@dataclass(frozen=True)
class Place:
    """Where a run is to fit. host_gib: of this machine, None when another one is planned for."""

    card: Card
    budget_gib: float
    host_gib: float | None


@dataclass(frozen=True)
class Mend:
    """A change of the configuration that makes a run fit, and what it costs."""

    overrides: str
    planned: Planned
    cost: float

    def __str__(self) -> str:
        foot = self.planned.footprint
        return f"{self.overrides}   ({foot.gib:.1f} GiB, about {foot.step_s:.2f} s a step)"


def settle(config: Config, *, training: bool = True) -> tuple[Config, Planned | None]:
    """The configuration with every planned setting decided; UserError with mends when nothing fits.

    On a CPU without a budget nothing is planned and the plain settings hold.
    """
    on_cpu = session.device(config).type != "cuda"
    if on_cpu and config.memory.graphs:
        raise UserError("memory.graphs=true records work of a GPU, and this run is on the CPU: leave it out")
    if on_cpu or not training:
        config = replace(config, memory=replace(config.memory, graphs=False))
    place = here(config)
    if place is None:
        return _settled(config, _plain(config)), None
    found = planned(config, place, training=training)
    if found is None:
        raise UserError(refusal(config, place))
    return _settled(config, found.choice), found


def planned(config: Config, place: Place, *, training: bool = True) -> Planned | None:
    """The plan for a place, or None when nothing fits."""
    wanted = need(config) if training else _alone(config)
    limits = allowed(config, place.host_gib)
    if not training:
        limits = replace(limits, keep=Keep.inputs, keep_everything=0, offload_inputs=True)
    elif _shards(config) > 1:
        limits = replace(limits, stream_blocks=wanted.size.layers, shards=_shards(config))
    if wanted.trained.away or wanted.work.sequence > 1:
        limits = replace(limits, graphs=False)
    return plan.choose(wanted, limits, place.card, place.budget_gib)


def _alone(config: Config) -> Need:
    """Of a command that trains nothing, in one process."""
    single = replace(config, strategy=replace(config.strategy, sequence=1))
    return replace(need(single), trained=Trained(0, "adamw"))


def here(config: Config) -> Place | None:
    """This machine's GPU and the budget on it; on a CPU a given budget is planned for as if it were a GPU's."""
    device = session.device(config)
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB * _HOST_SHARE / config.strategy.devices
    given = config.memory.budget_gib
    if device.type != "cuda":
        return None if given is None else Place(card_by_name(config.plan.card or "RTX 4090"), given, host)
    free, total = torch.cuda.mem_get_info(device)
    properties = torch.cuda.get_device_properties(device)
    budget = given or (free + torch.cuda.memory_reserved(device)) / GIB
    return Place(card_of_device(properties.name, total / GIB), budget, host)


def need(config: Config) -> Need:
    """Sizes from the meta device; tokens of the largest bucket."""
    model = config.model
    transformer = _on_meta(model.path, model.preset)
    return Need(sizes(transformer), largest_work(config), _trained(config, transformer))


@lru_cache(maxsize=4)
def _on_meta(path: str | None, preset: str) -> Transformer:
    """Built once for all the changes that a refusal tries; nobody changes it."""
    return build_transformer(CheckpointFile.open(path) if path else RandomWeights(preset))


def largest_work(config: Config) -> Work:
    """The bucket with the most tokens."""
    return max((_work(config, bucket) for bucket in config.data.buckets), key=lambda w: (w.video, w.audio))


def allowed(config: Config, host_gib: float | None) -> Allowed:
    """What the configuration leaves to the plan."""
    memory = config.memory
    quantize = ("none", "int8") if memory.quantize == "auto" else (memory.quantize,)
    return Allowed(
        ("none",) if memory.compute == "fp8" and memory.quantize == "auto" else quantize, memory.compute,
        None if memory.keep is None else Keep(memory.keep), memory.keep_everything, memory.stream_blocks,
        memory.stream_slots, memory.offload_inputs, memory.graphs, host_gib=host_gib,
    )  # fmt: skip


def _shards(config: Config) -> int:
    """Over how many devices the frozen blocks are spread; those of other machines come on top."""
    return config.strategy.devices if config.strategy.name == "zero3" else 1


def refusal(config: Config, place: Place) -> str:
    """Why a run does not fit and the cheapest ways to make it fit."""
    least = plan.smallest(need(config), allowed(config, None), place.card).footprint
    lines = [
        f"this run does not fit into {place.budget_gib:.1f} GiB on {place.card.name}: "
        f"with these settings it needs at least {least.gib:.1f} GiB"
        + (f" and {least.host_gib:.0f} GiB of host memory" if least.host_gib > 1 else "")
    ]
    mends = cheapest(config, place)
    if mends:
        lines += ["the cheapest ways to make it fit:", *(f"  {mend}" for mend in mends)]
    else:
        lines.append("no setting of this release makes it fit: it needs a larger card")
    return "\n".join(lines)


def out_of_memory(config: Config, found: Planned | None) -> str:
    """What to say when the GPU ran out after all: the prediction was wrong, or others use the card."""
    place = here(config)
    if place is None:
        return "the device ran out of memory"
    said = "" if found is None else f" (planned: {found.footprint.gib:.1f} GiB)"
    used = torch.cuda.max_memory_reserved() / GIB if torch.cuda.is_available() else 0.0
    lines = [f"the GPU ran out of memory at {used:.1f} of {place.budget_gib:.1f} GiB{said}; what was saved is unharmed"]
    tighter = replace(place, budget_gib=min(place.budget_gib, used or place.budget_gib) * 0.9)
    mends = cheapest(config, tighter)
    lines.append(f"ways to need less, beginning with memory.budget_gib={tighter.budget_gib:.1f}:")
    return "\n".join([*lines, *(f"  {mend}" for mend in mends)])


def cheapest(config: Config, place: Place, count: int = 3) -> list[Mend]:
    """The `count` cheapest changes that make the run fit: single ones, and pairs where those are too few."""
    changes = list(_changes(config))
    found = [mend for change in changes if (mend := _tried(config, place, [change])) is not None]
    if len(found) < count:
        pairs = [(a, b) for i, a in enumerate(changes) for b in changes[i + 1 :] if _name(a) != _name(b)]
        found += [mend for pair in pairs if (mend := _tried(config, place, list(pair))) is not None]
    return sorted(found, key=lambda m: m.cost)[:count]


Change = tuple[str, float, Callable[[Config], Config]]


def _changes(config: Config) -> Iterator[Change]:
    """(override, cost factor, the same as a function); a factor above 1 changes what is trained."""
    memory, optim, lora = config.memory, config.optim, config.adapter.kind == "lora"
    planned = ("keep", "keep_everything", "stream_blocks", "offload_inputs", "graphs")
    if any(getattr(memory, name) is not None for name in planned):
        free: dict[str, Any] = dict.fromkeys(planned)
        yield "memory=auto", 1.0, lambda c: replace(c, memory=replace(c.memory, **free))
    if memory.graphs is not False:
        yield "memory.graphs=false", 1.0, lambda c: replace(c, memory=replace(c.memory, graphs=False))
    if lora and memory.quantize in ("none", "auto") and memory.compute == "bf16":
        yield "memory.quantize=int8", 1.0, lambda c: replace(c, memory=replace(c.memory, quantize="int8"))
    if lora and memory.quantize != "int4" and memory.compute == "bf16":
        yield "memory.quantize=int4", 1.2, lambda c: replace(c, memory=replace(c.memory, quantize="int4"))
    if optim.name == "adamw":
        yield "optim=adamw8bit", 1.0, lambda c: replace(c, optim=replace(c.optim, name="adamw8bit"))
    if optim.batch_size > 1:
        yield "optim.batch_size=1", 1.1, lambda c: replace(c, optim=replace(c.optim, batch_size=1))
    if lora and config.adapter.rank >= 16:
        rank = config.adapter.rank // 2
        yield f"adapter.rank={rank}", _CHANGES_RESULT, lambda c: replace(c, adapter=replace(c.adapter, rank=rank))
    for share in (0.75, 0.5, 0.25):
        shorter = [_shorter(bucket, share) for bucket in config.data.buckets]
        if shorter != config.data.buckets:
            text = f"data.buckets=[{','.join(shorter)}]"
            yield text, _CHANGES_RESULT / share, lambda c, s=shorter: replace(c, data=replace(c.data, buckets=s))


def _name(change: Change) -> str:
    """The setting that a change is about; two changes of one setting are no pair."""
    return change[0].partition("=")[0]


def _tried(config: Config, place: Place, changes: list[Change]) -> Mend | None:
    cost = 1.0
    for _, factor, change in changes:
        config, cost = change(config), cost * factor
    found = planned(config, place)
    if found is None:
        return None
    return Mend(" ".join(text for text, _, _ in changes), found, cost * found.footprint.step_s)


def _shorter(bucket: str, share: float) -> str:
    width, height, frames = parse_bucket(bucket)
    return f"{width}x{height}x{max(1, int((frames - 1) * share / 8) * 8 + 1)}"


def _work(config: Config, bucket: str) -> Work:
    width, height, frames = parse_bucket(bucket)
    video = positions.latent_frames(frames) * (width // 32) * (height // 32)
    audio = positions.audio_latents(frames / config.data.fps)
    modes = [m for _, m in configuration.training(config)]
    voice, together = positions.audio_latents(config.data.reference_s), config.strategy.sequence
    seen = max(0 if m.video is Role.absent else video + _referenced(m, ModalityName.video, video) for m in modes)
    return Work(
        config.optim.batch_size,
        -(-seen // together),
        max(0 if m.audio is Role.absent else audio + _referenced(m, ModalityName.audio, voice) for m in modes),
        config.model.text_tokens,
        2 if config.model.dtype == "bfloat16" and (config.adapter.kind == "lora" or _stage(config)) else 4,
        together,
    )


def _referenced(mode: Mode, stream: ModalityName, whole: int) -> int:
    """Tokens of a mode's references; one of the same size as the target where the configuration does not say."""
    scales = [(c.spatial_scale or 1) ** 2 * c.temporal_scale for c in mode.references if c.stream is stream]
    return sum(whole // scale for scale in scales)


def _trained(config: Config, transformer: Transformer) -> Trained:
    optim = config.optim
    if config.adapter.kind == "full":
        count = sum(p.numel() for p in transformer.parameters())
        return Trained(
            count,
            optim.name,
            _rounds(config),
            full=True,
            stage=_stage(config),
            shards=_sharers(config),
            away=config.strategy.offload is not None,
            files=config.strategy.offload not in (None, "cpu"),
        )
    lora = session.lora(config)
    names = set(adapter.matched_modules(transformer, lora.targets, lora.modes))
    layers: list[tuple[str, Any]] = [(n, m) for n, m in transformer.named_modules() if n in names]
    count = sum(lora.rank_of(name) * (layer.in_features + layer.out_features) for name, layer in layers)
    return Trained(
        count, optim.name, _rounds(config), averaged=config.adapter.ema > 0, stage=_stage(config),
        shards=_sharers(config),
    )  # fmt: skip


def _stage(config: Config) -> int:
    """Of ZeRO, as far as it shares the updates."""
    return int(config.strategy.name[-1]) if session.shares_updates(config) else 0


def _sharers(config: Config) -> int:
    return config.strategy.devices if _stage(config) else 1


def _rounds(config: Config) -> int:
    """More than one when gradients stay between micro-batches."""
    optim = config.optim
    world = max(1, config.strategy.devices // config.strategy.sequence)
    return max(1, (optim.global_batch or 1) // (optim.batch_size * world))


def _plain(config: Config) -> Choice:
    memory = config.memory
    return Choice(
        "none" if memory.quantize == "auto" else memory.quantize, memory.compute, Keep(memory.keep or "inputs"),
        memory.keep_everything or 0, memory.stream_blocks or 0, memory.stream_slots, memory.offload_inputs or False,
        memory.graphs or False,
    )  # fmt: skip


def _settled(config: Config, choice: Choice) -> Config:
    memory = replace(
        config.memory, quantize=choice.quantize, keep=choice.keep.value, keep_everything=choice.keep_everything,
        stream_blocks=None if choice.shards > 1 else choice.stream_blocks, offload_inputs=choice.offload_inputs,
        graphs=choice.graphs,
    )  # fmt: skip
    return replace(config, memory=memory)
