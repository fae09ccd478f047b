"""Memory of encoders and decoders: the text encoder whole or layer by layer, the video VAE whole or in tiles. Pure.

Owns the formulas and the constants that were measured for them (docs/performance/encoders.json, H200, torch 2.11).
"""

from __future__ import annotations

from dataclasses import dataclass

from ltx_train.memory.planning.cards import GIB
from ltx_train.model.loaders import TILE_OVERLAP

# Bytes that the video VAE allocates per pixel and frame of what it works on at once.
_ENCODE, _DECODE = 112.8, 104.6
# bfloat16 red, green and blue of a pixel.
_PIXEL = 6
# Edges of the tiles that may be chosen, the fastest first. At 1280x704x153 they take 1.2, 1.4 and 1.8 times as long as
# the whole picture.
TILES = (512, 384, 256)
# A caption's working memory in the connectors and in the text encoder's layers, in units of its hidden states.
_CONNECTING, _READING = 4.1, 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSizes:
    """Weights on the device in GiB: text_gib, of it largest_text_gib in one tensor, connectors_gib, video_vae_gib,
    audio_vae_gib, vocoder_gib. states_gib: a caption's hidden states. width, height, frames: of the largest video."""

    text_gib: float
    largest_text_gib: float
    connectors_gib: float
    video_vae_gib: float
    audio_vae_gib: float
    vocoder_gib: float
    states_gib: float
    width: int
    height: int
    frames: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderMemory:
    """streams_text: the text encoder's weights stay in host memory and come layer by layer. encode_tile, decode_tile:
    edge of the video VAE's tiles in pixels, None for the whole picture. text_gib, encode_gib, decode_gib: predicted
    peaks. One follows the other, so the largest counts."""

    streams_text: bool
    encode_tile: int | None
    decode_tile: int | None
    text_gib: float = 0.0
    encode_gib: float = 0.0
    decode_gib: float = 0.0

    @property
    def prepare_gib(self) -> float:
        """Peak of a preparation, which decodes nothing."""
        return max(self.text_gib, self.encode_gib)


def choose(
    sizes: EncoderSizes, budget_gib: float | None, *, streams_text: bool | None = None, tiles: bool | None = None
) -> EncoderMemory:
    """The fastest that fits into the budget (None: everything whole), or the least where nothing fits. Arguments that
    are given are kept."""
    room = float("inf") if budget_gib is None else budget_gib
    texts = {streamed: text_gib(sizes, streamed=streamed) for streamed in (False, True)}
    streams_text = texts[False] > room if streams_text is None else streams_text
    candidates = _candidates(tiles)
    encodes = {tile: encode_gib(sizes, tile) for tile in candidates}
    decodes = {tile: decode_gib(sizes, tile) for tile in candidates}
    encode, decode = _first_that_fits(encodes, room), _first_that_fits(decodes, room)
    return EncoderMemory(
        streams_text=streams_text, encode_tile=encode, decode_tile=decode, text_gib=texts[streams_text],
        encode_gib=encodes[encode], decode_gib=decodes[decode],
    )  # fmt: skip


def least_decode_gib(sizes: EncoderSizes, *, tiles: bool | None = None) -> float:
    """The least peak with which a clip is decoded. tiles: as of `choose`."""
    return min(decode_gib(sizes, tile) for tile in _candidates(tiles))


def text_gib(sizes: EncoderSizes, *, streamed: bool) -> float:
    """Peak of a caption's way through the text encoder and the connectors, which are on the device all the time."""
    working = max(_READING, _CONNECTING) * sizes.states_gib
    if streamed:
        return sizes.connectors_gib + max(sizes.largest_text_gib, working)
    return sizes.text_gib + sizes.connectors_gib + working


def encode_gib(sizes: EncoderSizes, tile: int | None) -> float:
    """Peak of encoding the largest video: both VAEs, its pixels, and the VAE's work on a tile."""
    width, height = (sizes.width, sizes.height) if tile is None else (min(sizes.width, tile), min(sizes.height, tile))
    work = _ENCODE * width * height * sizes.frames
    return sizes.video_vae_gib + sizes.audio_vae_gib + (_pixels(sizes) + work) / GIB


def decode_gib(sizes: EncoderSizes, tile: int | None) -> float:
    """Peak of decoding the largest video: VAEs, vocoder, and the VAE's work.

    A tile's pixels stay until all tiles are there, when they are joined to rows and the rows to the picture.
    """
    weights = sizes.video_vae_gib + sizes.audio_vae_gib + sizes.vocoder_gib
    edge = tile or max(sizes.width, sizes.height)
    step = edge - TILE_OVERLAP if tile else edge
    held = peak = 0.0
    for top in range(0, sizes.height, step):
        for left in range(0, sizes.width, step):
            pixels = min(edge, sizes.height - top) * min(edge, sizes.width - left) * sizes.frames
            peak = max(peak, held + _DECODE * pixels)
            held += _PIXEL * pixels
    joined = held + 2 * _pixels(sizes) if tile else 0.0
    return weights + max(peak, joined) / GIB


def _candidates(tiles: bool | None) -> tuple[int | None, ...]:
    """Tiles that may be chosen, the fastest first."""
    return {True: TILES, False: (None,), None: (None, *TILES)}[tiles]


def _pixels(sizes: EncoderSizes) -> float:
    """Bytes of the whole video."""
    return float(_PIXEL * sizes.width * sizes.height * sizes.frames)


def _first_that_fits(peaks: dict[int | None, float], room: float) -> int | None:
    """The first tile whose peak fits, else the one with the least peak."""
    return next((tile for tile, peak in peaks.items() if peak <= room), min(peaks, key=lambda tile: peaks[tile]))
