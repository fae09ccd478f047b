"""The table of commands: what each does, which settings it reads and which it cannot do without.

`--help`, completion, the check for missing settings and the launcher read it. Imports no library.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_FIT_GROUPS = (
    "model", "mode", "adapter", "data", "sigma", "loss", "optim", "memory", "strategy", "eval", "logger", "checkpoint",
    "run",
)  # fmt: skip
_FIT_NEEDS = ("data.root", "data.buckets", "model.path")


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandKind:
    """One command.

    groups: groups of settings that it reads, its own first. reads_fit: whether it also reads every setting of `fit`.
    needs: settings that must be set. on_every_device: whether it runs in one process for each of strategy.devices.
    checks_paths: whether the files that settings name must exist on this machine.
    """

    name: str
    summary: str
    groups: tuple[str, ...]
    reads_fit: bool = False
    needs: tuple[str, ...] = ()
    on_every_device: bool = False
    checks_paths: bool = True


_COMMANDS = (
    CommandKind(
        name="cut", summary="long recordings to clips, at scenes and pauses, with the table that prepare reads",
        groups=("cut", "data", "run"), needs=("cut.source",),
    ),
    CommandKind(
        name="caption", summary="captions by a model behind an endpoint, and transcripts, for clips without any",
        groups=("caption", "data"), needs=("data.source", "caption.url", "caption.model"),
    ),
    CommandKind(
        name="prepare", summary="clips and captions to latents, text contexts and shards",
        groups=("data", "model", "mode", "memory", "strategy"), on_every_device=True,
        needs=("data.source", "data.root", "data.buckets", "model.path"),
    ),
    CommandKind(
        name="check", summary="audit prepared data; a page to look at and listen to",
        groups=("check", "data", "model", "mode"), needs=_FIT_NEEDS,
    ),
    CommandKind(
        name="plan", summary="what will fit: peak memory, step time, chosen settings, before anything is loaded",
        groups=("plan", "memory", "model", "mode", "adapter", "data", "optim", "strategy", "cluster"),
        needs=("data.buckets",),
    ),
    CommandKind(
        name="fit", summary="train; the same command continues an interrupted run", groups=_FIT_GROUPS,
        needs=_FIT_NEEDS, on_every_device=True,
    ),
    CommandKind(
        name="watch", summary="a run's page in a browser while it trains: curves, newest clips, time left",
        groups=("watch", "run"), checks_paths=False,
    ),
    CommandKind(
        name="supervise", summary="keep fit alive on a spot machine: notices, restarts, an object store",
        groups=("supervise",), reads_fit=True, needs=_FIT_NEEDS, checks_paths=False,
    ),
    CommandKind(
        name="sweep", summary="search settings by held-out loss; every trial and the search itself can be continued",
        groups=("sweep",), reads_fit=True, needs=_FIT_NEEDS,
    ),
    CommandKind(
        name="submit", summary="render, show and submit a SLURM job that runs fit", groups=("cluster",),
        reads_fit=True, needs=_FIT_NEEDS, checks_paths=False,
    ),
    CommandKind(
        name="evaluate", summary="held-out loss, gained gap, adapter on and off; writes report.html",
        groups=("eval", "export", "run", "data", "model", "memory", "logger", "sample"), needs=_FIT_NEEDS,
    ),
    CommandKind(
        name="swap", summary="`evaluate swap`: generation with the reference swapped, against swapping the seed",
        groups=("swap", "export", "run", "data", "model", "memory", "sample"), needs=_FIT_NEEDS,
    ),
    CommandKind(
        name="export", summary="the trained weights as a LoRA for ComfyUI and diffusers, or as a full checkpoint",
        groups=("export", "run"),
    ),
    CommandKind(
        name="inspect", summary="prove that every key of a LoRA binds to a base model", groups=("inspect", "model"),
        needs=("inspect.file", "model.path"),
    ),
    CommandKind(
        name="lora", summary="LoRA files: strengths by stream, split, merge, resize, extract, other formats",
        groups=("lora", "model", "run"), needs=("lora.files",),
    ),
    CommandKind(
        name="doctor", summary="machine, disk, data, weights, tracker, cluster: each finding with its fix",
        groups=("doctor", "strategy", "memory", "model", "data", "run"), checks_paths=False,
    ),
    CommandKind(
        name="bench", summary="speed and memory of a training step, as JSON",
        groups=("bench", "memory", "strategy", "optim", "adapter", "model", "mode", "data"),
        needs=("data.buckets", "model.path"), on_every_device=True,
    ),
    CommandKind(
        name="sample", summary="video with sound from text, an image, audio or a reference voice",
        groups=("sample", "model", "mode", "memory"), needs=("sample.bucket", "model.path"),
    ),
    CommandKind(name="completion", summary="completion for bash, zsh or fish", groups=()),
)  # fmt: skip
COMMANDS: Mapping[str, CommandKind] = {kind.name: kind for kind in _COMMANDS}
