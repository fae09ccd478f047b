"""A published folder's way to the hub: one commit in a repository of the user's account.

Owns the refusal to write over what somebody else put there. `huggingface_hub` does the transfer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ltx_train.contracts import ConfigError, StoreError

# In the card of every folder that is made here.
_MARK = "trained with ltx-train"
_CARD = "README.md"
# What the hub itself puts into a new repository.
_EMPTY = {".gitattributes"}
# Refusals that may not last: a timeout, and too many requests.
_AGAIN = {408, 429}
_TOKEN = "give a token that may write: `hf auth login`, or the environment variable HF_TOKEN"


def check(repository: str) -> None:
    """Before anything is made: ConfigError for a name that is none, without a token, and for a repository with
    something else in it. StoreError when the hub cannot be reached."""
    api = _api(repository)
    with _explained(repository):
        if not api.repo_exists(repository):
            return
        files = set(api.list_repo_files(repository)) - _EMPTY
        if files and not (_CARD in files and _MARK in _card(api, repository)):
            raise ConfigError(f"export.hub_repo={repository} has files that ltx-train did not write: take another name")


def upload(folder: Path, repository: str, *, private: bool) -> str:
    """Makes the repository unless there is one, and commits the folder's files. Returns the address. StoreError when a
    transfer fails: the folder stays, and the same command tries again."""
    api = _api(repository)
    with _explained(repository):
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"{folder.name}: {_MARK}")
    return f"{api.endpoint}/{repository}"


def _api(repository: str) -> Any:
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"export.hub_repo: {error}") from error
    if repository.count("/") != 1:
        raise ConfigError(f"export.hub_repo={repository}: give account and name, as anna/voice-lora")
    if get_token() is None:
        raise ConfigError(f"export.hub_repo={repository}: {_TOKEN}")
    return HfApi(library_name="ltx-train")


def _card(api: Any, repository: str) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        return Path(api.hf_hub_download(repository, _CARD, local_dir=scratch)).read_text(encoding="utf-8")


@contextmanager
def _explained(repository: str) -> Generator[None]:
    """The hub's errors as one line each."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    try:
        yield
    except OfflineModeIsEnabled as error:
        raise ConfigError("export.hub_repo: HF_HUB_OFFLINE is set, which forbids uploads: unset it") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise ConfigError(f"export.hub_repo={repository}: the hub refuses ({status}): {_TOKEN}") from error
        reason = f"{status}, {error.server_message}" if error.server_message else str(status)
        if 400 <= status < 500 and status not in _AGAIN:
            raise ConfigError(f"export.hub_repo={repository}: the hub refuses ({reason})") from error
        raise StoreError(f"the hub answered {reason} for {repository}: the same command tries again") from error
    except ValueError as error:  # a model card that the hub does not take
        raise ConfigError(f"export.hub_repo={repository}: the hub refuses ({error})") from error
    except (HTTPError, OSError, RuntimeError) as error:  # RuntimeError: a large file did not arrive
        raise StoreError(f"{repository}: the transfer failed ({error}): the same command tries again") from error
