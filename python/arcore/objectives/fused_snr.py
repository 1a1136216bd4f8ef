"""How much the error of each frame counts when frames have times of their own (Diffusion Forcing, arXiv:2407.01392)."""

from __future__ import annotations

import torch
from torch import Tensor

from arcore.nn.kinds import check_kinds
from arcore.schedules import Prediction, VPSchedule


@check_kinds
def min_snr_weights(
    t: Tensor, schedule: VPSchedule, *, prediction: Prediction, snr_clip: float = 5.0
) -> Tensor:
    """Weights by the ratio of signal to noise, clipped (arXiv:2303.09556).

    With `snr = alpha^2 / sigma^2` and `c = min(snr, snr_clip)`: c for "x0", c / (snr + 1) for "v", c / snr for "eps".

    Args:
        t: times of any shape, at least 0.
        schedule: of the noise.
        prediction: what the error is of.
        snr_clip: largest ratio that counts.

    Returns:
        float32 like t.

    Raises:
        ValueError: another prediction, or a clip not above 0.
    """
    snr = _snr(t, schedule, snr_clip)
    return _of_prediction(snr, snr.clamp(max=snr_clip), prediction).float()


@check_kinds
def fused_snr_weights(
    t: Tensor, schedule: VPSchedule, *, prediction: Prediction, snr_clip: float = 5.0, decay: float = 0.96
) -> Tensor:
    """Weights by the signal of a frame and of the frames before it, which say something of it too.

    With snr and its clipped value in units of `snr_clip`, s and c, and their exponential average over earlier frames,
    `e_0 = c_0`, `e_n = decay e_{n-1} + (1 - decay) c_n`: the signal of frame n is fused as that of independent sources,
    `1 - (1 - decay e_{n-1}) (1 - s_n)`, and the same with c_n in place of s_n; the first frame has its own only. The
    result is that of `min_snr_weights` with `snr_clip` times these two.

    Args:
        t: `[B, N]` times of N frames in a row, at least 0.
        schedule: of the noise.
        prediction: what the error is of.
        snr_clip: largest ratio that counts.
        decay: share of the signal that is left after one more frame, 0 to 1.

    Returns:
        float32 `[B, N]`.

    Raises:
        ValueError: another shape or prediction, or a number out of range.
    """
    if t.dim() != 2:
        raise ValueError(f"expected times of shape ['B', 'N'] but got {tuple(t.shape)}")
    if not 0 <= decay <= 1:
        raise ValueError(f"expected decay from 0 to 1 but got {decay}")
    own = _snr(t, schedule, snr_clip) / snr_clip
    clipped = own.clamp(max=1)
    frames = t.shape[1]
    place = torch.arange(frames, dtype=torch.float64, device=t.device)
    age = place - place[:, None]  # [of, seen by]
    share = torch.where(age >= 0, decay ** age.clamp(min=0), 0.0)
    share = torch.cat([share[:1], share[1:] * (1 - decay)])
    past = (clipped @ share)[:, :-1] * decay
    past = torch.cat([torch.zeros_like(own[:, :1]), past], dim=1)[:, :frames]
    # a + b - a b is 1 - (1 - a) (1 - b) without loss of digits where both are small.
    fused = past + own - past * own
    capped = past + clipped - past * clipped
    return _of_prediction(fused * snr_clip, capped * snr_clip, prediction).float()


def _snr(t: Tensor, schedule: VPSchedule, snr_clip: float) -> Tensor:
    if not snr_clip > 0:
        raise ValueError(f"expected snr_clip > 0 but got {snr_clip}")
    bar = schedule.alpha_bar(t)
    return bar / (1 - bar)


def _of_prediction(snr: Tensor, clipped: Tensor, prediction: Prediction) -> Tensor:
    if prediction == "x0":
        return clipped
    if prediction == "v":
        return clipped / (snr + 1)
    if prediction == "eps":
        return clipped / snr
    raise ValueError(f"expected prediction to be x0, v or eps but got {prediction!r}")
