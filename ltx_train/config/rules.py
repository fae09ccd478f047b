"""Rules between settings. Limits and choices of single settings stand with their declarations in the schema."""

from __future__ import annotations

from ltx_train.config import modes, prompts, suggest, targets
from ltx_train.config.buckets import parse_bucket
from ltx_train.config.schema import Config
from ltx_train.config.settings import all_settings, check_value
from ltx_train.contracts import SPEAKER, ConfigError, ModalityName
from ltx_train.distributed.strategies import AUTO, DEEPSPEED, STRATEGIES, StrategyKind
from ltx_train.updates.kinds import OPTIMIZERS

# The dtype that 8-bit products (`memory.compute`) hold their weights in, as a value of `memory.quantize`.
STORED_AS = {"fp8": "float8", "int8": "int8"}

# Names get prefixes and endings; a file name may have 255 bytes.
_LONGEST_NAME = 200
_STREAMS = ("video", "audio", "bridge")
_SEVERAL = ", ".join(kind.name for kind in STRATEGIES.values() if kind.several)


def validate(config: Config) -> None:
    """Every rule that holds for all commands; ConfigError names the setting and the mend."""
    for setting in all_settings().values():
        check_value(config, setting)
    for bucket in config.data.buckets + ([config.sample.bucket] if config.sample.bucket else []):
        parse_bucket(bucket)
    if config.data.also_weights and len(config.data.also_weights) != len(config.data.also):
        raise ConfigError(
            f"data.also_weights has {len(config.data.also_weights)} numbers for {len(config.data.also)} folders in "
            "data.also: give one for each"
        )
    _validate_names(config)
    _validate_search(config)
    modes.validate(config)
    _validate_memory(config)
    _validate_strategy(config)
    _validate_adapter(config)
    _validate_voices(config)
    _validate_measuring(config)
    if not isinstance(config.eval.prompts, str):  # a file is read by the command that needs it
        prompts.prompted(config)
    _validate_strengths(config)
    if config.export.hub_repo is not None and config.export.hub_folder is None:
        raise ConfigError("export.hub_repo uploads a folder: set export.hub_folder, too")
    _validate_noise(config)
    _validate_optimizer(config)


def readers(config: Config, world: int) -> int:
    """Samples that `world` devices take at a time; ConfigError when they do not make whole sequence groups."""
    sequence = config.strategy.sequence
    if world % sequence:
        raise ConfigError(
            f"strategy.sequence={sequence}: {world} devices do not make groups of {sequence}: take a number of devices "
            f"that {sequence} divides"
        )
    return world // sequence


def micro_batches(config: Config, world: int) -> int:
    """Micro-batches of one device per optimizer step; ConfigError when the global batch cannot be divided so."""
    batch, global_batch = config.optim.batch_size, config.optim.global_batch
    if global_batch is None:
        return 1
    world = readers(config, world)
    count, rest = divmod(global_batch, batch * world)
    if rest or not count:
        share = global_batch // world
        fitting = [str(n) for n in range(1, share + 1) if global_batch % world == 0 and share % n == 0]
        mend = (
            f"optim.batch_size one of {', '.join(fitting)}"
            if fitting
            else f"a number of devices that divides {global_batch}"
        )
        raise ConfigError(
            f"optim.global_batch={global_batch} is no multiple of {world} devices x optim.batch_size={batch}: take "
            f"{mend}"
        )
    return count


def _validate_names(config: Config) -> None:
    """Names of folders stay inside the run root, and outputs have the ending of what is written."""
    names = {"run.id": config.run.id, "run.experiment": config.run.experiment, "sweep.name": config.sweep.name}
    for name, value in names.items():
        if not value.isprintable() or "/" in value or "\\" in value or value.strip() in ("", ".", ".."):
            raise ConfigError(f"{name}={value!r}: give a plain name of a folder, without slashes and line breaks")
        if len(value.encode()) > _LONGEST_NAME:
            raise ConfigError(f"{name} has {len(value.encode())} bytes: at most {_LONGEST_NAME} fit into a file name")
    outputs = {
        "export.out": (config.export.out, ".safetensors"), "sample.out": (config.sample.out, ".mp4"),
        "bench.out": (config.bench.out, ".json"),
    }  # fmt: skip
    for name, (value, ending) in outputs.items():
        if value is not None and not value.endswith(ending):
            raise ConfigError(f"{name}={value}: the file is a {ending} file and has to be named so")


