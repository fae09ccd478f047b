"""LoRA on the transformer through peft: attaching it, and reading and setting its weights.

Owns the choice of target modules and the adapter tensors' names without peft's additions. It must not know files or
optimizers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ltx_train import rng
from ltx_train.contracts import Mode, UserError
from ltx_train.model.linear import LowRankLinear, frobenius, mix
from ltx_train.model.reach import sees_loss, tokens_seen

_NAME = "default"


class AdapterError(UserError):
    """Target modules or adapter tensors do not fit the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """Parameters of an adapter: rank, alpha (scale = alpha / rank), dropout, target module names (suffixes at a dot).

    rank_pattern, alpha_pattern: other values by suffix. rslora: scale = alpha / sqrt(rank), after Kalajdzievski 2023.
    dora: a trained magnitude per output channel, after Liu et al. 2024. init: initialization of A (B begins at zero).
    modes: only layers that the loss of at least one mode reaches get an adapter; empty: all target modules.
    """

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    rank_pattern: Mapping[str, int] = field(default_factory=dict[str, int])
    alpha_pattern: Mapping[str, float] = field(default_factory=dict[str, float])
    rslora: bool = False
    dora: bool = False
    init: str = "kaiming"
    modes: tuple[Mode, ...] = ()

    def rank_of(self, module: str) -> int:
        return next((r for suffix, r in self.rank_pattern.items() if _hits(module, suffix)), self.rank)

    def scale_of(self, module: str) -> float:
        """The factor of B A in a module's output."""
        alpha = next((a for suffix, a in self.alpha_pattern.items() if _hits(module, suffix)), self.alpha)
        rank = self.rank_of(module)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def matched_modules(model: nn.Module, targets: Iterable[str], modes: tuple[Mode, ...] = ()) -> list[str]:
    """Full names of the linear layers that match the targets, in model order. With modes, only the layers that the loss
    of at least one mode reaches.

    AdapterError names every target without a matching layer: a mistyped target must not shrink the adapter silently.
    """
    names = [name for name, module in model.named_modules() if _is_linear(module) and "lora_" not in name]
    names = [name.removesuffix(".base_layer") for name in names]
    suffixes = list(targets)
    if modes:
        layers = 1 + max((int(n.split(".")[1]) for n in names if n.startswith("transformer_blocks.")), default=-1)
        reached = {name for name in names if sees_loss(name, modes, layers)}
    else:
        reached = set(names)
    unmatched = [t for t in suffixes if not any(_hits(name, t) for name in names)]
    if unmatched:
        raise AdapterError(f"adapter.targets match no linear layer of the transformer: {', '.join(unmatched)}")
    unreached = [t for t in suffixes if not any(_hits(name, t) for name in reached)]
    if unreached:
        raise AdapterError(f"adapter.targets name layers that the mode's loss never reaches: {', '.join(unreached)}")
    return [name for name in names if name in reached and any(_hits(name, t) for t in suffixes)]


def attach(model: nn.Module, lora: Lora, seed: int) -> None:
    """Adds trainable float32 LoRA weights in place. A is drawn by key and B is zero, so the output is unchanged."""
    modules = matched_modules(model, lora.targets, lora.modes)
    other = {re.escape(m): lora.rank_of(m) for m in modules if lora.rank_of(m) != lora.rank}
    config = LoraConfig(
        r=lora.rank,
        lora_dropout=lora.dropout,
        target_modules=modules,
        rank_pattern=other,
    )
    config._register_custom_module({nn.Linear: LowRankLinear})
    # On the meta device, because peft would draw every matrix on the CPU before it is drawn again below.
    inject_adapter_in_model(config, model, adapter_name=_NAME, low_cpu_mem_usage=True)
    for module in modules:
        layer = model.get_submodule(module)
        assert isinstance(layer, LowRankLinear)
        _materialize(layer)
        layer.scaling[_NAME] = lora.scale_of(module)
        if lora.dora:
            layer.add_magnitude(_NAME)
    for name, parameter in lora_parameters(model).items():
        parameter.requires_grad_(True)
        if ".lora_A." in name and not parameter.is_meta:
            _initialize(
                parameter, lora.init, torch.Generator(parameter.device).manual_seed(rng.key_seed(seed, "lora", name))
            )


