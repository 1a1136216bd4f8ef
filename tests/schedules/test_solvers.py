"""Solvers against exact solutions, published numbers and each other."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from arcore.schedules import DDIM, DDPM, DPMSolver2M, FlowSchedule, VPSchedule

VP = VPSchedule("linear")


def run(solver, network, x, grid, generator=None):
    history = None
    for t_from, t_to in pairwise(grid):
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype) if solver.stochastic else None
        x, history = solver.step(network(x, t_from), x, t_from, t_to, history=history, noise=noise)
    return x


def gaussian_eps(schedule, std):
    """The best prediction of the noise where data are normal numbers with deviation `std`."""

    def network(x, t):
        alpha, sigma = schedule.alpha_sigma(t)
        return sigma / (alpha**2 * std**2 + sigma**2) * x

    return network


@pytest.mark.parametrize(("solver", "order"), [(DDIM, 1), (DPMSolver2M, 2)])
def test_order_of_convergence(solver, order):
    """For normal data the flow is known: x keeps its quantile."""
    std, x = 0.2, torch.tensor([1.0, -2.0], dtype=torch.float64)
    start, stop = torch.tensor(700), torch.tensor(100)

    def spread(t):
        alpha, sigma = VP.alpha_sigma(t)
        return (alpha**2 * std**2 + sigma**2).sqrt()

    exact = x * spread(stop) / spread(start)
    errors = []
    for steps in (10, 20, 40):
        grid = torch.linspace(700, 100, steps + 1).round().long()
        errors.append((run(solver(VP), gaussian_eps(VP, std), x, grid) - exact).abs().max().item())
    rates = [a / b for a, b in pairwise(errors)]
    assert min(rates) > 0.75 * 2**order, (errors, rates)
    assert max(rates) < 1.3 * 2**order, (errors, rates)


def published(name, steps):
    """What diffusers 0.42 makes of this start and this network, in float64 with tables in float32."""
    return {
        ("ddim", 25): [59.9218, -36.1514, -147.5320, -6.177770, -73.7923, -91.9824],
        ("dpm", 5): [18.79985, -10.35570, -47.05413, -1.110430, -24.92601, -30.69039],
        ("dpm", 25): [54.21240, -26.21728, -128.97387, -3.999100, -58.42819, -75.42348],
    }[name, steps]


@pytest.mark.parametrize(
    ("name", "solver", "spacing", "steps"),
    [
        ("ddim", DDIM, "leading", 25),
        ("dpm", DPMSolver2M, "leading_inner", 5),
        ("dpm", DPMSolver2M, "leading_inner", 25),
    ],
)
def test_published_samplers(name, solver, spacing, steps):
    torch.manual_seed(0)
    x = torch.randn(2, 3, dtype=torch.float64)
    out = run(solver(VP), lambda x, t: torch.tanh(0.7 * x + t / 1000), x, VP.grid(steps, spacing))
    expected = torch.tensor(published(name, steps), dtype=torch.float64)
    torch.testing.assert_close(out.flatten(), expected, rtol=2e-6, atol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of numpy, in diffusers
@pytest.mark.parametrize("steps", [1, 2, 14, 15, 25])
@pytest.mark.parametrize("name", ["acdit", "ddim", "trailing"])
def test_published_schedulers_step_by_step(name, steps):
    """The schedulers of diffusers as released samplers make them: ACDiT's, and DDIM with two spacings."""
    diffusers = pytest.importorskip("diffusers")
    if name == "acdit":
        theirs = diffusers.DPMSolverMultistepScheduler.from_config(diffusers.DDIMScheduler().config)
        solver, grid = DPMSolver2M(VP), VP.grid(steps, "linspace_inner")
    else:
        if name == "trailing" and 1000 % steps:
            pytest.skip("their step goes back by 1000 // steps, past the times that they themselves give")
        spacing = "leading" if name == "ddim" else "trailing"
        theirs = diffusers.DDIMScheduler(timestep_spacing=spacing, clip_sample=False)
        solver, grid = DDIM(VP), VP.grid(steps, spacing)
    theirs.set_timesteps(steps)

    def network(x, t):
        return torch.tanh(0.7 * x + t / 1000)

    torch.manual_seed(0)
    start = torch.randn(2, 3, dtype=torch.float64)
    x = start
    for t in theirs.timesteps:
        x = theirs.step(network(x, t), t, x).prev_sample
    torch.testing.assert_close(run(solver, network, start, grid), x.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["eps", "v", "x0", "velocity"])
def test_straight_lines_need_one_step(kind):
    """One data point: whatever the prediction, any deterministic solver ends on it."""
    point = torch.tensor([0.3, -0.7], dtype=torch.float64)
    x = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for schedule in (FlowSchedule(), VP):
        if isinstance(schedule, FlowSchedule) and kind == "eps":
            continue  # alpha is 0 at the start

        def network(x, t, schedule=schedule):
            alpha, sigma = schedule.alpha_sigma(t)
            eps = (x - alpha * point) / sigma
            return {"eps": eps, "x0": point.expand_as(x), "velocity": eps - point}.get(
                kind, alpha * eps - sigma * point
            )

        for steps in (1, 4):
            for solver in (DDIM, DPMSolver2M):
                if solver is DPMSolver2M and isinstance(schedule, FlowSchedule):
                    continue  # starts from an infinite ratio of noise
                out = run(solver(schedule, kind), network, x, schedule.grid(steps))
                torch.testing.assert_close(out, point.expand_as(x), rtol=0, atol=1e-6)


