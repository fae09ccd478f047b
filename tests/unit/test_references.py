"""References beside the target: where they stand, who sees them, when they are there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ltx_train.contracts import Batch, Condition, ConditionKind, DataError, ModalityName, Mode, Placement
from ltx_train.diffusion import conditions, positions, references
from ltx_train.diffusion.sigma import SigmaDistribution
from ltx_train.model import load_transformer
from ltx_train.model.transformer import Perturbation
from tests.conftest import TINY
from tests.unit.clips import AUDIO, PER_FRAME, SIGMA, VIDEO, VOICE, always, assembled, batch, preset


def positions_of(name: str, number: int) -> torch.Tensor:
    mode = always(preset(name))
    made = assembled(mode, batch(mode))
    modality = made.video if mode.references[0].stream == "video" else made.audio
    assert modality is not None
    return modality.positions[0, :, number]


@pytest.mark.parametrize(
    ("name", "token", "expected"),
    [
        # The control stands over the target: its second frame lasts from 1/25 to 9/25 s, row 0, column 1.
        ("v2v_ic", VIDEO + PER_FRAME + 1, [[0.04, 0.36], [0.0, 32.0], [32.0, 64.0]]),
        # The subject, one frame, ends 0.04 s before time zero, at its own size.
        ("multi_reference_ic", VIDEO + VIDEO, [[-0.08, -0.04], [0.0, 32.0], [0.0, 32.0]]),
        ("a2a_ic", AUDIO + 1, [[0.01, 0.05]]),
        # 25 latents last 0.97 s: the first from 0 to 0.01, the last to 0.97; all of it moved by 0.97 + 0.04.
        ("audio_reference", AUDIO, [[-1.01, -1.0]]),
        ("audio_reference", AUDIO + VOICE - 1, [[-0.08, -0.04]]),
    ],
)
def test_where_references_stand(name: str, token: int, expected: list[list[float]]) -> None:
    torch.testing.assert_close(positions_of(name, token), torch.tensor(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("spatial", "temporal", "token", "expected"),
    [
        (2, 1, 1, [[0.04, 0.36], [0.0, 64.0], [0.0, 64.0]]),
        # Half the frames a second: latent 1 lasts frames 1 to 9 of 12.5 a second, less one target frame.
        (1, 2, 1, [[0.08 - 0.04, 0.72 - 0.04], [0.0, 32.0], [0.0, 32.0]]),
        (1, 2, 0, [[0.0, 0.04], [0.0, 32.0], [0.0, 32.0]]),
    ],
)
def test_smaller_and_slower_references(spatial: int, temporal: int, token: int, expected: list[list[float]]) -> None:
    condition = Condition(
        kind=ConditionKind.reference, modality=ModalityName.video, source="r", position=Placement.overlap,
        spatial_scale=spatial, temporal_scale=temporal,
    )  # fmt: skip
    found = references.bounds(condition, torch.zeros(1, 16, 3, 1, 1), torch.zeros(1, 16, 5, 2, 2), torch.tensor([25.0]))
    torch.testing.assert_close(found[0, :, token], torch.tensor(expected), atol=1e-6, rtol=0)


def test_a_reference_that_is_no_whole_part_of_the_target_is_refused() -> None:
    with pytest.raises(DataError, match="whole number of times"):
        references.spatial_scale(torch.zeros(1, 16, 1, 3, 2), torch.zeros(1, 16, 1, 4, 4))
    assert references.spatial_scale(torch.zeros(1, 16, 1, 2, 3), torch.zeros(1, 16, 1, 4, 6)) == 2


def test_a_slower_reference_follows_from_the_shapes() -> None:
    """Behind the first latent of both. A single latent is a picture."""

    def of(latents: int, target: int) -> int:
        return references.temporal_scale(torch.zeros(1, 16, latents, 2, 2), torch.zeros(1, 16, target, 2, 2))

    assert [of(5, 5), of(3, 5), of(2, 5), of(1, 5), of(1, 1)] == [1, 2, 4, 1, 1]
    with pytest.raises(DataError, match="set the condition's temporal_scale"):
        of(4, 5)
    condition = Condition(
        kind=ConditionKind.reference, modality=ModalityName.video, source="r", position=Placement.overlap
    )
    grids = torch.zeros(1, 16, 3, 2, 2), torch.zeros(1, 16, 5, 2, 2), torch.tensor([25.0])
    assert torch.equal(
        references.bounds(condition, *grids), references.bounds(replace(condition, temporal_scale=2), *grids)
    )


def test_audio_positions_are_rounded_as_the_reference_rounds_them() -> None:
    """Bit for bit: the mel frame's number times 160, divided by 16000; a voice less its end, less the gap."""
    mel = (torch.arange(502, dtype=torch.float32) * 4 - 3).clamp(min=0)
    seconds = mel * 160 / 16000
    found = positions.audio(501)[0]
    assert torch.equal(found, torch.stack([seconds[:-1], seconds[1:]], -1))
    voice = Condition(kind=ConditionKind.reference, gap_s=0.04)
    latent = torch.zeros(1, 2, 501, 16)
    placed = references.bounds(voice, latent, latent, torch.tensor([25.0]))[0, 0]
    assert torch.equal(placed, (found - found.max()) - 0.04)


