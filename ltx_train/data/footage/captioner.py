"""Asks a vision or omni model behind an OpenAI-compatible endpoint what a clip shows and says.

Owns the request and its retries. It reads no media and no tables.
"""

from __future__ import annotations

import base64
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ltx_train.contracts import DataError

_TRIES, _FIRST_PAUSE_S = 4, 1.0
# Answers after which another try may succeed.
_PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 529)
_SHOWN = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """url: up to and with /v1. key: sent as a bearer token; None: none. timeout_s: for one answer."""

    url: str
    model: str
    key: str | None
    timeout_s: float
    max_tokens: int


def ask(endpoint: Endpoint, prompt: str, pictures: Sequence[bytes], sound: bytes | None) -> str:
    """The model's answer as one line. pictures: JPEG files. sound: a WAV file, None to send none.

    DataError when the endpoint refuses, answers nothing, or does not answer after several tries.
    """
    content: list[dict[str, Any]] = [{"type": "text", "text": prompt}]
    content += [
        {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{_coded(picture)}"}} for picture in pictures
    ]
    if sound is not None:
        content.append({"type": "input_audio", "input_audio": {"data": _coded(sound), "format": "wav"}})
    body = {
        "model": endpoint.model, "max_tokens": endpoint.max_tokens, "temperature": 0.0,
        "messages": [{"role": "user", "content": content}],
    }  # fmt: skip
    answer = _posted(endpoint, json.dumps(body).encode())
    try:
        text = " ".join(str(answer["choices"][0]["message"]["content"]).split())
    except (KeyError, IndexError, TypeError) as error:
        raise DataError(f"{endpoint.url} answers no chat completion: {json.dumps(answer)[:_SHOWN]}") from error
    if not text:
        raise DataError(f"{endpoint.url}: {endpoint.model} answers nothing: raise caption.max_tokens")
    return text


def _coded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _posted(endpoint: Endpoint, body: bytes) -> Any:
    """The parsed answer, after as many tries as it takes."""
    headers = {"Content-Type": "application/json"}
    if endpoint.key:
        headers["Authorization"] = f"Bearer {endpoint.key}"
    url = f"{endpoint.url.rstrip('/')}/chat/completions"
    reason = ""
    for attempt in range(_TRIES):
        try:
            with urllib.request.urlopen(
                urllib.request.Request(url, body, headers), timeout=endpoint.timeout_s
            ) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            reason = f"{error.code}: {error.read()[:_SHOWN].decode(errors='replace')}"
            if error.code in (401, 403):
                raise DataError(f"{url} refuses the key ({reason}): see caption.key_variable") from error
            if error.code not in _PASSING:
                raise DataError(f"{url} refuses the request ({reason})") from error
        except (OSError, ValueError) as error:  # no connection, a cut one, no answer in time, an answer that is no JSON
            reason = str(error)
        if attempt + 1 < _TRIES:
            time.sleep(_FIRST_PAUSE_S * 2**attempt)
    raise DataError(f"{url} does not answer after {_TRIES} tries ({reason}): the same command continues")
