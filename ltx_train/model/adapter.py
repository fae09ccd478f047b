"""LoRA on the transformer through peft: attaching, counting, reading and writing its weights.

Owns which modules are targeted and the names of adapter tensors without peft's decorations. It
must not know files or optimizers.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ltx_train import rng
from ltx_train.contracts import UserError
from ltx_train.model.linear import LowRankLinear, frobenius, mix

_NAME = "default"


class AdapterError(UserError):
    """Target modules or adapter tensors that do not fit the model."""


@dataclass(frozen=True, slots=True)
class Lora:
    """Rank, alpha (scale = alpha / rank), dropout and target module names (suffixes at a dot)."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]


def matched_modules(model: nn.Module, targets: Iterable[str]) -> list[str]:
    """Full names of the linear layers a list of targets hits, in model order.

    AdapterError names every target that hits nothing: a mistyped one must not shrink the adapter silently.
    """
    names = [name for name, module in model.named_modules() if _is_linear(module) and "lora_" not in name]
    names = [name.removesuffix(".base_layer") for name in names]
    wanted = list(targets)
    dead = [t for t in wanted if not any(_hits(name, t) for name in names)]
    if dead:
        raise AdapterError(f"adapter.targets match no linear layer of the transformer: {', '.join(dead)}")
    return [name for name in names if any(_hits(name, t) for t in wanted)]


def attach(model: nn.Module, lora: Lora, seed: int) -> None:
    """Adds trainable float32 LoRA weights in place: A from a keyed Kaiming draw, B zero, so the output is unchanged."""
    modules = matched_modules(model, lora.targets)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=lora.dropout,
        target_modules=modules,
    )
    config._register_custom_module({nn.Linear: LowRankLinear})
    inject_adapter_in_model(config, model, adapter_name=_NAME)
    for name, parameter in lora_parameters(model).items():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
        if ".lora_A." in name and not parameter.is_meta:
            stream = torch.Generator(parameter.device).manual_seed(rng.key_seed(seed, "lora", name))
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=stream)


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Adapter parameters as `<module>.lora_A.weight` / `<module>.lora_B.weight`."""
    found = ((plain_name(name), p) for name, p in model.named_parameters() if ".lora_" in name)
    return dict(found)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters that receive gradients, by plain name, in model order."""
    return {plain_name(name): p for name, p in model.named_parameters() if p.requires_grad}


def plain_name(name: str) -> str:
    """A parameter's name without peft's `.default` and `.base_layer`."""
    return name.replace(f".{_NAME}.", ".").replace(".base_layer.", ".")


def load_state(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies tensors into the trainable parameters; both sides must have the same names and shapes."""
    parameters = trainable_parameters(model)
    missing, extra = sorted(parameters.keys() - tensors.keys()), sorted(tensors.keys() - parameters.keys())
    shapes = [n for n in parameters.keys() & tensors.keys() if parameters[n].shape != tensors[n].shape]
    if missing or extra or shapes:
        raise AdapterError(
            f"the saved weights do not fit the model: {len(missing)} missing, {len(extra)} unknown, "
            f"{len(shapes)} of another shape (first: {(missing + extra + shapes)[0]})"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


class DropoutKeys:
    """The keys of every adapter layer's dropout masks, set once a step from one seed per sample.

    The masks of a sample depend on its seed and the layer alone, not on its batch, and need no random state.
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
        table = self._bound(len(seeds))
        table.copy_(keys.pin_memory() if table.is_cuda else keys, non_blocking=True)

    def _bound(self, samples: int) -> Tensor:
        """(layers, samples) int32 whose rows the layers read: one address for every step of a batch size."""
        if samples not in self._tables:
            device = next(self._layers[0].parameters()).device
            self._tables[samples] = torch.zeros(len(self._layers), samples, dtype=torch.int32, device=device)
        if samples != self._samples:
            self._samples = samples
            for layer, row in zip(self._layers, self._tables[samples], strict=True):
                layer.mask_keys = row
        return self._tables[samples]


@contextmanager
def disabled(model: nn.Module) -> Generator[None]:
    """The base model alone, within the context."""
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def set_strength(model: nn.Module, strength: float) -> None:
    """Scales the adapter's contribution: output = base + strength * (alpha / rank) * B(A(x))."""
    for layer in (m for m in model.modules() if isinstance(m, LoraLayer)):
        layer.set_scale(_NAME, strength)


def norm_ratio(model: nn.Module) -> float:
    """|dW| / |W| over all targeted layers, Frobenius norms: how far the adapter has moved the weights.

    |B A|^2 = sum((A A^T) * (B^T B)) needs only rank x rank matrices.
    """
    delta = base = 0.0
    layers: list[Any] = [m for m in model.modules() if isinstance(m, LoraLayer)]
    for layer in layers:
        a, b = layer.lora_A[_NAME].weight.float(), layer.lora_B[_NAME].weight.float()
        delta += float(((a @ a.T) * (b.T @ b)).sum().detach()) * layer.scaling[_NAME] ** 2
        base += frobenius(layer.get_base_layer()) ** 2
    return math.sqrt(max(delta, 0.0) / base) if base else 0.0


def module_group(name: str) -> str:
    """The part of a block a parameter belongs to (`audio_attn1`, `ff`, ...), or the top-level module."""
    parts = name.split(".")
    return parts[2] if parts[0] == "transformer_blocks" else parts[0]


def _hits(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)
