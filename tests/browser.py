"""Looks at a page with Chromium, which renders it as a reader sees it."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

_BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
# A script in the page evaluates an expression and sends its value to the enclosing frame.
_PROBE = (
    "<script>addEventListener('load',()=>setTimeout(()=>{const q=s=>[...document.querySelectorAll(s)];"
    "parent.postMessage(JSON.stringify(%s),'*')},1000))</script></body>"
)
# A window of Chromium has at least 500 pixels; a frame in it may be as narrow as a phone.
_FRAME = (
    "<body style='margin:0'><iframe width=%d height=3000 style='border:0' src='%s'></iframe>"
    "<script>onmessage=e=>{document.body.innerHTML='<pre>'+e.data.replace(/</g,'&lt;')+'</pre>'}</script>"
)


def look(page: Path, scratch: Path, expression: str, *, width: int = 1200, dark: bool = False) -> Any:
    """The JSON value of a JavaScript expression in the page; `q(selector)` lists elements. Skips without a browser."""
    probe, frame = scratch / "probe.html", scratch / "frame.html"
    probe.write_text(page.read_text().replace("</body>", _PROBE % expression))
    frame.write_text(_FRAME % (width, probe.as_uri()))
    shown = dump(frame.as_uri(), scratch, size=(max(width, 500), 3000), dark=dark)
    return json.loads(shown.partition("<pre>")[2].partition("</pre>")[0])


def dump(url: str, scratch: Path, *, size: tuple[int, int] = (1200, 2000), dark: bool = False) -> str:
    """The document of a page after its scripts have run for some seconds. Skips without a browser."""
    if _BROWSER is None:
        pytest.skip("no browser on this machine")
    call = [
        _BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={size[0]},{size[1]}",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--virtual-time-budget=8000",
        f"--user-data-dir={scratch / 'profile'}", "--dump-dom", url,
    ]  # fmt: skip
    return subprocess.run(call, capture_output=True, text=True, timeout=300, check=True).stdout
