"""Looks at a page with Chromium, which renders it as a reader sees it."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

_BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
# Inside the page: what is asked of it, reported to the frame around it.
_PROBE = (
    "<script>addEventListener('load',()=>setTimeout(()=>{const q=s=>[...document.querySelectorAll(s)];"
    "parent.postMessage(JSON.stringify(%s),'*')},1000))</script></body>"
)
# A window of Chromium has at least 500 pixels; a frame in it may be as narrow as a phone.
_FRAME = (
    "<body style='margin:0'><iframe width=%d height=3000 style='border:0' src='%s'></iframe>"
    "<script>onmessage=e=>{document.body.innerHTML='<pre>'+e.data.replace(/</g,'&lt;')+'</pre>'}</script>"
)


def look(page: Path, scratch: Path, asked: str, *, width: int = 1200, dark: bool = False) -> Any:
    """The JSON value of a JavaScript expression in the page; `q(selector)` lists elements. Skips without a browser."""
    if _BROWSER is None:
        pytest.skip("no browser on this machine")
    probe, frame = scratch / "probe.html", scratch / "frame.html"
    probe.write_text(page.read_text().replace("</body>", _PROBE % asked))
    frame.write_text(_FRAME % (width, probe.as_uri()))
    call = [
        _BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={max(width, 500)},3000",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--virtual-time-budget=8000", "--dump-dom",
        frame.as_uri(),
    ]  # fmt: skip
    shown = subprocess.run(call, capture_output=True, text=True, timeout=300, check=True).stdout
    return json.loads(shown.partition("<pre>")[2].partition("</pre>")[0])
