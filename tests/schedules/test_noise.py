"""Noise schedules and what networks predict."""

from __future__ import annotations

import math

import pytest
import torch

from arcore.schedules import (
    PREDICTIONS,
    FlowSchedule,
    NoiseSchedule,
    VPSchedule,
    add_noise,
    target,
    to_eps,
    to_x0,
)

KINDS = ("linear", "scaled_linear", "cosine", "sigmoid")
SCHEDULES = [*(VPSchedule(kind) for kind in KINDS), FlowSchedule()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 10, 1000])
def test_variance_is_preserved_and_noise_grows(kind, steps):
    schedule = VPSchedule(kind, num_steps=steps)
    t = torch.arange(-1, steps)
    alpha, sigma = schedule.alpha_sigma(t)
    assert alpha.dtype == torch.float64
    assert (alpha.square() + sigma.square() - 1).abs().max() <= 1e-15
    assert (alpha[0], sigma[0]) == (1, 0)
    assert (sigma.diff() > 0).all()


def test_known_values():
    linear = VPSchedule("linear")
    assert linear.betas[[0, -1]].tolist() == [1e-4, 0.02]
    # exp(sum log(1 - beta)) by hand for the linear betas.
    log_bar = sum(math.log1p(-(1e-4 + i * (0.02 - 1e-4) / 999)) for i in range(1000))
    assert math.isclose(linear.alphas_cumprod[-1].item(), math.exp(log_bar), rel_tol=1e-12)
    cosine = VPSchedule("cosine").alphas_cumprod
    assert cosine[-1].item() == pytest.approx(2.43e-9, rel=0.01)
    assert cosine[499].item() == pytest.approx(
        (math.cos((0.5 + 0.008) / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)) ** 2, rel=1e-9
    )
    assert VPSchedule("sigmoid").alphas_cumprod[499].item() == pytest.approx(0.5, abs=1e-9)


def test_times_have_any_shape_and_meet_leading_axes():
    schedule, x, eps = VPSchedule(), torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    t = torch.tensor([[0, 500, 999], [-1, 7, 20]])
    noisy = add_noise(schedule, x, eps, t)
    assert torch.equal(noisy[1, 0], x[1, 0])
    for b in range(2):
        for block in range(3):
            one = add_noise(schedule, x[b, block], eps[b, block], t[b, block])
            assert torch.equal(noisy[b, block], one)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_predictions_convert_into_each_other(schedule, kind):
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 50, 3, generator=generator, dtype=torch.float64)
    t = torch.arange(50) * 19 if isinstance(schedule, VPSchedule) else torch.linspace(0.02, 0.98, 50)
    x = add_noise(schedule, x0, eps, t)
    output = target(kind, x0, eps, t, schedule)
    torch.testing.assert_close(to_x0(kind, output, x, t, schedule), x0, rtol=0, atol=1e-6)
    torch.testing.assert_close(to_eps(kind, output, x, t, schedule), eps, rtol=0, atol=1e-6)


def test_times_to_train_on():
    generator = torch.Generator().manual_seed(0)
    t = VPSchedule(num_steps=10).sample_times(2000, 5, generator=generator)
    assert t.dtype == torch.int64
    assert torch.bincount(t.flatten(), minlength=10).float().sub(1000).abs().max() < 150
    uniform = FlowSchedule(shift=3.0).sample_times(20000, generator=generator)
    # P(t' <= 1/2) = P(t <= 1/4) with t' = 3 t / (1 + 2 t).
    assert (uniform <= 0.5).double().mean().item() == pytest.approx(0.25, abs=0.015)
    normal = FlowSchedule(density="logit_normal", mean=1.0).sample_times(20000, generator=generator)
    assert normal.logit().mean().item() == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [
        ("leading", [800, 600, 400, 200, 0, -1]),
        ("leading_inner", [830, 664, 498, 332, 166, -1]),
        ("linspace", [999, 749, 500, 250, 0, -1]),
        ("linspace_inner", [999, 799, 599, 400, 200, -1]),
        ("trailing", [999, 799, 599, 399, 199, -1]),
        ("trailing_floor", [999, 799, 599, 399, 199, -1]),
        ("every", [800, 600, 400, 200, 0, -1]),
    ],
)
def test_grids(spacing, expected):
    assert VPSchedule().grid(5, spacing).tolist() == expected


SPACINGS = ["leading", "leading_inner", "linspace", "linspace_inner", "trailing", "trailing_floor"]