def outputs(mode: Mode, data: Batch, **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The tiny model's velocities of the target tokens, with fields of the audio's input changed."""
    made = assembled(mode, data)
    assert made.audio is not None
    with torch.no_grad():
        video, audio = load_transformer(TINY)(made.video, replace(made.audio, **changes))
    return video[:, :VIDEO], audio[:, :AUDIO]


def test_id_lora_hides_the_voice_from_the_video_and_the_text_from_the_voice() -> None:
    """The video does not change when the voice does, in a model of one block; the voice takes nothing from the text."""
    mode = always(preset("id_lora"))
    data = batch(mode)
    made = assembled(mode, data)
    assert made.audio is not None
    assert made.audio.cross_mask is not None
    assert made.audio.reads_text is not None
    assert made.audio.attention_mask is None
    assert made.audio.cross_mask.sum(dim=1).tolist() == [AUDIO, AUDIO]
    assert made.audio.reads_text.sum(dim=1).tolist() == [AUDIO, AUDIO]
    model = load_transformer(TINY)
    model.transformer_blocks = model.transformer_blocks[:1]
    other = replace(made.audio, latent=made.audio.latent.clone())
    other.latent[:, AUDIO:] += 1
    # Self-attention would bring the voice to the target's tokens, which the video may see.
    skip = frozenset({0})
    with torch.no_grad():
        first, second = (
            model(made.video, m, Perturbation(skip_video=skip, skip_audio=skip)) for m in (made.audio, other)
        )
        seen = replace(made.audio, cross_mask=None), replace(other, cross_mask=None)
        third, fourth = (model(made.video, m, Perturbation(skip_video=skip, skip_audio=skip)) for m in seen)
        texts = [replace(made.audio, context=made.audio.context + shift) for shift in (0, 1)]
        voices = [
            model(made.video, text, Perturbation(skip_video=skip, skip_audio=skip, isolate_modalities=True))[1]
            for text in texts
        ]
    assert torch.equal(first[0], second[0])
    assert not torch.equal(third[0], fourth[0])
    assert torch.equal(voices[0][:, AUDIO:], voices[1][:, AUDIO:])
    assert not torch.equal(voices[0][:, :AUDIO], voices[1][:, :AUDIO])


def test_no_row_is_ever_fully_masked() -> None:
    """Every key that is hidden leaves the target's own tokens to look at."""
    mode = always(preset("id_lora"))
    mode.conditions[0] = replace(mode.conditions[0], strength=0.0)
    made = assembled(mode, batch(mode))
    assert made.audio is not None
    for mask in (made.audio.attention_mask, made.audio.cross_mask):
        assert mask is not None
        assert bool((mask[:, :AUDIO] == 1).all())


@pytest.mark.parametrize("name", ["audio_reference", "av2av_ic", "v2v_ic"])
def test_a_dropped_reference_is_as_good_as_none(name: str) -> None:
    """In a batch of which one sample has its references dropped, that sample's output is that of a mode without."""
    mode = always(preset(name))
    data = batch(mode)
    draws = conditions.draw(data, mode, SigmaDistribution(), 1, sigma=SIGMA)
    one = torch.tensor([True, False])
    kinds = [c.kind is ConditionKind.reference for c in mode.conditions]
    mixed = replace(draws, chosen=tuple(one if k else d for k, d in zip(kinds, draws.chosen, strict=True)))
    model = load_transformer(TINY)
    with torch.no_grad():
        some, none, every = (
            model(m.video, m.audio)
            for m in (
                conditions.assemble(data, mode, mixed),
                conditions.assemble(data, mode, conditions.without_references(mode, draws)),
                conditions.assemble(data, mode, draws),
            )
        )
    for found, without, whole, tokens in zip(some, none, every, (VIDEO, AUDIO), strict=True):
        if found is not None:
            torch.testing.assert_close(found[1, :tokens], without[1, :tokens], atol=2e-6, rtol=1e-5)
            torch.testing.assert_close(found[0, :tokens], whole[0, :tokens], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("gate", "seen"), [([0.0, 1.0], True), ([0.8, 1.0], False), ([0.0, 0.75], True)])
def test_references_keep_to_their_noise_levels(gate: list[float], seen: bool) -> None:
    mode = preset("audio_reference")
    mode.conditions[0] = replace(mode.conditions[0], sigmas=gate)
    made = assembled(mode, batch(mode))
    assert made.audio is not None
    assert (made.audio.latent.shape[1] > AUDIO) == seen


def test_strength_is_a_dial_between_without_and_with() -> None:
    mode = always(preset("audio_reference"))
    data = batch(mode)
    found: list[torch.Tensor] = []
    for strength in (0.0, 0.3, 1.0):
        mode.conditions[0] = replace(mode.conditions[0], strength=strength)
        found.append(outputs(mode, data)[1])
    none = always(preset("t2av"))
    torch.testing.assert_close(found[0], outputs(none, data)[1], atol=2e-6, rtol=1e-5)
    near, far = ((found[1] - found[i]).abs().mean() for i in (0, 2))
    assert near > 0
    assert far > 0


def test_a_fractional_strength_is_that_of_the_reference_implementation() -> None:
    """Row by row, from its definition: s between the target and a reference in both directions, 1 inside a reference, 0
    between references, and nothing taken from the other modality."""
    mode = always(preset("av2av_ic"))
    mode.conditions = [replace(c, strength=0.25) for c in mode.conditions]
    made = assembled(mode, batch(mode))
    for modality, targets in ((made.video, VIDEO), (made.audio, AUDIO)):
        assert modality is not None
        total = modality.latent.shape[1]
        expected = torch.ones(total, total)
        for query in range(total):
            for key in range(total):
                expected[query, key] = 0.25 if (query < targets) != (key < targets) else 1.0
        assert modality.attention_mask is not None
        assert torch.equal(modality.attention_mask, expected.expand(2, -1, -1))
        assert modality.cross_mask is None


def test_references_of_fractional_strength_do_not_see_each_other() -> None:
    mode = always(preset("multi_reference_ic"))
    data = batch(mode)
    mode.conditions = [replace(mode.conditions[0], strength=0.5), mode.conditions[1]]
    made = assembled(mode, data)
    assert made.video is not None
    assert made.video.attention_mask is not None
    mask, first = made.video.attention_mask[0], data.references[mode.conditions[0].name][0, 0].numel()
    assert bool((mask[VIDEO : VIDEO + first, VIDEO + first :] == 0).all())
    assert bool((mask[VIDEO + first :, VIDEO : VIDEO + first] == 0).all())
    assert mask[:VIDEO, VIDEO + first :].unique().tolist() == [1.0]
    assert mask[:VIDEO, VIDEO : VIDEO + first].unique().tolist() == [0.5]


def test_a_closed_gate_hides_a_reference_of_fractional_strength() -> None:
    mode = always(preset("audio_reference"))
    mode.conditions = [replace(mode.conditions[0], strength=0.5)]
    made = assembled(mode, batch(mode))
    assert made.audio is not None
    total = made.audio.latent.shape[1]
    gate = references.Gate(modality=ModalityName.audio, first=AUDIO, last=total, low=0.0, high=0.5)
    hidden = references.closed(made.audio, ModalityName.audio, [gate], 0.9)
    assert hidden.attention_mask is not None
    assert not bool(hidden.attention_mask[:, :, AUDIO:].any())
    assert bool((hidden.attention_mask[:, :, :AUDIO] > 0).all()), "no row is empty"
