"""The panel that `fit` prints before the first step: model, trained weights, data, memory and start."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from torch import nn

from ltx_train import config as configuration
from ltx_train.assembly import from_config, model_builder, model_source, resolve
from ltx_train.assembly.setup import Setup
from ltx_train.config import Config, counted_fps
from ltx_train.contracts import Role
from ltx_train.data.index import HELDOUT, TRAIN, Index
from ltx_train.evaluation import heldout
from ltx_train.memory.planning.cards import GIB
from ltx_train.memory.planning.search import MemoryPlan
from ltx_train.memory.planning.sizes import MemoryChoice
from ltx_train.memory.weights.stores import PeerStore
from ltx_train.model import adapter
from ltx_train.model.reach import sees_loss
from ltx_train.model.transformer import Transformer


def show(
    setup: Setup, transformer: Transformer, trained: Mapping[str, int], index: Index, *, folder: Path, step: int
) -> None:
    """Prints the panel to the terminal: at most 20 lines of 80 columns. step: the step at which the run begins."""
    table = Table.grid(padding=(0, 2))
    for name, text in _lines(setup, transformer, trained, index, folder=folder, step=step):
        table.add_row(f"[bold]{name}", Text(text))
    run = setup.config.run
    Console().print(Panel(table, title=f"ltx-train fit: {run.experiment}/{run.id}", expand=False))


def untrained(config: Config, transformer: Transformer) -> dict[str, list[str]]:
    """Parts of a block none of whose linear layers is trained: `frozen`, or `no loss reaches`."""
    modes = [mode for _, mode in configuration.training_modes(config)]
    count = len(transformer.transformer_blocks)
    found: dict[str, set[str]] = {"frozen": set(), "no loss reaches": set()}
    trained: set[str] = set()
    for name, module in transformer.named_modules():
        if not isinstance(module, nn.Linear) or ".lora_" in name or not name.startswith("transformer_blocks."):
            continue
        plain = name.removesuffix(".base_layer")
        if plain != name or module.weight.requires_grad:
            trained.add(adapter.module_group(plain))
        else:
            state = "frozen" if sees_loss(plain, modes, count) else "no loss reaches"
            found[state].add(adapter.module_group(plain))
    return {state: sorted(groups - trained) for state, groups in found.items() if groups - trained}


def _lines(
    setup: Setup, transformer: Transformer, trained: Mapping[str, int], index: Index, *, folder: Path, step: int
) -> list[tuple[str, str]]:  # fmt: skip
    config, optim = setup.config, setup.config.optim
    # Sizes from the meta device: parameters of streamed blocks are empty.
    base = {name: p.numel() for name, p in model_source.skeleton(config).named_parameters()}
    total, count = sum(base.values()), sum(trained.values())
    groups: Counter[str] = Counter()
    for name, size in trained.items():
        groups[adapter.module_group(name)] += size
    largest = ", ".join(f"{name} {_short(n)}" for name, n in groups.most_common(5))
    source = config.model.path or f"random {config.model.preset}"
    facts = from_config.mode_facts(config)
    return [
        ("model", f"{source}, {_short(total)} parameters, {config.model.dtype}, {setup.memory.quantize} quantization"),
        ("mode", ", ".join(f"{k} {v}" for k, v in facts.items())),
        ("trained", f"{len(trained)} tensors, {_short(count)} parameters: {largest}"),
        *((state, ", ".join(parts)) for state, parts in untrained(config, transformer).items()),
        ("data", f"{len(index.split(TRAIN))} training, {len(index.split(HELDOUT))} held-out clips, {_folders(config)}"),
        ("batch", f"{optim.global_batch} samples, {optim.batch_size} at a time, {_tokens(setup)}"),
        *([("devices", _devices(setup))] if setup.ranks.world > 1 else []),
        ("memory", memory(setup, transformer, count)),
        *([] if setup.plan is None else [("planned", describe(setup.plan))]),
        ("steps", f"{optim.steps}, {optim.name}, {optim.schedule} from {optim.lr:g} to {optim.final_lr:g}"),
        ("measuring", _measuring(config, index)),
        ("start", f"step {step}, from {folder / 'checkpoints'}" if step else f"new run in {folder}"),
    ]  # fmt: skip


def _folders(config: Config) -> str:
    """The prepared folders of a run."""
    further = [f"{root} x {weight:g}" for root, weight in from_config.further_weights(config)]
    return ", ".join([config.data.root, *further])


def _devices(setup: Setup) -> str:
    """The ranks of a run and who updates its weights."""
    sharing, world = setup.sharing, setup.ranks.world
    machines = resolve.machines(setup.config, world)
    places = f"{machines} machines" if machines > 1 else "one machine"
    engine = "DeepSpeed's engine" if sharing.by_deepspeed else "this project's engine"
    return f"{world} on {places}, strategy={sharing.name}" + (f", {engine}" if sharing.slices_updates else "")


def _measuring(config: Config, index: Index) -> str:
    """The cost of a held-out measurement, which easily exceeds the cost of training between two measurements."""
    if config.eval.interval == 0 or not index.split(HELDOUT):
        return "nothing is held out" if config.eval.interval else "off (eval.interval=0)"
    settings = from_config.measurement_settings(config, from_config.grid(config, index))
    clips, levels, arms = heldout.passes(index, settings, with_base=False)
    return (
        f"{clips} clips x {levels} noise levels x {arms} versions = {clips * levels * arms} passes every "
        f"{config.eval.interval} steps"
    )


def describe(planned: MemoryPlan) -> str:
    """A plan in one line."""
    foot = planned.footprint
    return f"{foot.gib:.1f} GiB, about {foot.step_s:.2f} s a step: {how(planned.choice)}"


def how(choice: MemoryChoice) -> str:
    """A choice in words."""
    parts = [] if choice.quantize == "none" else [f"{choice.quantize} weights"]
    if choice.compute != "bf16":
        parts.append(f"{choice.compute} products")
    kept = {"inputs": "recompute", "attention": "recompute but for attention", "everything": "keep everything"}
    parts.append(kept[choice.keep.value])
    if choice.keep_everything:
        parts.append(f"{choice.keep_everything} blocks keep everything")
    if choice.stream_blocks:
        where = "streamed" if choice.slices == 1 else f"sliced over {choice.slices} devices"
        parts.append(f"{choice.stream_blocks} blocks {where}")
    if choice.offload_inputs:
        parts.append("inputs on the host")
    if choice.graphs:
        parts.append("as CUDA graphs")
    return ", ".join(parts)


def _tokens(setup: Setup) -> str:
    config, parts = setup.config, list[str]()
    for bucket in resolve.buckets(config):
        counts = [f"{bucket.video_tokens} video"] if config.mode.video is not Role.absent else []
        counts += [f"{bucket.audio_tokens(counted_fps(config))} audio"] if config.mode.audio is not Role.absent else []
        parts.append(f"{bucket}: {' + '.join(counts)}")
    references = "".join(f" + reference {c.name.removeprefix('reference/')}" for c in config.mode.references)
    devices = setup.sharing.sequence
    sliced = f"; video sliced over {devices} devices" if devices > 1 else ""
    return f"tokens of {'; '.join(parts)}{references}{sliced}"


def memory(setup: Setup, transformer: Transformer, trained: int) -> str:
    """Frozen weights, and the float32 state of `trained` parameters on one device."""
    held = (t for t in transformer.parameters() if not t.requires_grad)
    frozen = sum(t.numel() * t.element_size() for t in held)
    gradient_bytes = 4.0
    state = trained * (setup.optimizer.saved_bytes + gradient_bytes) / setup.sharing.update_slices / GIB
    kept = "in host memory or files" if setup.sharing.offload else "masters, gradients and moments"
    parts = [f"{frozen / GIB:.2f} GiB frozen weights"] if frozen else []
    return " + ".join([*parts, f"{state:.2f} GiB {kept}"]) + _gathering(transformer)


def _gathering(transformer: Transformer) -> str:
    """Describes how sliced blocks are gathered; empty when no block is sliced."""
    stream = model_builder.stream_of(transformer)
    store = None if stream is None else stream.store
    if not isinstance(store, PeerStore):
        return ""
    if store.direct:
        return "; blocks copied from the other devices' memory"
    return "; blocks gathered by collectives, without CUDA graphs"


def _short(count: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)
