"""The head that denoises tokens one by one: its sampler against a plain loop, its start, its errors."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from arcore.nn import DiffusionHead
from arcore.nn.diffusion_head import modulation_parts
from arcore.schedules import DDIM, DDPM, DPMSolver2M, FlowSchedule, VPSchedule


def make(**settings) -> DiffusionHead:
    torch.manual_seed(0)
    head = DiffusionHead(3, 5, 16, 2, **{"schedule": VPSchedule("cosine"), **settings})
    for parameter in head.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return head


def plain_loop(head, z, noise, solver, times, uncond, scale):
    """One evaluation of the network and one step of the solver after the other."""
    x, history = noise[0], None
    for k, (t, t_next) in enumerate(pairwise(times)):
        out, variance = head(x, t.expand(len(x)), z)
        if uncond is not None:
            other, _ = head(x, t.expand(len(x)), uncond)
            out = other + scale * (out - other)
        fresh = noise[k + 1] if solver.stochastic and k + 2 < len(times) else None
        wanted = variance if solver.learned_variance else None
        x, history = solver.step(out, x, t, t_next, history=history, noise=fresh, variance=wanted)
    return x


SOLVERS = {
    "learned": (lambda s, p: DDPM(s, p, variance="learned", temperature=0.9), "linspace"),
    "cold": (lambda s, p: DDPM(s, p, variance="learned", temperature=0.0), "linspace"),
    "beta": (lambda s, p: DDPM(s, p, variance="beta"), "linspace"),
    "ddim": (DDIM, "leading"),
    "eta": (lambda s, p: DDIM(s, p, eta=0.7), "trailing"),
    "clipped": (lambda s, p: DDIM(s, p, clip=1.0), "leading"),
    "dpm": (DPMSolver2M, "leading_inner"),
}


@torch.no_grad()
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_sampling_equals_a_plain_loop(solver, prediction, guided, monkeypatch):
    monkeypatch.setattr(DiffusionHead, "AHEAD", 40)  # several chunks, the last one shorter
    head = make(prediction=prediction, learn_variance=True).double()
    build, spacing = SOLVERS[solver]
    steps = build(head.schedule, prediction)
    times = head.schedule.grid(11, spacing)
    z, uncond = torch.randn(2, 7, 5, dtype=torch.float64)
    noise = torch.randn(11, 7, 3, dtype=torch.float64)
    scale = torch.linspace(0, 3, 7, dtype=torch.float64)
    got = head.sample(z, noise, solver=steps, times=times, uncond=uncond if guided else None, cfg_scale=scale)
    wanted = plain_loop(head, z, noise, steps, times, uncond if guided else None, scale[:, None])
    assert wanted.std() > 0.1
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    # In float32 the sampler loses no more than a plain loop does.
    head = head.float()
    single = [part.float() for part in (z, noise, scale)]
    ours = head.sample(single[0], single[1], solver=steps, times=times)
    theirs = plain_loop(head, single[0], single[1], steps, times, None, 1.0)
    exact = plain_loop(head.double(), z, noise, steps, times, None, 1.0)
    floor = 1e-5 * exact.abs().max()
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + floor


@torch.no_grad()
def test_flow_schedules_take_the_same_head():
    head = make(schedule=FlowSchedule(), prediction="velocity").double()
    solver, times = DDIM(head.schedule, "velocity"), head.schedule.grid(9)
    z, noise = torch.randn(4, 5, dtype=torch.float64), torch.randn(1, 4, 3, dtype=torch.float64)
    x = noise[0]
    for t, t_next in pairwise(times):
        out, _ = head(x, t.expand(4), z)
        x = x + (t_next - t) * out
    torch.testing.assert_close(head.sample(z, noise, solver=solver, times=times), x, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_new_head_predicts_nothing():
    head = DiffusionHead(3, 5, 16, 2, schedule=VPSchedule("cosine"), learn_variance=True)
    out, variance = head(torch.randn(7, 3), torch.arange(7), torch.randn(7, 5))
    assert not out.any()
    assert not variance.any()
    h = torch.randn(7, 16)
    for block in head.blocks:
        assert torch.equal(block(h, *modulation_parts(block.modulation, torch.randn(7, 16), 3)), h)


@torch.no_grad()
def test_autocast_changes_nothing():
    head = make()
    inputs = torch.randn(7, 3), torch.arange(7), torch.randn(7, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = head(*inputs)
    assert torch.equal(out, head(*inputs)[0])


def test_bad_inputs():
    head = make()
    x, t, z = torch.randn(7, 3), torch.arange(7), torch.randn(7, 5)
    times, noise = head.schedule.grid(4), torch.randn(4, 7, 3)
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(TypeError, match=r"keep the head in float32 with head\.float"):
            make().to(dtype)(x, t, z)
    with pytest.raises(ValueError, match="7 tokens of 3 values"):
        head(x[:, :2], t, z)
    with pytest.raises(ValueError, match=r"z of shape \('M', 5\)"):
        head(x, t, z[:, :4])
    with pytest.raises(ValueError, match="solver for prediction='v' but got 'eps'"):
        head.sample(z, noise, solver=DDPM(head.schedule), times=times)
    with pytest.raises(ValueError, match=r"noise of shape \(4, 7, 3\) for 4 steps"):
        head.sample(z, noise[:1], solver=DDPM(head.schedule, "v"), times=times)
    with pytest.raises(ValueError, match="learn_variance=False"):
        head.sample(z, noise, solver=DDPM(head.schedule, "v", variance="learned"), times=times)
    with pytest.raises(ValueError, match="times from -1 to 999"):
        head.sample(z, noise, solver=DDPM(head.schedule, "v"), times=times + 500)
    with pytest.raises(ValueError, match="depth to be at least 1"):
        DiffusionHead(3, 5, 16, 0, schedule=VPSchedule("cosine"))
