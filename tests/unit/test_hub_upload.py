"""A folder goes to the hub as one commit, through `huggingface_hub` itself and an endpoint of this machine."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import huggingface_hub.constants
import pytest

from ltx_train import config
from ltx_train.assembly import hub_upload
from ltx_train.contracts import ConfigError, Exit, StoreError
from tests.hub import Hub, serving

NAME = "anna/voice-lora"
CARD = "---\nlicense: other\n---\n# voice\n\nA LoRA for x, trained with ltx-train 1.\n"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Generator[Hub]:
    with serving() as served:
        template = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE
        template = template.replace(huggingface_hub.constants.ENDPOINT, served.url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", served.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield served


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "voice-lora"
    (made / "clips").mkdir(parents=True)
    (made / "README.md").write_text(CARD)
    (made / "voice.safetensors").write_bytes(b"w" * 5000)
    (made / "clips" / "01.mp4").write_bytes(b"film")
    return made


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of huggingface_hub's own request
def test_all_files_arrive_in_a_private_repository_and_again(hub: Hub, folder: Path) -> None:
    hub_upload.check(NAME)
    assert hub_upload.upload(folder, NAME, private=True) == f"{hub.url}/{NAME}"
    expected = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert hub.files[NAME] == expected
    assert hub.created[NAME]["visibility"] == "private"
    assert "Bearer hf_secret" in hub.tokens
    (folder / "voice.safetensors").write_bytes(b"v" * 5000)
    hub_upload.check(NAME)
    hub_upload.upload(folder, NAME, private=True)
    assert hub.files[NAME]["voice.safetensors"] == b"v" * 5000


@pytest.mark.parametrize(
    ("files", "refused"),
    [
        ({"model.bin": b"x"}, True), ({"README.md": b"# mine"}, True), ({".gitattributes": b"x"}, False), ({}, False),
        ({"README.md": CARD.encode(), "old.safetensors": b"x"}, False),
    ],
)  # fmt: skip
def test_what_somebody_else_put_there_is_not_written_over(files: dict[str, bytes], refused: bool, hub: Hub) -> None:
    hub.files[NAME] = dict(files)
    if refused:
        with pytest.raises(ConfigError, match="did not write"):
            hub_upload.check(NAME)
    else:
        hub_upload.check(NAME)
    assert hub.files[NAME] == files


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (401, ConfigError),
        (403, ConfigError),
        (422, ConfigError),
        (413, ConfigError),
        (408, StoreError),
        (500, StoreError),
    ],
)
def test_what_the_hub_refuses_is_one_line(status: int, error: type[Exception], hub: Hub, folder: Path) -> None:
    hub.status = status
    with pytest.raises(error, match=str(status)):
        hub_upload.upload(folder, NAME, private=True)


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_a_large_file_that_does_not_arrive_is_one_line(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = Hub.answer
    monkeypatch.setattr(Hub, "answer", lambda h, m, p, b: (403, {}) if m == "PUT" else true(h, m, p, b))
    with pytest.raises((StoreError, ConfigError), match=NAME):
        hub_upload.upload(folder, NAME, private=True)
    assert hub.files[NAME] == {}


def test_without_a_hub_a_token_or_a_name(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("voice", "a/b/c", "anna/vo ice"):
        with pytest.raises(ConfigError, match="hub_repo"):
            hub_upload.check(name)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StoreError, match="transfer failed"):
        hub_upload.upload(folder, NAME, private=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ConfigError, match="hf auth login"):
        hub_upload.check(NAME)
    assert StoreError.exit_code is Exit.STORE


def test_an_upload_needs_its_folder() -> None:
    with pytest.raises(ConfigError, match=r"set export\.hub_folder"):
        config.compose_config([f"export.hub_repo={NAME}"])
