"""What a command cannot do without: settings that must be set and files that must be there.

Everything that is missing is named in one message, before any heavy library is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from ltx_train.config import clip_inputs, prompts, two_stages
from ltx_train.config.command_table import COMMANDS, CommandKind
from ltx_train.config.schema import Config
from ltx_train.contracts import ConfigError, DataError

_MENDS: Mapping[str, str] = {
    "model.path": "give the single-file checkpoint, or model.weights=random for a trial",
    "data.root": "give the prepared folder",
    "data.source": "give the folder or table of clips",
    "data.buckets": "give at least one WIDTHxHEIGHTxFRAMES",
    "caption.url": "give an OpenAI-compatible endpoint, as http://127.0.0.1:8000/v1",
    "caption.model": "give the endpoint's name of the model",
    "cut.source": "give a recording, or a folder of recordings",
    "inspect.file": "give the LoRA file to inspect",
    "lora.files": "give LoRA files, as [a.safetensors,b.safetensors]",
    "lora.tuned": "give the full fine-tune's checkpoint, and its base with model.path",
    "sample.bucket": "give WIDTHxHEIGHTxFRAMES, or data.buckets",
}
# Commands besides `sample` that generate clips.
_GENERATING = ("fit", "evaluate", "swap")
# What `lora` does with weights of the base.
_LORA_OF_BASE = ("extract", "plain")


def require(config: Config, command: str) -> None:
    """ConfigError that names every missing setting; DataError when all are set and files are missing."""
    kind = COMMANDS[command]
    if kind.name == "sample":
        for made in prompts.sampled(config):
            clip_inputs.of_clip(made)
            two_stages.check(made)
    elif config.sample.upsampler is not None and kind.name in _GENERATING:
        raise ConfigError(f"sample.upsampler: `{kind.name}` generates clips in one stage: leave it out")
    unset = [f"{name} is not set: {_MENDS[name]}" for name in _needed(config, kind) if not _is_set(config, name)]
    absent = list(_absent_files(config, kind)) if kind.checks_paths else []
    if unset:
        raise ConfigError(_listed([*unset, *absent]))
    if absent:
        raise DataError(_listed(absent))


def _needed(config: Config, kind: CommandKind) -> Iterator[str]:
    only_transcripts = config.caption.speech is not None and config.caption.url is None
    if kind.name == "lora" and config.lora.do in _LORA_OF_BASE:
        yield from ("model.path", *(["lora.tuned"] if config.lora.do == "extract" else []))
    for name in kind.needs:
        if name == "lora.files" and config.lora.do == "extract":
            continue
        if only_transcripts and name in ("caption.url", "caption.model"):
            continue
        # Adapters that are compared bring the data of their run along.
        if not (kind.name == "evaluate" and config.checkpoints is not None and name == "data.root"):
            yield name
    if kind.name == "bench" and config.bench.what == "data":
        yield "data.root"


def _is_set(config: Config, name: str) -> bool:
    given: Mapping[str, Callable[[], bool]] = {
        "model.path": lambda: config.model.path is not None or config.model.weights == "random",
        "data.root": lambda: bool(config.data.root),
        "data.source": lambda: bool(config.data.source),
        "data.buckets": lambda: bool(config.data.buckets),
        "caption.url": lambda: bool(config.caption.url),
        "caption.model": lambda: bool(config.caption.model),
        "cut.source": lambda: config.cut.source is not None,
        "inspect.file": lambda: config.inspect.file is not None,
        "lora.files": lambda: bool(config.lora.files),
        "lora.tuned": lambda: config.lora.tuned is not None,
        "sample.bucket": lambda: bool(config.sample.bucket or config.data.buckets),
    }
    return given[name]()


def _absent_files(config: Config, kind: CommandKind) -> Iterator[str]:
    """Paths that the command reads and that do not exist, each with its mend."""
    model, name = config.model, kind.name
    if name == "evaluate" and config.checkpoints is not None:
        return  # adapters that are compared bring the model of their run along
    if _reads_model(config, kind):
        if model.weights == "file":
            yield from _file("model.path", model.path, f"no checkpoint at {model.path}: set model.path to the "
                             "single-file .safetensors")  # fmt: skip
        yield from _file("model.merge", model.merge)
    if name in ("prepare", "sample") and model.text_encoder is not None and not Path(model.text_encoder).is_dir():
        yield f"model.text_encoder={model.text_encoder}: there is no such folder"
    if name in ("fit", "sweep"):
        yield from _file("adapter.start_from", config.adapter.start_from)
        yield from prompts.absent_files(config)
    if name == "cut":
        yield from _file("cut.subtitles", config.cut.subtitles)
        if config.cut.source is not None and not Path(config.cut.source).exists():
            yield f"cut.source={config.cut.source}: there is no such file or folder"
    for field, path in _inputs(config, name).items():
        yield from _file(field, path)
    if name == "lora":
        yield from (f"lora.files: there is no {path}" for path in config.lora.files if not Path(path).exists())


def _reads_model(config: Config, kind: CommandKind) -> bool:
    """Whether the command opens the base. `lora` needs it for some of its work alone."""
    if kind.name == "lora":
        return config.lora.do in _LORA_OF_BASE
    return "model" in (*kind.groups, *_fit_groups(kind))


def _inputs(config: Config, name: str) -> dict[str, str | None]:
    """Files that single commands read, by setting."""
    if name == "inspect":
        return {"inspect.file": config.inspect.file, "inspect.compare": config.inspect.compare}
    if name == "lora":
        return {"lora.tuned": config.lora.tuned}
    if name == "swap":
        return {"swap.face_model": config.swap.face_model}
    if name == "sample":
        files = [prompts.files(made) for made in prompts.sampled(config)]
        given = {f"sample.{field}": path for some in files for field, path in some.items()}
        own = {name: getattr(config.sample, name) for name in ("adapter", "upsampler", "distilled_lora")}
        return {**{f"sample.{name}": path for name, path in own.items()}, **given}
    return {}


def _fit_groups(kind: CommandKind) -> tuple[str, ...]:
    return COMMANDS["fit"].groups if kind.reads_fit else ()


def _file(name: str, path: str | None, text: str = "") -> Iterator[str]:
    if path is not None and not Path(path).is_file():
        yield text or f"{name}={path}: there is no such file"


def _listed(lines: list[str]) -> str:
    return lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} things are missing:", *lines])