def inputs_and_outputs(layer: nn.Module) -> int:
    """in_features + out_features: the number of weights of a rank-1 adapter on a linear layer."""
    linear: Any = layer
    return linear.in_features + linear.out_features


def _materialize(layer: LowRankLinear) -> None:
    """Replaces the low-rank weights by zeros on the device of the layer's weight."""
    base: Any = layer.get_base_layer()
    for part in (layer.lora_A[_NAME], layer.lora_B[_NAME]):
        assert isinstance(part, nn.Linear)
        part.weight = nn.Parameter(torch.zeros(part.weight.shape, device=base.weight.device))


def _initialize(parameter: nn.Parameter, init: str, stream: torch.Generator) -> None:
    """kaiming: U(+-1 / sqrt(inputs)). gaussian: standard deviation 1 / rank. orthogonal: orthonormal rows."""
    if init == "gaussian":
        nn.init.normal_(parameter, std=1 / parameter.shape[0], generator=stream)
    elif init == "orthogonal":
        nn.init.orthogonal_(parameter, generator=stream)
    else:
        nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=stream)


def detach(model: nn.Module) -> None:
    """Removes the adapter in place; every layer is the base's again."""
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, LowRankLinear)]:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def is_attached(model: nn.Module) -> bool:
    return any(isinstance(module, LowRankLinear) for module in model.modules())


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Adapter parameters as `<module>.lora_A.weight`, `<module>.lora_B.weight` and, with DoRA,
    `<module>.lora_magnitude_vector.weight`."""
    return {plain_name(name): p for name, p in model.named_parameters() if ".lora_" in name}


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters that receive gradients, by plain name, in model order."""
    return {plain_name(name): p for name, p in model.named_parameters() if p.requires_grad}


def plain_name(name: str) -> str:
    """A parameter's name without peft's `.default` and `.base_layer`."""
    return name.replace(f".{_NAME}.", ".").replace(".base_layer.", ".")