def _validate_search(config: Config) -> None:
    known = list(all_settings())
    for line in config.sweep.space:
        name = line.partition("=")[0].strip()
        if name not in known:
            raise ConfigError(f"sweep.space: there is no setting {name!r}{suggest.for_setting(name, known)}")


def _validate_voices(config: Config) -> None:
    variants, measured = config.data.voice_variants, config.eval.voice_variant
    if config.data.voice_variant_share and not variants:
        raise ConfigError("data.voice_variant_share needs data.voice_variants, such as [gain,lowpass,noise,music]")
    if measured is not None and measured not in variants:
        raise ConfigError(f"eval.voice_variant={measured}: the data have data.voice_variants={variants}")
    references = [c for _, mode in modes.training_modes(config) for c in mode.references]
    hears = any(c.source == SPEAKER and c.stream is ModalityName.audio for c in references)
    used = "data.voice_variant_share" if config.data.voice_variant_share else "eval.voice_variant" if measured else ""
    if used and not hears:
        raise ConfigError(f"{used} is for modes with a voice reference: leave it out, or take mode=audio_reference")


def _validate_measuring(config: Config) -> None:
    if not (config.eval.sigmas or config.eval.quantiles) or not all(0 < s <= 1 for s in config.eval.sigmas):
        raise ConfigError("eval.sigmas must be noise levels in (0, 1]; with none, eval.quantiles must be at least 1")


def _validate_strengths(config: Config) -> None:
    for name in ("sample", "export", "lora"):
        for stream, strength in getattr(config, name).strength_of.items():
            if stream not in _STREAMS or not 0 <= strength <= 2:
                known = ", ".join(_STREAMS)
                raise ConfigError(f"{name}.strength_of: {stream}={strength:g}: give {known}, from 0 to 2")
    given, files = config.lora.strengths, config.lora.files
    if given and len(given) != len(files):
        raise ConfigError(f"lora.strengths has {len(given)} numbers for {len(files)} files: give one for each")


def _validate_optimizer(config: Config) -> None:
    betas = config.optim.betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ConfigError(f"optim.betas={betas}: give the two decay rates, each in [0, 1), as [0.9,0.95]")


def _validate_noise(config: Config) -> None:
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
        for name in ("ema", "dora", "start_from", "targets"):
            if getattr(adapter, name):
                raise ConfigError(f"adapter.{name} is for adapter.kind=lora; kind=full trains every weight")
        return
    targets.validate(config)
    wrong = [f"{k}={v}" for p in (adapter.rank_pattern, adapter.alpha_pattern) for k, v in p.items() if v <= 0]
    if wrong:
        raise ConfigError(f"adapter.rank_pattern and alpha_pattern must be above 0: {wrong[0]}")


def _validate_strategy(config: Config) -> None:
    strategy, kind = config.strategy, STRATEGIES[config.strategy.name]
    full = config.adapter.kind == "full"
    if not kind.several and strategy.devices > 1:
        raise ConfigError(f"strategy.devices={strategy.devices} needs strategy={_SEVERAL}")
    if full and not kind.trains_all_weights:
        raise ConfigError(
            f"strategy={kind.name} holds all weights and moments on each device, which adapter.kind=full has no room "
            "for: take strategy=zero2 or zero3"
        )
    if strategy.sequence > 1:
        _validate_sequence(config, kind)
    if strategy.offload and not (full and kind.is_zero):
        raise ConfigError(
            "strategy.offload moves the optimizer state that a full fine-tune slices over devices: set adapter=full "
            "and strategy=zero3, or take memory.stream_blocks for a frozen base"
        )
    if strategy.offload and config.memory.graphs:
        raise ConfigError(
            "memory.graphs=true: passes in which the host accumulates gradients, as with strategy.offload, are not "
            "recorded: leave it out"
        )
    if kind.slices_frozen_blocks and config.memory.stream_blocks:
        raise ConfigError(
            f"memory.stream_blocks is for blocks in host memory; under strategy={kind.name} they are on the other "
            "ranks: leave it out"
        )
    validate_engine(config, machines=1)


