"""A folder in place of overrides: a run's folder, or a prepared folder, also in a store, whose config.yaml supplies all
settings."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ltx_train.config import compose
from ltx_train.config.schema import Config
from ltx_train.contracts import ConfigError, StoreError

FILE = "config.yaml"
_INDEX = "index.safetensors"


def from_folder(folder: str, command: str, overrides: list[str]) -> Config:
    """The folder's configuration with single settings changed, and with what `command` reads of the folder."""
    if "://" in folder:
        return _from_store(folder, overrides)
    path = Path(folder)
    if not path.is_dir():
        raise ConfigError(f"{folder!r} is neither an override (key=value) nor a folder")
    file = _readable(path)
    if file is None:
        raise ConfigError(f"{folder} has no {FILE}: give a run's folder (runs/<experiment>/<id>) or a prepared one")
    if (path / _INDEX).is_file():
        return compose.from_file(file, overrides, {"data.root": folder})
    config = compose.from_file(file, overrides, _names(path))
    return compose.changed(config, _inputs(path, command, config))


def _from_store(url: str, overrides: list[str]) -> Config:
    """Of a prepared folder in a store, whatever fsspec's stores raise."""
    import fsspec

    try:
        system, base = fsspec.core.url_to_fs(url.rstrip("/"))
        text = system.cat_file(f"{base}/{FILE}").decode()
        is_prepared = system.exists(f"{base}/{_INDEX}")
    except FileNotFoundError as error:
        raise ConfigError(f"{url} has no {FILE}: give the URL of a whole prepared folder") from error
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{url}: {error}") from error
    except Exception as error:
        raise StoreError(f"{url}/{FILE} cannot be read ({type(error).__name__}: {error})") from error
    if not is_prepared:
        raise ConfigError(f"{url} is no prepared folder: a run in a store goes on with supervise.store")
    return compose.from_saved(compose.parse(text, Path(f"{url}/{FILE}")), overrides, {"data.root": url})


def _readable(path: Path) -> Path | None:
    """The folder's settings, or those of its newest checkpoint when they are lost or damaged; None without any."""
    own = path / FILE
    checkpoints = sorted(path.glob(f"checkpoints/step-*/{FILE}"), key=lambda p: (len(p.parent.name), p.parent.name))
    for file in (own, *(p for p in reversed(checkpoints) if ".tmp-" not in p.parent.name)):
        try:
            compose.load(file)
        except ConfigError:
            continue
        if file != own:
            print(f"ltx-train: {own} is missing or damaged; its settings are read from {file.parent}", file=sys.stderr)
        return file
    return own if own.is_file() else None  # its error names the fault


def _names(path: Path) -> dict[str, Any]:
    """The run's name is its folder's: it may have been moved or renamed."""
    whole = path if len(path.parts) > 2 else path.absolute()
    return {"run.root": str(whole.parent.parent), "run.experiment": whole.parent.name, "run.id": whole.name}


def _inputs(path: Path, command: str, config: Config) -> dict[str, Any]:
    """Files of the run that a command reads, where the overrides name no others."""
    if command == "export":
        return {"export.run": config.export.run or str(path)}
    if command == "inspect":
        file = config.inspect.file or _adapter(path, config, newest=True)
        return {"inspect.run": config.inspect.run or str(path), "inspect.file": file}
    if command == "sample" and config.sample.adapter is None:
        return {"sample.adapter": _adapter(path, config, newest=False)}
    return {}


def _adapter(path: Path, config: Config, *, newest: bool) -> str:
    """The run's newest LoRA file, or the best one if it is known."""
    if config.adapter.kind == "full":
        raise ConfigError(
            f"{path} trained all weights: `ltx-train export {path}` writes a checkpoint, give it with model.path"
        )
    best = path / "adapters" / "best.safetensors"
    if best.is_file() and not newest:
        return str(best)
    files = sorted((path / "adapters").glob("step-*.safetensors"))
    if not files:
        raise ConfigError(f"{path} has no adapter yet: train it first with `ltx-train fit {path}`")
    return str(files[-1])
