"""Memory of encoders: the text encoder whole or layer by layer, the video VAE whole or in tiles. Pure."""

from __future__ import annotations

from dataclasses import dataclass

# Peak of the video VAE on an H200 at 1280x704x153: 18.1 GiB whole, 7.9 GiB in tiles. A line through both, on the
# assumption that the tiles were diffusers' default of 512x512. No other size was measured.
_VAE_GIB, _VAE_GIB_PER_PIXEL = 3.7, 1.043e-7
_TILE = 512
# What is on the device of a text encoder that is streamed: a layer's largest weight, and activations. Estimated.
_LAYER_GIB = 0.6


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSizes:
    """text_gib, connectors_gib: weights on the device. states_gib: the hidden states of a caption. width, height,
    frames: of the largest video that is encoded or decoded."""

    text_gib: float
    connectors_gib: float
    states_gib: float
    width: int
    height: int
    frames: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderMemory:
    """streams_text: the text encoder's weights stay in host memory and come layer by layer. tiles: the video VAE works
    in tiles. text_gib, video_gib: predicted peaks, of which the larger counts: one follows the other."""

    streams_text: bool
    tiles: bool
    text_gib: float = 0.0
    video_gib: float = 0.0

    @property
    def peak_gib(self) -> float:
        return max(self.text_gib, self.video_gib)


def choose(
    sizes: EncoderSizes, budget_gib: float | None, *, streams_text: bool | None = None, tiles: bool | None = None
) -> EncoderMemory:
    """The fastest that fits into the budget (None: everything whole). Arguments that are given are kept."""
    beside = sizes.connectors_gib + 2 * sizes.states_gib
    texts = {False: sizes.text_gib + beside, True: _LAYER_GIB + beside}
    tile = min(sizes.width, _TILE), min(sizes.height, _TILE)
    videos = {
        False: _VAE_GIB + _VAE_GIB_PER_PIXEL * sizes.width * sizes.height * sizes.frames,
        True: _VAE_GIB + _VAE_GIB_PER_PIXEL * tile[0] * tile[1] * sizes.frames,
    }
    room = float("inf") if budget_gib is None else budget_gib
    streams_text = texts[False] > room if streams_text is None else streams_text
    tiles = videos[False] > room if tiles is None else tiles
    return EncoderMemory(streams_text=streams_text, tiles=tiles, text_gib=texts[streams_text], video_gib=videos[tiles])
