"""Every mode by hand: which tokens are given, where references stand, who sees them, and what the loss is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ltx_train import config
from ltx_train.contracts import Batch, Condition, ConditionKind, DataError, ModalityName, Mode, Placement, Role
from ltx_train.diffusion import conditions, given, mixture, objective, references
from ltx_train.diffusion.conditions import ModelInputs
from ltx_train.diffusion.loss import Weights
from ltx_train.diffusion.sigma import SigmaDistribution
from ltx_train.model import load_transformer
from ltx_train.model.transformer import Perturbation
from tests.conftest import REPOSITORY, TINY

PLACES = ["data.source=x", "data.root=y"]
PRESETS = sorted(p.stem for p in (REPOSITORY / "conf/mode").glob("*.yaml"))
FRAMES, ROWS, COLUMNS, SOUNDS, VOICE = 5, 2, 2, 33, 25
VIDEO, AUDIO = FRAMES * ROWS * COLUMNS, SOUNDS
PER_FRAME = ROWS * COLUMNS
SIGMA = 0.75


def preset(name: str) -> Mode:
    return config.compose_config([f"mode={name}", *PLACES]).mode


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def batch(mode: Mode, size: int = 2) -> Batch:
    """Clips with everything the presets read: a full-size control, a half-size subject, a voice and masks."""
    mask = torch.zeros(FRAMES, ROWS, COLUMNS)
    mask[1:3, 0] = 1
    heard = torch.zeros(SOUNDS)
    heard[4:9] = 0.9
    shapes = {"reference_video_latent": (16, FRAMES, ROWS, COLUMNS), "subject_video_latent": (16, 1, 1, 1)}
    beside = {
        c.name: numbers(size, *(shapes.get(c.source, (16, FRAMES, ROWS, COLUMNS)) if c.stream == "video" else
                                (2, VOICE, 16)))
        for c in mode.references
    }  # fmt: skip
    return Batch(
        keys=tuple(f"clip{i}" for i in range(size)), speakers=("s",) * size, draws=tuple(range(size)),
        fps=torch.full((size,), 25.0), video_latent=numbers(size, 16, FRAMES, ROWS, COLUMNS),
        audio_latent=numbers(size, 2, SOUNDS, 16), video_context=numbers(size, 4, 64),
        audio_context=numbers(size, 4, 32), references=beside,
        masks={"video_mask": mask.expand(size, -1, -1, -1), "audio_mask": heard.expand(size, -1)},
    )  # fmt: skip


def always(mode: Mode) -> Mode:
    """The mode with every condition certain and every range at its upper end, to be computed by hand."""
    fixed = [replace(c, p=1.0, latents=c.latents[-1:]) for c in mode.conditions]
    region = [replace(c, region=[0, 32, 32, 64]) if c.kind == "spatial_crop" else c for c in fixed]
    return replace(mode, conditions=region)


def assembled(mode: Mode, data: Batch) -> ModelInputs:
    return conditions.assemble(data, mode, conditions.draw(data, mode, SigmaDistribution(), 1, sigma=SIGMA))


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


def positions_of(name: str, number: int) -> torch.Tensor:
    mode = always(preset(name))
    made = assembled(mode, batch(mode))
    modality = made.video if BY_HAND[name][3] == 0 else made.audio
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
        ConditionKind.reference, modality=ModalityName.video, source="r", position=Placement.overlap,
        spatial_scale=spatial, temporal_scale=temporal,
    )  # fmt: skip
    found = references.bounds(condition, torch.zeros(1, 16, 3, 1, 1), torch.zeros(1, 16, 5, 2, 2), torch.tensor([25.0]))
    torch.testing.assert_close(found[0, :, token], torch.tensor(expected), atol=1e-6, rtol=0)


def test_a_reference_that_is_no_whole_part_of_the_target_is_refused() -> None:
    with pytest.raises(DataError, match="whole number of times"):
        references.spatial_scale(torch.zeros(1, 16, 1, 3, 2), torch.zeros(1, 16, 1, 4, 4))
    assert references.spatial_scale(torch.zeros(1, 16, 1, 2, 3), torch.zeros(1, 16, 1, 4, 6)) == 2


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
        first, second = (model(made.video, m, Perturbation(skip)) for m in (made.audio, other))
        seen = replace(made.audio, cross_mask=None), replace(other, cross_mask=None)
        third, fourth = (model(made.video, m, Perturbation(skip)) for m in seen)
        texts = [replace(made.audio, context=made.audio.context + shift) for shift in (0, 1)]
        voices = [model(made.video, text, Perturbation(skip, isolate_modalities=True))[1] for text in texts]
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


def condition(kind: str, **values: Any) -> Condition:
    return Condition(ConditionKind(kind), **values)


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
    assert len(found[0][1].keys) / 400 == pytest.approx(0.25, abs=0.06)
    alone = mixture.parts(mixture.select(data, [7]), modes, 3)
    assert len(alone) == 1
    assert data.keys[7] in {mode.audio: part.keys for mode, part in found}[alone[0][0].audio]
    part = found[1][1]
    place = data.keys.index(part.keys[5])
    assert torch.equal(part.video_latent[5], data.video_latent[place])  # type: ignore[index]
    assert torch.equal(part.masks["audio_mask"][5], data.masks["audio_mask"][place])