def validate_engine(config: Config, machines: int) -> None:
    """The rules that depend on the number of machines, because whose ZeRO it is depends on it."""
    strategy, kind = config.strategy, STRATEGIES[config.strategy.name]
    full, engine = config.adapter.kind == "full", kind.engine(strategy.engine, machines)
    if not kind.is_zero and strategy.engine == DEEPSPEED:
        raise ConfigError(f"strategy.engine=deepspeed slices, and strategy={kind.name} does not: set strategy=zero3")
    if kind.update_stage(full=full, engine=engine):
        _validate_sliced_updates(config)
    if engine == DEEPSPEED:
        _validate_deepspeed(config)
        return
    if kind.is_zero and machines > 1:
        raise ConfigError(
            f"strategy.engine=own copies slices between the devices of one machine, and there are {machines}: leave it "
            "out, and DeepSpeed takes its place"
        )
    if machines == 1 and strategy.engine == AUTO and kind.is_zero:
        return  # settings for several machines may stand in the configuration of a job
    if strategy.deepspeed or (strategy.hpz or 1) > 1:
        raise ConfigError(
            f"strategy.deepspeed and strategy.hpz are for DeepSpeed, and strategy={kind.name} "
            f"strategy.engine={strategy.engine} is not: set strategy=deepspeed_zero3, or leave them out"
        )


def _validate_deepspeed(config: Config) -> None:
    """DeepSpeed's engine has no place for some of this project's settings."""
    memory, full = config.memory, config.adapter.kind == "full"
    refused = {"optim.skip_spikes": (config.optim.skip_spikes, "it skips non-finite gradients alone")}
    if full:
        refused |= {
            "memory.graphs": (memory.graphs, "its hooks cannot be recorded as CUDA graphs"),
            "memory.offload_inputs": (memory.offload_inputs, "its hooks hold the inputs of blocks"),
        }
    elif config.strategy.hpz is not None:
        raise ConfigError(
            "strategy.hpz is for full fine-tunes: the frozen base of an adapter is sliced within each machine always; "
            "leave it out"
        )
    for name, (value, reason) in refused.items():
        if value:
            raise ConfigError(f"{name} does not work with DeepSpeed's engine: {reason}; leave it out")


def _validate_sequence(config: Config, kind: StrategyKind) -> None:
    """Ranks that share samples pass through the blocks together."""
    if not kind.several:
        raise ConfigError(f"strategy.sequence needs several devices: set strategy={_SEVERAL} and strategy.devices")
    if config.memory.graphs:
        raise ConfigError(
            "memory.graphs=true: passes in which ranks exchange tokens, as with strategy.sequence, are not recorded: "
            "leave it out"
        )
    together, devices = config.strategy.sequence, config.strategy.devices
    if devices > 1 and together % devices:  # a group may span machines
        readers(config, devices)


def _validate_sliced_updates(config: Config) -> None:
    """Slices are updated element by element, and gradients are reduced inside the pass."""
    kind = OPTIMIZERS[config.optim.name]
    if not kind.elementwise:
        elementwise = ", ".join(k.name for k in OPTIMIZERS.values() if k.elementwise)
        raise ConfigError(
            f"strategy={config.strategy.name} updates slices of the weights, for which optim={kind.name} needs whole "
            f"tensors: set optim={elementwise}"
        )


def _validate_memory(config: Config) -> None:
    memory = config.memory
    stored = STORED_AS.get(memory.compute)
    if stored and memory.quantize not in ("auto", "none", stored):
        raise ConfigError(
            f"memory.compute={memory.compute} holds its weights in {stored}, not {memory.quantize}: set "
            f"memory.quantize=none or {stored}"
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
