"""check.html: every clip as it is trained beside its original, with its findings, in one file without a network."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ltx_train.data import index
from ltx_train.data.findings import Finding
from ltx_train.data.page import Card, render
from ltx_train.data.prepare.media import Part, read_clip
from ltx_train.data.prepare.sound import read_audio
from ltx_train.diffusion.grid import Bucket
from ltx_train.sampling.media import Sound, write_mp4
from tests.conftest import command, settings

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, clips: Path) -> Path:
    """Of three clips, one of them quiet and with markup in its names."""
    source, root = tmp_path_factory.mktemp("clips"), tmp_path_factory.mktemp("checked") / "data"
    media = read_clip(clips / "speaker00_0.mp4", Part(bucket=Bucket(64, 64, 33), fps=25.0))
    assert media.waveform is not None
    write_mp4(source / "quiet <b>.mp4", media.pixels, Sound(0.01 * media.waveform, media.rate), 25.0)
    for name in ("speaker00_0.mp4", "speaker00_1.mp4"):
        shutil.copy(clips / name, source)
    rows = [
        {"video": name, "caption": f"<script>alert('{name}')</script>", "speaker": "a & b"}
        for name in ("speaker00_0.mp4", "speaker00_1.mp4", "quiet <b>.mp4")
    ]
    (source / "CAPTIONS.json").write_text(json.dumps(rows))
    words = [
        *settings(root, source),
        "model.path=data/tiny/ltx-tiny.safetensors",
        "data.caption=null",
        "data.silence_db=-90",
    ]
    assert command("prepare", *words) == 0
    assert command("check", *words, "check.previews=2") == 0
    return root / "check.html"


class Found(HTMLParser):
    """Tags by name, with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: dict[str, list[dict[str, str | None]]] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.setdefault(tag, []).append(dict(attrs))


@pytest.mark.slow
def test_the_page_shows_every_clip_and_escapes_what_users_wrote(page: Path) -> None:
    text = page.read_text()
    tags = Found(text).tags
    assert len(tags["article"]) == 3
    assert len(tags["script"]) == 1, "captions are text"
    assert "b" not in tags
    assert [card["data-kinds"] for card in tags["article"]] == ["quiet", "", ""]
    assert text.count("reconstruction: ") == 2
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", text), "nothing is fetched"


@pytest.mark.slow
def test_pictures_and_sounds_are_those_of_the_clips(page: Path, tmp_path: Path) -> None:
    """Two clips with decoded and original: three frames and a sound each."""
    tags = Found(page.read_text()).tags
    assert len(tags["img"]) == 2 * 2 * 3
    assert [image["alt"] for image in tags["img"][:3]] == ["first frame", "middle frame", "last frame"]
    picture = tmp_path / "a.jpg"
    picture.write_bytes(base64.b64decode((tags["img"][0]["src"] or "").partition(",")[2]))
    assert read_clip(picture, Part(bucket=Bucket(64, 64, 1), fps=1.0)).pixels is not None
    assert len(tags["audio"]) == 4
    (tmp_path / "a.mp4").write_bytes(base64.b64decode((tags["audio"][0]["src"] or "").partition(",")[2]))
    waveform, rate = read_audio(tmp_path / "a.mp4")
    assert waveform is not None
    assert waveform.shape[1] / rate == pytest.approx(33 / 25, abs=0.1)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs a browser")
def test_clips_are_filtered_by_finding_and_word(page: Path, tmp_path: Path) -> None:
    assert BROWSER is not None

    def shown(kind: str, words: str) -> str:
        changed = page.read_text().replace(
            "filter();\n</script>", f"kind.value={kind!r};words.value={words!r};filter();\n</script>"
        )
        (tmp_path / "page.html").write_text(changed)
        flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
        out = subprocess.run([BROWSER, *flags, str(tmp_path / "page.html")], capture_output=True, text=True, check=True)
        return str(out.stdout.count('hidden=""'))

    assert [shown("", ""), shown("*", ""), shown("quiet", ""), shown("", "SPEAKER00_1")] == [
        "0",
        "2",
        "2",
        "2",
    ]


def test_a_folder_without_findings_says_so(prepared: Path) -> None:
    record = index.load(prepared).records[0]
    text = render("x", ["1 < 2"], [], [Card(record=record, remarks=[])])
    assert "<p>1 &lt; 2</p>" in text
    assert "No finding." in text
    text = render("x", [], [Finding(True, "a < b")], [])
    assert '<p class="error">a &lt; b</p>' in text
