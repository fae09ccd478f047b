"""check.html: every clip of a prepared folder as it is trained, in one file that needs no network.

Owns the page. It decodes nothing and judges nothing: pictures, sounds and findings are given.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ltx_train.data.findings import Finding, Remark
from ltx_train.data.record import Record

# Titles and units of measured numbers, in the order of the page.
_NUMBERS = {
    "lufs": ("loudness", "LUFS"), "gain_db": ("normalised by", "dB"), "peak_db": ("peak", "dBFS"),
    "clipped": ("clipped", ""), "snr_db": ("loud over quiet", "dB"), "leading_s": ("pause before", "s"),
    "pauses": ("pauses", ""), "voiced": ("voiced", ""), "band_hz": ("highest sound", "Hz"),
    "sound_late_s": ("sound late by", "s"), "kept": ("picture kept", ""), "enlarged": ("scaled by", ""),
    "still": ("frames repeated", ""), "given_s": ("given", "s"),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """Pictures and sound of a clip as data URLs: its first, middle and last frame."""

    frames: Sequence[str]
    sound: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One clip. decoded: its latents through the decoders; original: the same part of its file; None when not shown.
    psnr: dB between the two, None without both."""

    record: Record
    remarks: Sequence[Remark]
    decoded: Look | None = None
    original: Look | None = None
    psnr: float | None = None


def render(title: str, facts: Sequence[str], findings: Sequence[Finding], cards: Sequence[Card]) -> str:
    """The page as HTML text. facts: sentences about the folder."""
    told = "".join(f"<p>{html.escape(fact)}</p>" for fact in facts)
    told += "".join(
        f'<p class="{"error" if f.error else "warning"}">{html.escape(f.text)}</p>' for f in findings
    ) or "<p>No finding.</p>"  # fmt: skip
    kinds = sorted({remark.kind for card in cards for remark in card.remarks})
    options = "".join(f"<option>{html.escape(kind)}</option>" for kind in kinds)
    body = "".join(_card(card) for card in cards)
    return _PAGE.format(title=html.escape(title), told=told, options=options, cards=body, count=len(cards))


def _card(card: Card) -> str:
    record = card.record
    kinds = "|".join(remark.kind for remark in card.remarks)
    words = " ".join((record.key, record.speaker, record.split, record.caption)).lower()
    told = "".join(f"<li>{html.escape(remark.text)}</li>" for remark in card.remarks)
    looks = _look("as it is trained", card.decoded) + _look("original", card.original)
    about = f"{record.split}, {record.speaker}, {record.bucket} at {record.fps:.6g} fps, {record.seconds:.2f} s"
    started = f" from {record.start:.2f} s on" if record.start else ""
    psnr = "" if card.psnr is None else f"<p>reconstruction: {card.psnr:.1f} dB</p>"
    head = f'<article data-kinds="{html.escape(kinds)}" data-words="{html.escape(words)}">'
    return (
        f"{head}<h2>{html.escape(record.key)}</h2><p>{html.escape(about + started)} ({html.escape(record.source)})</p>"
        f"<ul>{told}</ul>{looks}{psnr}<p class=caption>{html.escape(record.caption)}</p>"
        f"{_numbers(record.measured)}</article>"
    )


def _look(title: str, look: Look | None) -> str:
    if look is None:
        return ""
    frames = "".join(
        f'<img alt="{when} frame" src="{frame}">'
        for when, frame in zip(("first", "middle", "last"), look.frames, strict=False)
    )
    sound = "" if look.sound is None else f'<audio controls preload="none" src="{look.sound}"></audio>'
    return f"<figure><figcaption>{title}</figcaption>{frames}{sound}</figure>"


def _numbers(measured: Mapping[str, float]) -> str:
    cells = "".join(
        f"<tr><th>{title}</th><td>{measured[name]:.4g} {unit}</td></tr>"
        for name, (title, unit) in _NUMBERS.items()
        if name in measured
    )
    return f"<details><summary>measured</summary><table>{cells}</table></details>" if cells else ""


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.05rem; margin: 0; overflow-wrap: anywhere; }}
form {{ position: sticky; top: 0; background: Canvas; padding: 0.5rem 0; display: flex; flex-wrap: wrap; gap: 0.5rem; }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); gap: 1rem; }}
article {{ border: 1px solid #8886; padding: 0.8rem; }} article[hidden] {{ display: none; }}
article p, ul, figure {{ margin: 0.3rem 0; }} li, .warning {{ color: #a65b00; }} .error {{ color: #c22; }}
img {{ width: 32%; margin-right: 1%; background: #8883; }} audio {{ width: 100%; height: 2rem; }}
figcaption, details {{ font-size: 0.85rem; }} .caption {{ font-style: italic; }}
th {{ text-align: left; padding-right: 1rem; }}
@media (prefers-color-scheme: dark) {{ li, .warning {{ color: #f0a860; }} .error {{ color: #ff8080; }} }}
</style></head><body><h1>{title}</h1>{told}
<form><label>finding <select id="kind"><option value="">all {count} clips</option><option value="*">any finding</option>
{options}</select></label><label>search <input id="words" type="search"></label><output id="shown"></output></form>
<main>{cards}</main>
<script>
const kind = document.getElementById("kind"), words = document.getElementById("words");
const cards = [...document.querySelectorAll("article")];
function filter() {{
  for (const card of cards) {{
    const kinds = card.dataset.kinds.split("|");
    const fits = !kind.value || (kind.value === "*" ? card.dataset.kinds !== "" : kinds.includes(kind.value));
    card.hidden = !fits || !card.dataset.words.includes(words.value.toLowerCase());
  }}
  document.getElementById("shown").value = cards.filter(card => !card.hidden).length + " shown";
}}
kind.addEventListener("input", filter); words.addEventListener("input", filter);
document.querySelector("form").addEventListener("submit", event => event.preventDefault()); filter();
</script></body></html>
"""
