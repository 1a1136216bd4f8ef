"""Weights of frames that are each at a time of its own."""

from __future__ import annotations

import pytest
import torch

from arcore.objectives import diffusion_loss, fused_snr_weights, min_snr_weights
from arcore.schedules import VPSchedule

SCHEDULE = VPSchedule("sigmoid")


def one_by_one(times: list[int], prediction: str, clip: float, decay: float) -> list[float]:
    """The released loop, frame after frame in Python's floats."""
    weights, average = [], None
    for t in times:
        bar = SCHEDULE.alphas_cumprod[t].item()
        snr = bar / (1 - bar) / clip
        clipped = min(snr, 1.0)
        past = 0.0 if average is None else average
        fused = 1 - (1 - decay * past) * (1 - snr)
        capped = 1 - (1 - decay * past) * (1 - clipped)
        if prediction == "x0":
            weights.append(capped * clip)
        elif prediction == "v":
            weights.append(capped * clip / (fused * clip + 1))
        else:
            weights.append(capped / fused)
        average = clipped if average is None else decay * average + (1 - decay) * clipped
    return weights


@pytest.mark.parametrize("prediction", ["x0", "v", "eps"])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.96, 1.0])
@pytest.mark.parametrize("frames", [1, 2, 7, 64])
def test_fused_weights_equal_a_sequential_reference(prediction, decay, frames):
    t = torch.randint(1000, (5, frames), generator=torch.Generator().manual_seed(frames))
    ours = fused_snr_weights(t, SCHEDULE, prediction=prediction, decay=decay)
    expected = torch.tensor([one_by_one(row, prediction, 5.0, decay) for row in t.tolist()])
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-9)
    assert (ours >= 0).all()


@pytest.mark.parametrize("prediction", ["x0", "v", "eps"])
def test_without_a_past_the_weights_are_those_of_one_frame(prediction):
    t = torch.randint(1000, (4, 6), generator=torch.Generator().manual_seed(1))
    own = min_snr_weights(t, SCHEDULE, prediction=prediction)
    fused = fused_snr_weights(t, SCHEDULE, prediction=prediction, decay=0.0)
    torch.testing.assert_close(fused, own, rtol=1e-5, atol=0)
    first = fused_snr_weights(t, SCHEDULE, prediction=prediction)[:, 0]
    torch.testing.assert_close(first, own[:, 0], rtol=1e-5, atol=0)


def test_min_snr_weights():
    t = torch.arange(1000)
    bar = SCHEDULE.alphas_cumprod
    snr = bar / (1 - bar)
    for kind, expected in (
        ("x0", snr.clamp(max=5)),
        ("v", snr.clamp(max=5) / (snr + 1)),
        ("eps", (5 / snr).clamp(max=1)),
    ):
        ours = min_snr_weights(t, SCHEDULE, prediction=kind)
        torch.testing.assert_close(ours, expected.float(), rtol=1e-5, atol=0)


def test_frames_after_clean_ones_count_more():
    """Nearly clean frames before it lend a frame of pure noise their signal; frames after it do not."""
    after_clean = fused_snr_weights(torch.tensor([[0, 0, 999]]), SCHEDULE, prediction="x0")[0, 2]
    before_clean = fused_snr_weights(torch.tensor([[999, 0, 0]]), SCHEDULE, prediction="x0")[0, 0]
    assert after_clean.item() == pytest.approx(0.96 * 5, rel=1e-4)
    assert before_clean.item() < 0.01


def test_a_loss_takes_weights_of_leading_axes():
    generator = torch.Generator().manual_seed(0)
    output, clean, eps = (torch.randn(3, 4, 6, generator=generator) for _ in range(3))
    t = torch.randint(1000, (3, 4), generator=generator)
    weight = torch.rand(3, 4, generator=generator)
    loss = diffusion_loss(output, clean, eps, t, SCHEDULE, prediction="x0", weight=weight)
    torch.testing.assert_close(loss, (weight[..., None] * (output - clean).square()).mean())
    with pytest.raises(ValueError, match="leading axes"):
        diffusion_loss(output, clean, eps, t, SCHEDULE, weight=weight.T)


def test_bad_arguments():
    t = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="prediction to be x0, v or eps but got 'score'"):
        fused_snr_weights(t, SCHEDULE, prediction="score")
    with pytest.raises(ValueError, match=r"times of shape \['B', 'N'\]"):
        fused_snr_weights(t[0], SCHEDULE, prediction="v")
    with pytest.raises(ValueError, match=r"decay from 0 to 1 but got 1\.5"):
        fused_snr_weights(t, SCHEDULE, prediction="v", decay=1.5)
    with pytest.raises(ValueError, match="snr_clip to be finite and above 0 but got 0"):
        min_snr_weights(t, SCHEDULE, prediction="v", snr_clip=0)
