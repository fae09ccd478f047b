from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ltx_train.contracts import Batch, Condition, ConditionKind, Coupling, DataError, Mode, Placement, Role
from ltx_train.diffusion import conditions
from ltx_train.diffusion.loss import Weights, masked_mse, weighted_total
from ltx_train.diffusion.sigma import SigmaDistribution

DISTRIBUTION = SigmaDistribution()
VOICE = Condition(kind=ConditionKind.reference).name


def batch(size: int = 3, frames: int = 2, reference: bool = False) -> Batch:
    stream = torch.Generator().manual_seed(0)
    return Batch(
        keys=tuple(f"clip{i}" for i in range(size)), speakers=("s",) * size, draws=tuple(range(size)),
        fps=torch.full((size,), 25.0),
        video_latent=torch.randn(size, 16, frames, 2, 2, generator=stream),
        audio_latent=torch.randn(size, 2, 9, 16, generator=stream),
        video_context=torch.zeros(size, 4, 8), audio_context=torch.zeros(size, 4, 8),
        references={VOICE: torch.randn(size, 2, 5, 16, generator=stream)} if reference else {},
    )  # fmt: skip


def inputs(data: Batch, mode: Mode, **options: float) -> conditions.ModelInputs:
    return conditions.assemble(data, mode, conditions.draw(data, mode, DISTRIBUTION, 1, **options))


def test_draws_do_not_depend_on_the_batch() -> None:
    """A sample sees the same sigma and noise alone as among others: any world size, any batch size."""
    data = batch()
    together = conditions.draw(data, Mode(), DISTRIBUTION, 1)
    assert data.video_latent is not None
    alone = replace(
        data, keys=data.keys[1:2], speakers=("s",), draws=data.draws[1:2], fps=data.fps[1:2],
        video_latent=data.video_latent[1:2],
    )  # fmt: skip
    single = conditions.draw(alone, Mode(), DISTRIBUTION, 1)
    assert single.video_noise is not None
    assert together.video_noise is not None
    assert torch.equal(single.video_sigma, together.video_sigma[1:2])
    assert torch.equal(single.video_noise, together.video_noise[1:2])


def test_sigma_is_shared_unless_asked_otherwise() -> None:
    shared = conditions.draw(batch(), Mode(), DISTRIBUTION, 1)
    own = conditions.draw(batch(), Mode(sigma=Coupling.independent), DISTRIBUTION, 1)
    assert torch.equal(shared.video_sigma, shared.audio_sigma)
    assert not torch.equal(own.video_sigma, own.audio_sigma)


def test_noised_tokens_by_hand() -> None:
    data = batch(1)
    made = inputs(data, Mode(), sigma=0.25)
    draws = conditions.draw(data, Mode(), DISTRIBUTION, 1, sigma=0.25)
    assert made.video is not None
    assert made.video_velocity is not None
    assert data.video_latent is not None
    assert draws.video_noise is not None
    clean = data.video_latent.flatten(2).transpose(1, 2)
    torch.testing.assert_close(made.video.latent, 0.75 * clean + 0.25 * draws.video_noise)
    torch.testing.assert_close(made.video_velocity.target, draws.video_noise - clean)
    assert made.video.timesteps.unique().tolist() == [0.25]


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_first_frame(p: float) -> None:
    made = inputs(batch(), Mode(conditions=[Condition(kind=ConditionKind.first_frame, p=p)]))
    assert made.video is not None
    assert made.video_velocity is not None
    first, later = made.video.timesteps[:, :4], made.video.timesteps[:, 4:]
    assert bool((first == 0).all()) == (p == 1)
    assert bool((later > 0).all())
    assert torch.equal(made.video_velocity.loss_mask, (made.video.timesteps > 0).float())


def test_first_frame_frequency() -> None:
    mode = Mode(conditions=[Condition(kind=ConditionKind.first_frame, p=0.5)])
    share = conditions.draw(batch(400, 1), mode, DISTRIBUTION, 3).chosen[0].float().mean()
    assert 0.4 < float(share) < 0.6


def test_one_frame_clips_with_a_clean_first_frame_leave_nothing() -> None:
    data = replace(batch(2, 1), audio_latent=None)
    with pytest.raises(DataError, match="clip0, clip1: every token is given clean, there is nothing to predict"):
        inputs(data, Mode(audio=Role.absent, conditions=[Condition(kind=ConditionKind.first_frame, p=1.0)]))


@pytest.mark.parametrize("placement", list(Placement))
def test_reference_tokens(placement: Placement) -> None:
    data = batch(reference=True)
    made = inputs(data, Mode(conditions=[Condition(kind=ConditionKind.reference, position=placement)]))
    assert made.audio is not None
    assert made.audio_velocity is not None
    assert made.audio.latent.shape[1] == 9 + 5
    assert bool((made.audio.timesteps[:, 9:] == 0).all())
    assert made.audio_velocity.loss_mask.shape[1] == 9
    times = made.audio.positions[:, 0, 9:]
    assert bool((times.amax() <= -0.04 + 1e-6).all()) == (placement is Placement.negative)


def test_frozen_audio_is_clean_and_has_no_loss() -> None:
    data = batch()
    made = inputs(data, Mode(audio=Role.freeze))
    assert made.audio is not None
    assert data.audio_latent is not None
    assert made.audio_velocity is None
    assert float(made.audio.sigma.abs().max()) == 0
    assert torch.equal(made.audio.latent, data.audio_latent.transpose(1, 2).flatten(2))


def test_loss_by_hand() -> None:
    prediction, target = torch.zeros(1, 2, 2), torch.tensor([[[1.0, 1.0], [3.0, 3.0]]])
    assert masked_mse(prediction, target, torch.ones(1, 2)).tolist() == [5.0]
    assert masked_mse(prediction, target, torch.tensor([[1.0, 0.0]])).tolist() == [1.0]
    half = masked_mse(prediction.bfloat16(), target.bfloat16(), torch.ones(1, 2))
    assert half.dtype == torch.float32


def test_weighted_total() -> None:
    video, audio = torch.tensor([1.0, 3.0]), torch.tensor([10.0, 20.0])
    assert float(weighted_total(video, audio, Weights(1.0, 0.5))) == 2.0 + 7.5
    assert float(weighted_total(None, audio, Weights())) == 15.0
    with pytest.raises(ValueError, match="no modality"):
        weighted_total(None, None, Weights())