def load_state(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies tensors into the trainable parameters. AdapterError unless names and shapes are equal."""
    parameters = trainable_parameters(model)
    refuse_misfit(*({name: t.shape for name, t in named.items()} for named in (parameters, tensors)))
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def refuse_misfit(expected: Mapping[str, torch.Size], saved: Mapping[str, torch.Size]) -> None:
    """AdapterError unless the saved names and shapes are the expected ones."""
    missing, extra = sorted(expected.keys() - saved.keys()), sorted(saved.keys() - expected.keys())
    misshapen = [n for n in expected.keys() & saved.keys() if expected[n] != saved[n]]
    if missing or extra or misshapen:
        raise AdapterError(
            f"the saved weights do not fit the model: {len(missing)} missing, {len(extra)} unknown, "
            f"{len(misshapen)} of another shape (first: {(missing + extra + misshapen)[0]})"
        )


def slice_dropout(model: nn.Module, rank: int) -> None:
    """Sets the token slice of the dropout masks: `rank` for layers that process video tokens, 0 for all others."""
    for name, layer in model.named_modules():
        if isinstance(layer, LowRankLinear) and name.startswith("transformer_blocks."):
            layer.token_slice = rank if tokens_seen(name.split(".", 2)[2]) == "video" else 0


class DropoutKeys:
    """The keys of the adapter layers' dropout masks, set once per step from one seed per sample.

    A sample's masks depend on its seed and the layer alone, not on its batch. They need no random state.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = [m for m in model.modules() if isinstance(m, LowRankLinear)]
        self._layers = [m for m in layers if any(m.dropout_rate(name) > 0 for name in m.active_adapters)]
        self._tables: dict[int, Tensor] = {}
        self._samples = 0

    def set(self, seeds: Sequence[int]) -> None:
        if not self._layers:
            return
        samples = torch.tensor([seed & 0x7FFFFFFF for seed in seeds], dtype=torch.int32)
        numbers = torch.arange(len(self._layers), dtype=torch.int32)
        keys = mix(samples[None] ^ mix(numbers)[:, None])
        table = self._table(len(seeds))
        table.copy_(keys.pin_memory() if table.is_cuda else keys, non_blocking=True)

    def _table(self, samples: int) -> Tensor:
        """(layers, samples) int32; each layer reads one row. All steps of a batch size use the same memory."""
        if samples not in self._tables:
            first: Any = self._layers[0]
            device = first.lora_A[_NAME].weight.device
            self._tables[samples] = torch.zeros(len(self._layers), samples, dtype=torch.int32, device=device)
        if samples != self._samples:
            self._samples = samples
            for layer, row in zip(self._layers, self._tables[samples], strict=True):
                layer.mask_keys = row
        return self._tables[samples]


@contextmanager
def disabled(model: nn.Module) -> Generator[None]:
    """Switches the adapter off within the context."""
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def set_strength(model: nn.Module, strength: float) -> None:
    """Multiplies the adapter's scale by `strength`: output = base + strength * scale * B(A(x))."""
    for layer in (m for m in model.modules() if isinstance(m, LowRankLinear)):
        layer.scaling[_NAME] *= strength


@contextmanager
def at_strength(model: nn.Module, strength: float) -> Generator[None]:
    """`set_strength` within the context."""
    layers = [m for m in model.modules() if isinstance(m, LowRankLinear)]
    before = [layer.scaling[_NAME] for layer in layers]
    set_strength(model, strength)
    try:
        yield
    finally:
        for layer, scale in zip(layers, before, strict=True):
            layer.scaling[_NAME] = scale


def norm_ratios(model: nn.Module) -> dict[str, float]:
    """|dW| / |W| in Frobenius norms, the relative size of the adapter's update, by module group. The last entry, "", is
    the ratio over all targeted layers.

    |B A|^2 = sum((A A^T) * (B^T B)) needs only rank x rank matrices. DoRA's magnitudes are not included.
    """
    moved: dict[str, list[Tensor]] = {}
    base: dict[str, float] = {}
    layers: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, LowRankLinear)}
    for name, layer in layers.items():
        a, b = layer.lora_A[_NAME].weight.detach().float(), layer.lora_B[_NAME].weight.detach().float()
        group = module_group(name)
        moved.setdefault(group, []).append(((a @ a.T) * (b.T @ b)).sum() * layer.scaling[_NAME] ** 2)
        base[group] = base.get(group, 0.0) + frobenius(layer.get_base_layer()) ** 2
    squares = {group: max(0.0, float(torch.stack(parts).sum())) for group, parts in moved.items()}
    ratios = {group: math.sqrt(square / base[group]) if base[group] else 0.0 for group, square in squares.items()}
    total = sum(base.values())
    return {**ratios, "": math.sqrt(sum(squares.values()) / total) if total else 0.0}


def unmoved(model: nn.Module) -> list[str]:
    """Names of targeted layers whose B is still exactly zero. After the first steps such layers are not learning."""
    layers: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, LowRankLinear)}
    if not layers:
        return []
    largest = torch.stack([layer.lora_B[_NAME].weight.detach().abs().amax() for layer in layers.values()])
    return [name for name, value in zip(layers, largest.tolist(), strict=True) if value == 0]


def module_group(name: str) -> str:
    """The part of the block that holds a parameter (`audio_attn1`, `ff`, ...), or its top-level module."""
    parts = name.split(".")
    return parts[2] if parts[0] == "transformer_blocks" else parts[0]


def _hits(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)
