"""Every mode by hand: which tokens are given, where references stand, who sees them, and what the loss is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ltx_train.contracts import Condition, ConditionKind, DataError, Mode, Role
from ltx_train.diffusion import conditions, given, mixture, objective
from ltx_train.diffusion.loss import Weights
from ltx_train.diffusion.sigma import SigmaDistribution
from ltx_train.model import load_transformer
from tests.conftest import TINY
from tests.unit.clips import AUDIO, FRAMES, PER_FRAME, PRESETS, SIGMA, VIDEO, VOICE, always, assembled, batch, preset

FIRST = set(range(PER_FRAME))
EARLY = set(range(4 * PER_FRAME))
LATE = set(range(PER_FRAME, VIDEO))
CROP = {frame * PER_FRAME + 1 for frame in range(FRAMES)}
MASKED = {frame * PER_FRAME + column for frame in (1, 2) for column in (0, 1)}
# Per preset: given target tokens of the video and of the audio (None: the modality is absent; "all": frozen), and the
# reference tokens behind them.
BY_HAND: dict[str, tuple[Any, Any, int, int]] = {
    "t2v": (set(), None, 0, 0),
    "t2av": (set(), set(), 0, 0),
    "i2v": (FIRST, None, 0, 0),
    "av_i2v": (FIRST, set(), 0, 0),
    "extend": (EARLY, set(), 0, 0),
    "suffix": (LATE, set(), 0, 0),
    "inpaint": (MASKED, None, 0, 0),
    "outpaint": (CROP, None, 0, 0),
    "v2v_ic": (FIRST, None, VIDEO, 0),
    "multi_reference_ic": (set(), None, VIDEO + 1, 0),
    "a2v": (set(), "all", 0, 0),
    "v2a": ("all", set(), 0, 0),
    "t2a": (None, set(), 0, 0),
    "audio_extend": (None, set(range(20)), 0, 0),
    "audio_inpaint": (None, {4, 5, 6, 7, 8}, 0, 0),
    "a2a_ic": (None, set(), 0, VOICE),
    "av2av_ic": (set(), set(), VIDEO, VOICE),
    "audio_reference": (set(), set(), 0, VOICE),
    "id_lora": (FIRST, set(), 0, VOICE),
}


def test_every_preset_is_computed_by_hand() -> None:
    assert set(PRESETS) == set(BY_HAND)


@pytest.mark.parametrize("name", PRESETS)
def test_given_tokens_timesteps_targets_and_loss(name: str) -> None:
    """Given tokens are clean, have timestep 0 and no loss; the others are noised at sigma and predict noise - clean."""
    mode = always(preset(name))
    data = batch(mode)
    made = assembled(mode, data)
    draws = conditions.draw(data, mode, SigmaDistribution(), 1, sigma=SIGMA)
    clean = {
        "video": data.video_latent.flatten(2).transpose(1, 2),
        "audio": data.audio_latent.transpose(1, 2).flatten(2),
    }  # type: ignore[union-attr]
    for stream, tokens, shown, beside in (
        ("video", VIDEO, BY_HAND[name][0], BY_HAND[name][2]), ("audio", AUDIO, BY_HAND[name][1], BY_HAND[name][3]),
    ):  # fmt: skip
        modality, velocity = getattr(made, stream), getattr(made, f"{stream}_velocity")
        if shown is None:
            assert modality is None
            assert velocity is None
            continue
        assert modality.latent.shape[1] == tokens + beside
        assert modality.timesteps[:, tokens:].abs().sum() == 0
        kept = list(range(tokens)) if shown == "all" else sorted(shown)
        noised = [t for t in range(tokens) if t not in kept]
        assert torch.equal(modality.latent[:, kept], clean[stream][:, kept])
        assert modality.timesteps[:, kept].abs().sum() == 0
        assert bool((modality.timesteps[:, noised] == SIGMA).all())
        assert modality.sigma.tolist() == ([0, 0] if shown == "all" else [SIGMA, SIGMA])
        if shown == "all":
            assert velocity is None
            continue
        noise = getattr(draws, f"{stream}_noise")
        mixed = (1 - SIGMA) * clean[stream] + SIGMA * noise
        torch.testing.assert_close(modality.latent[:, noised], mixed[:, noised])
        torch.testing.assert_close(velocity.target, noise - clean[stream])
        assert velocity.loss_mask.sum(dim=1).tolist() == [len(noised)] * 2
        assert velocity.loss_mask[:, kept].sum() == 0


@pytest.mark.parametrize("name", PRESETS)
def test_the_loss_is_the_mean_over_noised_tokens(name: str) -> None:
    mode = always(preset(name))
    made = assembled(mode, batch(mode))

    def predicted(video: Any, audio: Any) -> Any:
        return tuple(None if m is None else torch.zeros_like(m.latent) for m in (video, audio))

    result = objective.losses(predicted, made, Weights(2.0, 0.5))
    total = 0.0
    for stream, weight in (("video", 2.0), ("audio", 0.5)):
        velocity, found = getattr(made, f"{stream}_velocity"), getattr(result, stream)
        if velocity is None:
            assert found is None
            continue
        noised = velocity.loss_mask[0] > 0
        by_hand = velocity.target[:, noised].square().mean(dim=(1, 2))
        torch.testing.assert_close(found, by_hand)
        total += weight * float(by_hand.mean())
    assert float(result.loss) == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("name", PRESETS)
def test_the_tiny_model_runs_every_preset(name: str) -> None:
    mode = preset(name)
    data = batch(mode, 1)
    made = conditions.assemble(data, mode, conditions.draw(data, mode, SigmaDistribution(), 1))
    result = objective.losses(load_transformer(TINY), made, Weights())
    assert bool(torch.isfinite(result.loss))


def condition(kind: str, **values: Any) -> Condition:
    return Condition(kind=ConditionKind(kind), **values)


def test_prefixes_are_drawn_from_their_range() -> None:
    drawn = torch.rand(500, 4, generator=torch.Generator().manual_seed(0))
    counts = given.lengths(condition("prefix", latents=[2, 5]), drawn).bincount()
    assert counts.nonzero().flatten().tolist() == [2, 3, 4, 5]
    assert int(counts[2:].min()) > 90
    clean = given.tokens(condition("suffix", latents=[3]), (8, 1, 2), drawn, None)
    assert clean.sum(dim=1).unique().tolist() == [6]
    assert bool(clean[0, 10:].all())


def test_rectangles_lie_within_and_leave_something() -> None:
    drawn = torch.rand(300, 4, generator=torch.Generator().manual_seed(0))
    for grid in ((3, 4, 7), (2, 2, 2), (1, 1, 5)):
        boxes = given.rectangles(condition("spatial_crop"), grid, drawn)
        assert bool((boxes >= 0).all())
        assert bool((boxes[:, 2:] <= torch.tensor(grid[1:])).all())
        assert bool((boxes[:, 2:] > boxes[:, :2]).all())
        clean = given.tokens(condition("spatial_crop"), grid, drawn, None)
        assert bool((~clean).any(dim=1).all())
        assert len({tuple(b) for b in boxes.tolist()}) > 1


def test_a_mask_of_another_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="video_mask"):
        given.tokens(condition("mask", source="video_mask"), (2, 2, 2), torch.zeros(1, 4), torch.zeros(1, 3, 2, 2))


def test_missing_material_is_named() -> None:
    for name, missing in (("inpaint", "mask/video/video_mask"), ("v2v_ic", "reference_video_latent")):
        mode = preset(name)
        with pytest.raises(DataError, match=missing):
            assembled(mode, replace(batch(mode), masks={}, references={}))
    with pytest.raises(DataError, match="the mode needs audio, and there is none"):
        assembled(Mode(), replace(batch(Mode()), audio_latent=None))


def test_one_sample_of_nothing_is_enough_to_refuse() -> None:
    mode = preset("inpaint")
    data = batch(mode)
    mask = data.masks["video_mask"].clone()
    mask[1] = 1
    with pytest.raises(DataError, match="clip1: every token is given clean"):
        assembled(mode, replace(data, masks={"video_mask": mask}))


def test_token_weights_lift_and_drop_places() -> None:
    """Face up: its tokens count five times. Face down: not at all."""
    mode = preset("t2v")
    data = batch(mode)
    draws = conditions.draw(data, mode, SigmaDistribution(), 1, sigma=SIGMA)
    for weight in (5.0, 0.0):
        made = conditions.assemble(data, mode, draws, {"video_mask": weight})
        assert made.video_velocity is not None
        mask = made.video_velocity.loss_mask[0]
        assert mask[sorted(MASKED)].unique().tolist() == [weight]
        assert mask[[t for t in range(VIDEO) if t not in MASKED]].unique().tolist() == [1.0]


def test_a_mixture_keeps_its_shares_and_depends_on_no_batch() -> None:
    modes = [(0.25, preset("t2av")), (0.75, preset("a2v"))]
    data = batch(Mode(), 400)
    found = mixture.parts(data, modes, 3)
    assert [mode.audio for mode, _ in found] == [Role.generate, Role.freeze]
    assert len(found[0][1].keys) / 400 == pytest.approx(0.25, abs=5 * 0.022)
    alone = mixture.parts(mixture.select(data, [7]), modes, 3)
    assert len(alone) == 1
    assert data.keys[7] in {mode.audio: part.keys for mode, part in found}[alone[0][0].audio]
    part = found[1][1]
    place = data.keys.index(part.keys[5])
    assert torch.equal(part.video_latent[5], data.video_latent[place])  # type: ignore[index]
    assert torch.equal(part.masks["audio_mask"][5], data.masks["audio_mask"][place])
