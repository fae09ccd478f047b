"""A folder that can be published: the LoRA, a model card, its settings without paths of this machine, and clips.

Owns what is in it and what is left out. It uploads nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ltx_train import __version__, durable
from ltx_train import config as configuration
from ltx_train.assembly import resolve, run_clips, run_facts, run_page
from ltx_train.config import Config, clip_inputs
from ltx_train.contracts import Clip, ConfigError
from ltx_train.pages.render import render
from ltx_train.training.tracking.metrics import read_rows

# Facts of the card that name places of this machine.
_PRIVATE = ("folder", "data", "on")
_CLIPS = 4
# Settings of `sample` that may name files, beside the inputs of a clip.
_OTHER_FILES = ("adapter", "prompts", "frames", "upsampler", "distilled_lora")
# Groups of settings that a model card is about, beside those whose paths are shortened.
_KEPT = ("mode", "mixture", "modes", "sigma", "loss", "optim", "memory", "checkpoint")


def write(config: Config, run: Path, weights: Path, folder: Path) -> Path:
    """Writes the folder. ConfigError when it exists and has other content than an earlier one of ours."""
    if folder.exists() and not (folder / "README.md").is_file() and any(folder.iterdir()):
        raise ConfigError(f"export.hub_folder={folder} exists and is no such folder: choose another name")
    folder.mkdir(parents=True, exist_ok=True)
    if weights.is_dir():  # peft's format
        shutil.copytree(weights, folder / weights.name, dirs_exist_ok=True)
    else:
        shutil.copy(weights, folder / weights.name)
    durable.write(folder / "config.yaml", configuration.dump(redacted(config)))
    clips = _copied(run_clips.found(run / "samples"), folder / "clips")
    durable.write(folder / "README.md", card(config, run, clips))
    return folder


def card(config: Config, run: Path, clips: Mapping[str, str]) -> str:
    """The model card in Markdown. clips: captions by file name."""
    rows = read_rows(run / "metrics.jsonl")
    facts = {n: text for n, text in run_facts.facts(config, run, rows).items() if n not in _PRIVATE}
    base = Path(config.model.path or config.model.preset).stem
    return render(
        "card.md.j2", title=f"{config.run.experiment}/{config.run.id}", base=base, trigger=config.data.trigger or "",
        kind=resolve.trained_kind(config), version=__version__, facts={**facts, "base": base}, clips=clips,
        verdicts=[verdict.text for verdict in run_page.conclusions(run)],
    )  # fmt: skip


def redacted(config: Config) -> Config:
    """The settings of training and sampling, with names of files in place of their paths; all others by default."""
    model, data, sample = config.model, config.data, config.sample
    kept = {name: getattr(config, name) for name in _KEPT}
    kept |= {
        "model": replace(
            model, path=_name(model.path), text_encoder=_name(model.text_encoder), merge=_name(model.merge)
        ),
        "data": replace(
            data, root=_name(data.root) or "prepared", source=_name(data.source), cache=None,
            also=[Path(root).name for root in data.also],
        ),
        "adapter": replace(config.adapter, start_from=_name(config.adapter.start_from)),
        "eval": replace(config.eval, prompts=None),
        "run": replace(config.run, root="runs"),
        "sample": replace(
            sample, **dict.fromkeys((*clip_inputs.FILES, *_OTHER_FILES)), references={}, out=Path(sample.out).name
        ),
    }  # fmt: skip
    return replace(Config(), **kept)


def _name(path: str | None) -> str | None:
    return None if path is None else Path(path).name


def _copied(found: Mapping[str, list[Clip]], folder: Path) -> dict[str, str]:
    """The newest clip of each prompt, by its name in the folder."""
    captions: dict[str, str] = {}
    for title, clips in list(found.items())[:_CLIPS]:
        path = clips[-1].path
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{len(captions) + 1:02d}.mp4"
        shutil.copy(path, folder / name)
        captions[name] = title
    return captions
