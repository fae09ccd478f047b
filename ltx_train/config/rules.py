"""Every rule between settings: what is valid, what a command needs, what a run that goes on may change.

Names and numbers only; no torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Any

from omegaconf import OmegaConf

from ltx_train.contracts import Condition, ConditionKind, ConfigError, Mode, Role
from ltx_train.schema import Config

_CHOICES: dict[str, tuple[str | None, ...]] = {
    "model.preset": ("tiny", "ltx2_3_22b"),
    "model.weights": ("file", "random"),
    "model.dtype": ("bfloat16", "float32"),
    "adapter.kind": ("lora", "full"),
    "data.latent_dtype": ("bfloat16", "float32"),
    "data.on_bad_clip": ("error", "skip"),
    "optim.name": ("adamw", "adamw8bit"),
    "optim.schedule": ("constant", "linear", "cosine"),
    "memory.quantize": ("none", "int8", "int4", "float8", "auto"),
    "memory.compute": ("bf16", "fp8"),
    "memory.keep": (None, "everything", "attention", "inputs"),
    "memory.compile": ("auto", "on", "off"),
    "strategy.name": ("single", "ddp"),
    "strategy.device": ("auto", "cpu", "cuda"),
    "supervise.notice": ("none", "aws", "gcp"),
    "logger.wandb": ("offline", "online", "disabled"),
    "run.resume": ("auto", "never"),
}
_AT_LEAST = {
    "adapter.rank": 1, "adapter.dropout": 0, "data.reference_s": 0.2, "data.samples_per_shard": 1, "data.workers": 0,
    "optim.lr": 0, "optim.steps": 1, "optim.batch_size": 1, "optim.global_batch": 1, "optim.warmup": 0, "optim.clip": 0,
    "eval.interval": 0, "eval.batch_size": 1, "eval.wrong_references": 1, "logger.every": 1,
    "checkpoint.interval": 1, "checkpoint.keep": 1, "sample.steps": 1, "check.previews": 0,
    "memory.keep_everything": 0, "memory.stream_blocks": 0, "memory.stream_slots": 2, "memory.budget_gib": 0.5,
    "strategy.devices": 1, "strategy.step_timeout_s": 0, "strategy.start_timeout_s": 0, "checkpoint.failures": 1,
    "cluster.nodes": 1, "cluster.devices": 1, "cluster.cpus": 1, "cluster.signal_s": 1, "cluster.hung_restarts": 0,
    "supervise.poll_s": 0.1, "supervise.restarts": 1, "supervise.backoff_s": 0,
    "bench.steps": 1, "bench.warmup": 1, "loss.video_weight": 0, "loss.audio_weight": 0, "data.fps": 1,
}  # fmt: skip
_BUCKET = re.compile(r"(\d+)x(\d+)x(\d+)")


def validate(config: Config) -> None:
    """Every rule that holds for all commands; ConfigError names the field and the mend."""
    for name, allowed in _CHOICES.items():
        value = _value(config, name)
        if value not in allowed:
            raise ConfigError(
                f"{name}={value!r}: choose one of {_listed(allowed)}{nearest(str(value), _named(allowed))}"
            )
    for name, least in _AT_LEAST.items():
        value = _value(config, name)
        if value is not None and value < least:
            raise ConfigError(f"{name}={value}: must be at least {least}")
    for bucket in config.data.buckets + ([config.sample.bucket] if config.sample.bucket else []):
        parse_bucket(bucket)
    known = list(schema_keys()) if config.sweep.space else []
    for name in (line.partition("=")[0].strip() for line in config.sweep.space):
        if name not in known:
            raise ConfigError(f"sweep.space: there is no setting {name!r}{nearest(name, known)}")
    _validate_mode(config)
    _validate_training(config)


def require(config: Config, command: str) -> None:
    """What one command needs beyond a valid configuration."""
    buckets = bool(config.data.buckets) or (command == "sample" and config.sample.bucket is not None)
    weights = config.model.path is not None or config.model.weights == "random"
    needs = {
        "model.path": (command not in ("export", "plan", "doctor"), weights,
                       "give the single-file checkpoint, or model.weights=random for a trial"),
        "data.source": (command == "prepare", config.data.source is not None, "give the folder or table of clips"),
        "data.buckets": (command not in ("export", "inspect", "doctor"), buckets,
                         "give at least one WIDTHxHEIGHTxFRAMES"),
        "inspect.file": (command == "inspect", config.inspect.file is not None, "give the LoRA file to inspect"),
        "sample.audio": (command == "sample" and config.mode.audio is Role.freeze, config.sample.audio is not None,
                         "mode.audio=freeze makes a video for a given sound: give it with sample.audio=FILE"),
    }  # fmt: skip
    for name, (needed, given, mend) in needs.items():
        if needed and not given:
            raise ConfigError(f"{name} is not set: {mend}")


def rounds(config: Config, world: int) -> int:
    """Micro-batches of one device per optimizer step; ConfigError when the global batch cannot be divided so."""
    batch, wanted = config.optim.batch_size, config.optim.global_batch
    if wanted is None:
        return 1
    count, rest = divmod(wanted, batch * world)
    if rest or not count:
        share = wanted // world
        fitting = [str(n) for n in range(1, share + 1) if wanted % world == 0 and share % n == 0]
        mend = (
            f"optim.batch_size one of {', '.join(fitting)}" if fitting else f"a number of devices that divides {wanted}"
        )
        raise ConfigError(
            f"optim.global_batch={wanted} is no multiple of {world} devices x optim.batch_size={batch}: take {mend}"
        )
    return count


def parse_bucket(text: str) -> tuple[int, int, int]:
    """`WxHxF` -> (width, height, frames); ConfigError when off the grid."""
    match = _BUCKET.fullmatch(text)
    if not match:
        raise ConfigError(f"data.buckets: {text!r} is not WIDTHxHEIGHTxFRAMES (as 512x512x121)")
    width, height, frames = (int(g) for g in match.groups())
    if width % 32 or height % 32 or not width or not height:
        raise ConfigError(f"data.buckets: {text!r}: width and height must be multiples of 32")
    if frames % 8 != 1:
        near = max(1, round((frames - 1) / 8) * 8 + 1)
        raise ConfigError(f"data.buckets: {text!r}: frames must be 8k + 1 (nearest: {near})")
    return width, height, frames


def _validate_mode(config: Config) -> None:
    mode = config.mode
    kinds = [condition.kind for condition in mode.conditions]
    if len(set(kinds)) != len(kinds):
        raise ConfigError("mode.conditions: each kind may stand once")
    if Role.generate not in (mode.video, mode.audio):
        raise ConfigError("mode: nothing is generated; set mode.video or mode.audio to generate")
    for condition in mode.conditions:
        _validate_condition(condition, mode)
    weights = {"video": config.loss.video_weight, "audio": config.loss.audio_weight}
    generated = [name for name in weights if getattr(mode, name) is Role.generate]
    if all(weights[name] == 0 for name in generated):
        raise ConfigError(f"loss: the weight of every generated modality ({', '.join(generated)}) is 0")


def _validate_condition(condition: Condition, mode: Mode) -> None:
    if not 0 <= condition.p <= 1:
        raise ConfigError(f"mode.conditions: p={condition.p} of {condition.kind} must lie in [0, 1]")
    if condition.kind is ConditionKind.first_frame and mode.video is not Role.generate:
        raise ConfigError("mode.conditions: first_frame needs mode.video=generate")
    if condition.kind is ConditionKind.reference and mode.audio is not Role.generate:
        raise ConfigError("mode.conditions: a reference needs mode.audio=generate")
    if condition.kind is ConditionKind.reference and condition.p != 1:
        raise ConfigError("mode.conditions: the reference is always given (p=1) in this release")


def _validate_training(config: Config) -> None:
    adapter = config.adapter
    if adapter.kind == "lora" and not adapter.targets:
        raise ConfigError("adapter.targets is empty: choose adapter=attention, cross_modal or audio_only")
    _validate_memory(config)
    _validate_strategy(config)
    if config.mode.audio is Role.absent and any("audio" in t for t in adapter.targets):
        raise ConfigError("adapter.targets name audio modules, but mode.audio=absent gives them no loss")
    if not 0 <= config.data.heldout_speakers < 1:
        raise ConfigError("data.heldout_speakers must lie in [0, 1): a share of the identities")
    if not config.eval.sigmas or not all(0 < s <= 1 for s in config.eval.sigmas):
        raise ConfigError("eval.sigmas must be noise levels in (0, 1]")


def _validate_strategy(config: Config) -> None:
    strategy = config.strategy
    if strategy.name == "single" and strategy.devices > 1:
        raise ConfigError(f"strategy.devices={strategy.devices} needs strategy=ddp")
    if strategy.name == "ddp" and config.adapter.kind == "full":
        raise ConfigError("strategy=ddp holds a whole copy per device, which adapter.kind=full has no room for")


def _validate_memory(config: Config) -> None:
    memory = config.memory
    if memory.stream_blocks and memory.keep == "everything":
        raise ConfigError(
            "memory: a streamed block cannot keep everything, its weights have moved on: set memory.keep=inputs"
        )
    if memory.compute == "fp8" and memory.quantize not in ("none", "float8"):
        raise ConfigError(
            f"memory.compute=fp8 holds its weights in float8, not {memory.quantize}: set memory.quantize=none or float8"
        )
    if config.adapter.kind != "full":
        return
    if memory.stream_blocks:
        raise ConfigError(
            "adapter.kind=full trains every weight, and only frozen ones are streamed: set memory=recompute"
        )
    if memory.quantize != "none" or memory.compute != "bf16":
        raise ConfigError(
            "adapter.kind=full trains every weight, which quantized weights cannot be: "
            "set memory.quantize=none and memory.compute=bf16"
        )


def _named(choices: tuple[str | None, ...]) -> list[str]:
    return [choice for choice in choices if choice is not None]


def _listed(choices: tuple[str | None, ...]) -> str:
    return ", ".join("null" if choice is None else choice for choice in choices)


def _value(config: Config, dotted: str) -> Any:
    value: Any = config
    for part in dotted.split("."):
        value = getattr(value, part)
    return value


def schema_keys() -> Iterator[str]:
    def walk(node: Any, prefix: str) -> Iterator[str]:
        for key in node:
            yield prefix + key
            child = node._get_node(key)
            if OmegaConf.is_dict(child):
                yield from walk(child, f"{prefix}{key}.")

    return walk(OmegaConf.structured(Config), "")


def nearest(word: str, known: Any) -> str:
    """`; did you mean ...?` for the closest known word, or nothing."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""