def test_euler_is_the_flow_update():
    x, velocity = torch.randn(2, 4, 3, dtype=torch.float64)
    t, s = torch.tensor(0.8), torch.tensor(0.55)
    out, _ = DDIM(FlowSchedule(), "velocity").step(velocity, x, t, s)
    torch.testing.assert_close(out, x + (s - t).double() * velocity, rtol=1e-7, atol=1e-7)


def test_full_eta_is_ancestral():
    generator = torch.Generator().manual_seed(0)
    x, output, noise = torch.randn(3, 6, 2, generator=generator, dtype=torch.float64)
    t, s = torch.tensor([999, 500, 500, 3, 1, 0]), torch.tensor([980, 499, 0, 2, 0, -1])
    ours, _ = DDIM(VP, eta=1.0).step(output, x, t, s, noise=noise)
    ancestral, _ = DDPM(VP).step(output, x, t, s, noise=noise)
    torch.testing.assert_close(ours, ancestral, rtol=1e-10, atol=1e-12)


def test_learned_variance_lies_between_its_bounds():
    generator = torch.Generator().manual_seed(0)
    x, output, noise = torch.randn(3, 4, 2, generator=generator, dtype=torch.float64)
    t, s = torch.tensor(400), torch.tensor(390)

    def step(kind, variance=None, temperature=1.0):
        solver = DDPM(VP, variance=kind, temperature=temperature)
        return solver.step(output, x, t, s, noise=noise, variance=variance)[0]

    low, high = step("posterior"), step("beta")
    torch.testing.assert_close(step("learned", torch.full_like(x, -1)), low)
    torch.testing.assert_close(step("learned", torch.full_like(x, 1)), high)
    mean = step("posterior", temperature=0.0)
    middle = step("learned", torch.zeros_like(x))
    torch.testing.assert_close(((middle - mean) / noise) ** 2, (low - mean) * (high - mean) / noise**2)


def test_ancestral_sampling_restores_the_deviation():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5000, generator=generator, dtype=torch.float64)
    out = run(DDPM(VP), gaussian_eps(VP, 0.5), x, VP.grid(1000, "linspace"), generator)
    assert out.std().item() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("make", [DDIM, DDPM, DPMSolver2M])
def test_every_token_has_its_own_times(make):
    """A step with mixed times equals the steps of its tokens; resting tokens are copied bit for bit."""
    solver, generator = make(VP), torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 2, 4, 3, generator=generator)
    x[0, 3] = 3e38  # a resting token whose clean value overflows
    levels = [[999, 600, 50, 20], [500, 600, 0, -1]]
    t = torch.tensor(levels)
    s = torch.tensor([[700, 600, 50, 20], [499, 400, -1, -1]])
    u = torch.tensor([[300, 590, -1, 20], [400, 300, -1, -1]])
    network = torch.sin
    y, history = solver.step(network(x), x, t, s, noise=noise)
    z, _ = solver.step(network(y), y, s, u, history=history, noise=noise)
    for b in range(2):
        for i in range(4):
            one, past = x[b, i], None
            for a, c in ((t, s), (s, u)):
                if a[b, i] != c[b, i]:
                    one, past = solver.step(
                        network(one), one, a[b, i], c[b, i], history=past, noise=noise[b, i]
                    )
            assert torch.equal(z[b, i], one), (b, i)
    assert torch.equal(z[0, 3], x[0, 3])
    assert torch.equal(z[1, 3], x[1, 3])


def test_clip_bounds_the_clean_value():
    x = torch.full((1, 2), 5.0)
    out, _ = DDIM(VP, "x0", clip=1.0).step(torch.tensor([[7.0, -7.0]]), x, torch.tensor(3), torch.tensor(-1))
    assert out.tolist() == [[1.0, -1.0]]


def test_half_precision_outputs_are_taken_but_values_are_not():
    x, t, s = torch.randn(2, 3), torch.tensor(10), torch.tensor(5)
    out, _ = DDIM(VP).step(x.bfloat16(), x, t, s)
    assert out.dtype == torch.float32
    with pytest.raises(TypeError, match=r"use x\.float\(\)"):
        DDIM(VP).step(x.bfloat16(), x.bfloat16(), t, s)


def test_bad_steps():
    x, t, s = torch.randn(2, 3), torch.tensor(10), torch.tensor(5)
    with pytest.raises(ValueError, match="t_to <= t_from"):
        DDIM(VP).step(x, x, s, t)
    with pytest.raises(ValueError, match="t_from from -1 to 999"):
        DDIM(VP).step(x, x, torch.tensor(1000), t)
    with pytest.raises(ValueError, match="values' shape"):
        DDIM(VP).step(x[:, :2], x, t, s)
    with pytest.raises(ValueError, match=r"pass noise of shape \(2, 3\)"):
        DDPM(VP).step(x, x, t, s)
    with pytest.raises(ValueError, match="needs variance"):
        DDPM(VP, variance="learned").step(x, x, t, s, noise=x)
    with pytest.raises(ValueError, match="no learned variance"):
        DDPM(VP).step(x, x, t, s, noise=x, variance=x)
    with pytest.raises(TypeError, match="expected schedule to be a VPSchedule"):
        DDPM(FlowSchedule())
    with pytest.raises(ValueError, match="eta from 0 to 1"):
        DDIM(VP, eta=2.0)
    with pytest.raises(ValueError, match="clip > 0"):
        DDIM(VP, clip=0.0)
