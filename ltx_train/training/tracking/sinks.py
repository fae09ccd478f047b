"""Trackers beside metrics.jsonl: W&B, CSV, TensorBoard.

Owns the writing to each tracker and its continuation. Knows only the names and values of metrics. A tracker that
fails may lose its own record, but never stops training.
"""

from __future__ import annotations

import csv
import hashlib
import os
import secrets
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ltx_train import durable
from ltx_train.contracts import Clip, UserError
from ltx_train.training.tracking import animation

Values = Mapping[str, float]
_INIT_TIMEOUT_S = 8
# A record of W&B begins with a header; how long to wait for more than it after the end of a run.
_HEADER_BYTES, _FLUSH_S = 7, 30.0
# File in the run's folder with the id of its W&B run.
WANDB_ID = "wandb_id"


class Sink(Protocol):
    """A tracker: receives rows, pages and clips."""

    def write(self, step: int, values: Values) -> None: ...

    def page(self, path: Path) -> None: ...

    def media(self, step: int, clip: Clip) -> None: ...

    def close(self) -> None: ...


class Csv:
    """metrics.csv, one column per name: rewritten from metrics.jsonl when a new name appears."""

    def __init__(self, folder: Path) -> None:
        self._path, self._rows = folder / "metrics.csv", folder / "metrics.jsonl"
        self._columns: list[str] = []

    def write(self, step: int, values: Values) -> None:
        row = {"step": step, **values}
        if not set(row) <= set(self._columns):
            self._rewrite()
            return
        with self._path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def page(self, path: Path) -> None: ...

    def media(self, step: int, clip: Clip) -> None: ...

    def close(self) -> None: ...

    def _rewrite(self) -> None:
        rows = durable.read_lines(self._rows)
        self._columns = list(dict.fromkeys(name for row in rows for name in row))
        temporary = self._path.with_name(f"{self._path.name}.tmp-{os.getpid()}")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, self._path)


class TensorBoard:
    """Writes tensorboard/ in the run's folder. The rows of repeated steps replace the earlier ones."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter  # imports tensorboard, for runs that use it

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, values: Values) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def page(self, path: Path) -> None: ...

    def media(self, step: int, clip: Clip) -> None:
        """Moving pictures as a GIF, which is what TensorBoard shows, and the sound."""
        summary = animation.summary(clip)
        self._writer._get_file_writer().add_summary(summary, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A W&B run. Its id is random and kept in the run's folder, so that a restart continues it and no other run, of the
    same name or of somebody else in the project, writes into it."""

    def __init__(self, folder: Path, mode: str, project: str, config: Mapping[str, Any], first_step: int) -> None:
        self._run = _start_wandb(folder, mode, project, config, wandb_id(folder, first_step))

    def write(self, step: int, values: Values) -> None:
        self._run.log({"trainer/global_step": step, **values}, step=step)

    def page(self, path: Path) -> None:
        import wandb

        self._run.log({"report": wandb.Html(path.read_text(encoding="utf-8"), inject=False)})

    def media(self, step: int, clip: Clip) -> None:
        import wandb

        name = f"samples/{clip.place or clip.path.stem}"
        self._run.log({name: wandb.Video(str(clip.path), caption=clip.caption, format="mp4")}, step=step)

    def close(self) -> None:
        """Waits until W&B's own process has written what it was sent, which takes long on a loaded machine."""
        import wandb

        recorded = Path(self._run.settings.sync_file or "")
        self._run.finish()
        # `finish` returns while that process still writes; it ends when all is written.
        wandb.teardown()
        until = time.monotonic() + _FLUSH_S
        while recorded.is_file() and recorded.stat().st_size <= _HEADER_BYTES:
            if time.monotonic() > until:
                print(f"ltx-train: W&B has not written {recorded}; metrics.jsonl has all rows", file=sys.stderr)
                return
            time.sleep(0.1)


def wandb_id(folder: Path, first_step: int) -> str:
    """The id of the run's W&B run; a new one for a new run. Runs of 0.1.0 and 0.2.0 have an id made of their name."""
    file = folder / WANDB_ID
    if first_step > 0 and file.is_file() and (known := file.read_text(encoding="utf-8").strip()):
        return known
    if first_step > 0:
        return hashlib.sha256("/".join(folder.parts[-2:]).encode()).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    made = secrets.token_hex(6)
    durable.write(file, made + "\n")
    return made


def _start_wandb(folder: Path, mode: str, project: str, config: Mapping[str, Any], run_id: str) -> Any:
    """Starts a W&B run, offline when the server does not answer within the timeout; UserError for a refused key."""
    # By default W&B reports its own errors to its vendor and prints a failed start to the terminal.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    name = "/".join(folder.parts[-2:])
    common: dict[str, Any] = {
        "project": project, "id": run_id, "dir": folder, "name": name,
        "config": dict(config), "settings": wandb.Settings(init_timeout=_INIT_TIMEOUT_S, silent=True, console="off"),
    }  # fmt: skip
    try:
        return wandb.init(resume="allow", mode=mode, **common)  # pyright: ignore[reportArgumentType]
    except (wandb.Error, OSError, ValueError) as error:
        if _is_refusal(error):
            raise UserError(
                "logger=wandb: W&B does not accept the API key; run `wandb login`, set WANDB_API_KEY, or use "
                "logger=wandb_offline"
            ) from error
        print(
            f"ltx-train: W&B is not reachable ({_one_line(error)}); recording offline. "
            f"Upload later with `wandb sync {folder}/wandb`",
            file=sys.stderr,
        )
        wandb.teardown()  # the failed start still holds the run's id
        return wandb.init(mode="offline", **common)


def _is_refusal(error: Exception) -> bool:
    text = str(error).lower()
    return type(error).__name__ in ("AuthenticationError", "UsageError") or any(
        part in text for part in ("api key", "api_key", "401", "unauthorized")
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
