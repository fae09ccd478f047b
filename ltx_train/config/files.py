"""Where the declarative files lie (`conf/`, `launch/`), and the options of each group."""

from __future__ import annotations

from pathlib import Path


def config_dir() -> Path:
    """The Hydra tree."""
    return shipped("conf")


def shipped(name: str) -> Path:
    """A folder of declarative files: beside the package in a checkout, inside it in a wheel."""
    packaged = Path(__file__).parent.parent / name
    return packaged if packaged.is_dir() else Path(__file__).parent.parent.parent / name


def group_options(extra_dir: str | None = None) -> dict[str, list[str]]:
    """The options of every group, a user's own tree included."""
    options: dict[str, list[str]] = {}
    for root in (config_dir(), *([Path(extra_dir)] if extra_dir else [])):
        for path in sorted(root.glob("*/*.yaml")):
            options.setdefault(path.parent.name, []).append(path.stem)
    return options
