"""Every rule between settings: what is valid, what a command needs, what a run that goes on may change.

Names and numbers only; no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from omegaconf import OmegaConf

from ltx_train.config import modes, targets
from ltx_train.config.grid import parse_bucket
from ltx_train.config.words import nearest
from ltx_train.contracts import ConfigError, Role
from ltx_train.schema import Config

_CHOICES: dict[str, tuple[str | None, ...]] = {
    "model.preset": ("tiny", "ltx2_3_22b"),
    "model.weights": ("file", "random"),
    "model.dtype": ("bfloat16", "float32"),
    "adapter.kind": ("lora", "full"),
    "data.latent_dtype": ("bfloat16", "float32"),
    "data.on_bad_clip": ("error", "skip"),
    "adapter.init": ("kaiming", "gaussian", "orthogonal"),
    "sigma.kind": ("shifted_logit_normal", "logit_normal", "uniform", "high"),
    "loss.balance": ("none", "auto"),
    "loss.weighting": ("none", "cosmap"),
    "optim.name": ("adamw", "adamw8bit", "paged_adamw8bit", "prodigy"),
    "optim.schedule": ("constant", "linear", "cosine"),
    "memory.quantize": ("none", "int8", "int4", "float8", "auto"),
    "memory.compute": ("bf16", "fp8"),
    "memory.keep": (None, "everything", "attention", "inputs"),
    "memory.compile": ("auto", "on", "off"),
    "strategy.name": ("single", "ddp", "zero1", "zero2", "zero3"),
    "strategy.device": ("auto", "cpu", "cuda"),
    "supervise.notice": ("none", "aws", "gcp"),
    "sweep.sampler": ("tpe", "grid"),
    "sweep.place": ("local", "slurm"),
    "logger.wandb": ("offline", "online", "disabled"),
    "run.resume": ("auto", "never"),
}
_AT_LEAST = {
    "adapter.rank": 1, "adapter.dropout": 0, "data.reference_s": 0.2, "data.samples_per_shard": 1, "data.workers": 0,
    "optim.lr": 0, "optim.steps": 1, "optim.batch_size": 1, "optim.global_batch": 1, "optim.warmup": 0, "optim.clip": 0,
    "optim.skip_spikes": 2,
    "eval.quantiles": 0, "data.reference_scale": 1, "eval.samples": 0, "eval.patience": 0, "sigma.std": 0,
    "sigma.tokens": 1, "adapter.alpha": 0,
    "eval.interval": 0, "eval.batch_size": 1, "eval.wrong_references": 1, "logger.every": 1,
    "checkpoint.interval": 1, "checkpoint.keep": 1, "sample.steps": 1, "check.previews": 0,
    "memory.keep_everything": 0, "memory.stream_blocks": 0, "memory.stream_slots": 2, "memory.budget_gib": 0.5,
    "strategy.devices": 1, "strategy.step_timeout_s": 0, "strategy.start_timeout_s": 0, "checkpoint.failures": 1,
    "strategy.sequence": 1, "sweep.parallel": 1, "sweep.trials": 1,
    "cluster.nodes": 1, "cluster.devices": 1, "cluster.cpus": 1, "cluster.signal_s": 1, "cluster.hung_restarts": 0,
    "supervise.poll_s": 0.1, "supervise.restarts": 1, "supervise.backoff_s": 0,
    "bench.steps": 1, "bench.warmup": 1, "loss.video_weight": 0, "loss.audio_weight": 0, "data.fps": 1,
}  # fmt: skip


_BETWEEN = {
    "data.heldout_speakers": (0, 1, False), "data.caption_dropout": (0, 1, True), "adapter.dropout": (0, 1, False),
    "adapter.ema": (0, 1, False), "loss.balance_decay": (0, 1, False), "sigma.uniform_prob": (0, 1, True),
    "sigma.eps": (0, 1, False), "sigma.low": (0, 1, True), "sigma.high": (0, 1, True), "sigma.high_from": (0, 1, True),
    "sigma.high_prob": (0, 1, True),
}  # fmt: skip
_ALSO = ("csv", "tensorboard")


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
    modes.validate(config)
    _validate_training(config)
    _validate_shares(config)


def require(config: Config, command: str) -> None:
    """What one command needs beyond a valid configuration."""
    buckets = bool(config.data.buckets) or (command == "sample" and config.sample.bucket is not None)
    weights = config.model.path is not None or config.model.weights == "random"
    needs = {
        "model.path": (command not in ("export", "plan", "doctor"), weights,
                       "give the single-file checkpoint, or model.weights=random for a trial"),
        "data.root": (command == "evaluate" and config.checkpoints is None, bool(config.data.root),
                      "give the prepared folder of the run"),
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


def readers(config: Config, world: int) -> int:
    """How many samples are taken at a time by `world` devices; ConfigError when they do not make whole groups."""
    together = config.strategy.sequence
    if world % together:
        raise ConfigError(
            f"strategy.sequence={together}: {world} devices do not make groups of {together}: take a number of devices "
            f"that {together} divides"
        )
    return world // together


def rounds(config: Config, world: int) -> int:
    """Micro-batches of one device per optimizer step; ConfigError when the global batch cannot be divided so."""
    batch, wanted = config.optim.batch_size, config.optim.global_batch
    if wanted is None:
        return 1
    world = readers(config, world)
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


def _validate_training(config: Config) -> None:
    _validate_memory(config)
    _validate_strategy(config)
    _validate_adapter(config)
    if not (config.eval.sigmas or config.eval.quantiles) or not all(0 < s <= 1 for s in config.eval.sigmas):
        raise ConfigError("eval.sigmas must be noise levels in (0, 1]; with none, eval.quantiles must be at least 1")
    for name in config.logger.also:
        if name not in _ALSO:
            raise ConfigError(f"logger.also={name!r}: choose among {', '.join(_ALSO)}{nearest(name, _ALSO)}")


def _validate_shares(config: Config) -> None:
    """Settings that are shares or noise levels."""
    for name, (low, high, closed) in _BETWEEN.items():
        value = _value(config, name)
        if not low <= value <= high or (not closed and value == high):
            raise ConfigError(f"{name}={value:g}: must lie in [{low:g}, {high:g}{']' if closed else ')'}")
    sigma = config.sigma
    if sigma.low >= sigma.high:
        raise ConfigError(f"sigma.low={sigma.low:g} must be below sigma.high={sigma.high:g}")
    if sigma.shift_limits and (len(sigma.shift_limits) != 2 or sigma.shift_limits[0] > sigma.shift_limits[1]):
        raise ConfigError("sigma.shift_limits: give [lowest, highest] of the shift, as [0.95, 2.05], or nothing")
    for name, weight in config.loss.token_weights.items():
        if weight < 0:
            raise ConfigError(f"loss.token_weights: {name} weighs {weight:g}, a weight is at least 0")


def _validate_adapter(config: Config) -> None:
    adapter = config.adapter
    if adapter.kind == "full":
        given = {"ema": adapter.ema, "dora": adapter.dora, "start_from": adapter.start_from, "targets": adapter.targets}
        unread = [name for name, value in given.items() if value]
        if unread:
            raise ConfigError(f"adapter.{unread[0]} is for adapter.kind=lora; kind=full trains every weight")
        return
    targets.validate(config)
    wrong = [f"{k}={v}" for p in (adapter.rank_pattern, adapter.alpha_pattern) for k, v in p.items() if v <= 0]
    if wrong:
        raise ConfigError(f"adapter.rank_pattern and alpha_pattern must be above 0: {wrong[0]}")


def _validate_strategy(config: Config) -> None:
    strategy = config.strategy
    if strategy.name == "single" and strategy.devices > 1:
        raise ConfigError(f"strategy.devices={strategy.devices} needs strategy=ddp, zero1, zero2 or zero3")
    if strategy.name == "ddp" and config.adapter.kind == "full":
        raise ConfigError(
            "strategy=ddp holds all weights and moments on each device, which adapter.kind=full has no room for: take "
            "strategy=zero2 or zero3"
        )
    full = config.adapter.kind == "full"
    if strategy.sequence > 1:
        _validate_sequence(config)
    if strategy.offload and not (full and strategy.name in ("zero1", "zero2", "zero3")):
        raise ConfigError(
            "strategy.offload moves the shares that a full fine-tune updates: set adapter=full and strategy=zero3, or "
            "take memory.stream_blocks for a frozen base"
        )
    if strategy.name in ("zero1", "zero2") or (strategy.name == "zero3" and full):
        _validate_shared_updates(config)
    if strategy.name == "zero3":
        _validate_sharing(config)


def _validate_sequence(config: Config) -> None:
    """Ranks that take samples together pass through the blocks together."""
    refused = {
        "strategy.sequence needs several devices: set strategy=ddp, zero1, zero2 or zero3 and strategy.devices":
            config.strategy.name == "single",
        "memory.graphs=true: passes in which ranks exchange tokens, as with strategy.sequence, are not recorded: leave "
        "it out": bool(config.memory.graphs),
        "eval.samples: clips are generated on one rank, and with strategy.sequence none has all tokens: set "
        "eval.samples=0 and look at them with evaluate": config.eval.samples > 0,
    }  # fmt: skip
    for message, wrong in refused.items():
        if wrong:
            raise ConfigError(message)
    together, devices = config.strategy.sequence, config.strategy.devices
    if devices > 1 and together % devices:  # a group may span machines
        readers(config, devices)


def _validate_shared_updates(config: Config) -> None:
    """Shares of the weights are updated element by element, and gradients are shared out in step."""
    name = config.strategy.name
    if config.optim.name != "adamw":
        raise ConfigError(f"strategy={name} updates shares of the weights, for which optim={config.optim.name} needs "
                          "whole tensors: set optim=adamw")  # fmt: skip
    if config.strategy.offload and config.memory.graphs:
        raise ConfigError("memory.graphs=true: passes in which the host adds up gradients, as with strategy.offload, "
                          "are not recorded: leave it out")  # fmt: skip


def _validate_sharing(config: Config) -> None:
    """Ranks that share the blocks pass through them together."""
    refused = {
        "eval.samples: clips are generated on one rank, and under strategy=zero3 none has the whole model: set "
        "eval.samples=0 and look at them with evaluate": config.eval.samples > 0,
        "memory.stream_blocks is for blocks in host memory; under strategy=zero3 they are on the other ranks: leave it "
        "out": bool(config.memory.stream_blocks),
    }  # fmt: skip
    for message, wrong in refused.items():
        if wrong:
            raise ConfigError(message)


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
