"""The clips of `eval.prompts` and `sample.prompts`: each is `sample` with some of its settings changed.

Names and numbers only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ltx_train.config import clip_inputs
from ltx_train.config.buckets import parse_bucket
from ltx_train.config.schema import Config
from ltx_train.config.settings import all_settings, check_value
from ltx_train.contracts import ConfigError

_KEYS = (
    "prompt", "negative_prompt", "seed", "bucket", "fps", "strength", *clip_inputs.FILES, "audio_start",
    "audio_seconds", "audio_short", "audio_mask", "region", "references", "frames", "without_references",
)  # fmt: skip
_EVAL = "eval.prompts"
_AS_IT_IS: Mapping[str, Any] = {}
# Pixels of a latent, and frames of a clip without a bucket of its own.
_STEP, _FRAMES = 32, 73


def prompted(config: Config) -> list[Config]:
    """The configuration of each clip. ConfigError names the entry and the mend."""
    return [_clip(config, entry, number) for number, entry in enumerate(_entries(config.eval.prompts, _EVAL), 1)]


def sampled(config: Config) -> list[Config]:
    """The configuration of each clip of `sample`: its prompts, each with every seed. One clip has the name sample.out,
    several have their numbers in it."""
    entries = _entries(config.sample.prompts, "sample.prompts")
    own = [_changed(config, entry, f"sample.prompts, clip {number}") for number, entry in enumerate(entries, 1)]
    seeds = config.sample.seeds or [None]
    clips = [_alone(made, made.sample.seed if seed is None else seed) for made in own or [config] for seed in seeds]
    if len(clips) == 1:
        return clips
    out = Path(config.sample.out)
    names = (str(out.with_name(f"{out.stem}-{number:02d}{out.suffix}")) for number in range(1, len(clips) + 1))
    return [replace(made, sample=replace(made.sample, out=name)) for made, name in zip(clips, names, strict=True)]


def _alone(config: Config, seed: int) -> Config:
    return replace(config, sample=replace(config.sample, seed=seed, prompts=None, seeds=[]))


def written_out(config: Config) -> Config:
    """With the entries of a file in its place: a run's folder needs no file beside it."""
    if not isinstance(config.eval.prompts, str):
        return config
    return replace(config, eval=replace(config.eval, prompts=_entries(config.eval.prompts, _EVAL)))


def absent_files(config: Config) -> Iterator[str]:
    """Files that the clips are made with and that do not exist."""
    for number, made in enumerate(prompted(config), 1):
        for name, path in sorted(files(made).items()):
            if not Path(path).is_file():
                yield f"eval.prompts, clip {number}: {name}={path}: there is no such file"


def files(config: Config) -> dict[str, str]:
    """The files that a clip is made with, by setting."""
    named = {name: getattr(config.sample, name) for name in clip_inputs.FILES}
    found = {name: path for name, path in named.items() if path is not None}
    found |= {f"references.{source}": path for source, path in config.sample.references.items()}
    return found | {f"frames.{at:g}": path for at, path in clip_inputs.frames(config.sample.frames).items()}


def _entries(given: Any, setting: str) -> list[Any]:
    if given is None:
        return []
    if isinstance(given, str):
        given = _read(Path(given).expanduser(), setting)
    if isinstance(given, ListConfig):
        given = OmegaConf.to_container(given)
    if not isinstance(given, list):
        raise ConfigError(f"{setting}: a list is expected, or a YAML file with one, as [{{prompt: a man says hello}}]")
    return given


def _read(path: Path, setting: str) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise ConfigError(f"{setting}={path} has YAML aliases, which may grow without bound: write them out")
        return yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{setting}={path} cannot be read ({str(error).splitlines()[0]})") from error


def _clip(config: Config, entry: Any, number: int) -> Config:
    """A clip of `eval.prompts`: without the files of `sample`, and small."""
    where = f"{_EVAL}, clip {number}"
    cleared: dict[str, Any] = {"audio_mask": None, "region": [], "references": {}, "frames": None}
    made = _changed(config, entry, where, {**dict.fromkeys(clip_inputs.FILES), **cleared, "bucket": _small(config)})
    _refuse_large(made, where)
    return made


def _changed(config: Config, entry: Any, where: str, before: Mapping[str, Any] = _AS_IT_IS) -> Config:
    """The configuration with an entry's values in `sample`, and those of `before` beneath them."""
    values = {"prompt": entry} if isinstance(entry, str) else entry
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: a text or a mapping is expected, as {{prompt: a man says hello, seed: 7}}")
    strange = sorted(str(name) for name in values if name not in _KEYS)
    if strange:
        raise ConfigError(f"{where}: {strange[0]!r} is no setting of a clip: take {', '.join(_KEYS)}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(config.sample), {**before, **values})
        sample: Any = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {str(error).splitlines()[0]}") from error
    made = replace(config, sample=sample)
    try:
        for name in _KEYS:
            check_value(made, all_settings()[f"sample.{name}"])
        clip_inputs.of_clip(made)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return made


def _small(config: Config) -> str | None:
    """Half the width and height of the first bucket, and at most 73 frames: clips that cost little."""
    if not config.data.buckets:
        return config.sample.bucket
    bucket = parse_bucket(config.data.buckets[0])
    width, height = (max(_STEP, side // 2 // _STEP * _STEP) for side in (bucket.width, bucket.height))
    return f"{width}x{height}x{min(bucket.frames, _FRAMES)}"


def _refuse_large(config: Config, where: str) -> None:
    """A run's memory is planned for its buckets: a larger clip would not fit."""
    chosen = config.sample.bucket
    if chosen is None or not config.data.buckets:
        return
    tokens = max(_tokens(bucket) for bucket in config.data.buckets)
    if _tokens(chosen) > tokens:
        raise ConfigError(
            f"{where}: bucket {chosen} is larger than those of data.buckets, which the run's memory is planned for"
        )


def _tokens(bucket: str) -> int:
    return parse_bucket(bucket).video_tokens
