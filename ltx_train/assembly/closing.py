"""The last lines of a command: the file it made, and the next command to type."""

from __future__ import annotations

from pathlib import Path


def close(made: Path | str | None, following: str) -> None:
    """made: the file or folder; None when the command made none."""
    if made is not None:
        print(f"made {made}")
    print(f"next: {following}")


def sample_command(adapter: str | Path | None, *more: str) -> str:
    """A `sample` command for an adapter: by its run's folder where it lies in one."""
    folder = Path(adapter).parent.parent if adapter else None
    if folder is not None and (folder / "config.yaml").is_file():
        return " ".join(["ltx-train sample", str(folder), f"sample.adapter={adapter}", *more])
    return " ".join(["ltx-train sample ...", *([f"sample.adapter={adapter}"] if adapter else []), *more])