def test_times_of_released_samplers():
    grid = VPSchedule().grid
    # ACDiT: 25 steps of DPM-Solver.
    assert grid(25, "linspace_inner").tolist() == [
        *(999, 959, 919, 879, 839, 799, 759, 719, 679, 639, 599, 559, 519),
        *(480, 440, 400, 360, 320, 280, 240, 200, 160, 120, 80, 40, -1),
    ]  # fmt: skip
    # AR-Diffusion: every 33rd for 30 steps are 31.
    assert grid(30, "every").tolist() == [*range(990, -1, -33), -1]
    # The respaced DDPM: 21 of a sum that passes 499.5 from below, and the number of counts for which that matters.
    assert 499 in grid(21, "linspace").tolist()
    multiplied = [[round(k * (999 / (steps - 1))) for k in range(steps)] for steps in range(2, 1001)]
    summed = [grid(steps, "linspace")[:-1].flip(0).tolist() for steps in range(2, 1001)]
    assert sum(a != b for a, b in zip(multiplied, summed, strict=True)) == 278


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of numpy, in diffusers
@pytest.mark.parametrize("steps", [1, 2, 10, 24, 25, 50, 333, 500, 997, 999])
def test_times_of_the_published_schedulers(steps):
    diffusers = pytest.importorskip("diffusers")
    config = diffusers.DDIMScheduler().config
    made = {
        "linspace_inner": diffusers.DPMSolverMultistepScheduler.from_config(config),
        "leading": diffusers.DDIMScheduler.from_config(config),
        "leading_inner": diffusers.DPMSolverMultistepScheduler(timestep_spacing="leading"),
        "trailing": diffusers.DDIMScheduler(timestep_spacing="trailing"),
    }
    for spacing, scheduler in made.items():
        scheduler.set_timesteps(steps)
        assert VPSchedule().grid(steps, spacing)[:-1].tolist() == scheduler.timesteps.tolist(), spacing


@pytest.mark.parametrize("spacing", SPACINGS)
def test_grids_descend_inside_the_schedule(spacing):
    for total in (1, 2, 7, 100):
        most = total - spacing.endswith("_inner")
        for steps in range(1, most + 1):
            grid = VPSchedule(num_steps=total).grid(steps, spacing)
            assert len(grid) == steps + 1
            assert (grid.diff() < 0).all()
            assert grid[0] < total
            assert grid[-1] == -1
    assert FlowSchedule(shift=2.0).grid(2).tolist() == pytest.approx([1, 2 / 3, 0])


def test_both_are_noise_schedules():
    assert all(isinstance(schedule, NoiseSchedule) for schedule in SCHEDULES)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: VPSchedule("quadratic"), "kind to be one of 'linear', 'scaled_linear'"),
        (lambda: VPSchedule(num_steps=0), "num_steps >= 1"),
        (lambda: VPSchedule(beta_start=0.1, beta_end=0.01), "beta_start <= beta_end"),
        (lambda: VPSchedule().grid(1001), "1 to 1000 sampling steps"),
        (lambda: VPSchedule().grid(1000, "leading_inner"), "1 to 999 sampling steps"),
        (lambda: VPSchedule().grid(1000, "linspace_inner"), "1 to 999 sampling steps"),
        (lambda: VPSchedule().grid(5, "quadratic"), "spacing to be"),
        (lambda: VPSchedule().check_times("t", torch.tensor([1000])), "t from -1 to 999"),
        (lambda: VPSchedule().check_times("t", torch.tensor([-2])), "got -2"),
        (lambda: FlowSchedule().check_times("t", torch.tensor([1.5])), "got 1.5"),
        (lambda: FlowSchedule().check_times("t", torch.tensor([float("nan")])), "got nan"),
        (lambda: FlowSchedule(density="normal"), "density to be"),
        (lambda: FlowSchedule(shift=0), "shift > 0"),
        (lambda: FlowSchedule().grid(0), "at least 1"),
        (
            lambda: add_noise(VPSchedule(), torch.ones(2, 3), torch.ones(2, 3), torch.ones(3).long()),
            "leading axes",
        ),
        (
            lambda: add_noise(VPSchedule(), torch.ones(2, 3), torch.ones(2), torch.ones(2).long()),
            "data's shape",
        ),
        (
            lambda: to_x0("noise", torch.ones(1), torch.ones(1), torch.ones(1).long(), VPSchedule()),
            "kind to be one of 'eps'",
        ),
    ],
)
def test_bad_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_dtypes():
    with pytest.raises(TypeError, match="dtype int64"):
        VPSchedule().check_times("t", torch.tensor([0.5]))
    with pytest.raises(TypeError, match="floating dtype"):
        FlowSchedule().check_times("t", torch.tensor([1]))
