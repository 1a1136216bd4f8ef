"""Generation of frames at times of their own."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import arcore
from arcore.decoding import generate_frames, stream_frames
from arcore.decoding.draws import RowNormals
from arcore.nn import KVCache
from arcore.schedules import DDIM, DDPM, DPMSolver2M, VPSchedule, adaptive_levels, pyramid_levels, table_times

GRID = torch.tensor([40, 20, 10, -1])


class Counter:
    """Denoises frame k of a row to k + 1 plus its class, whatever the noise; notes what is called."""

    num_frames = 3
    frame_shape = (2, 4)
    null_class = 9
    prediction = "x0"
    context_time = -1
    frames_at_once = 10

    def __init__(self, cacheable: bool = True):
        self.cacheable = cacheable
        self.schedule = VPSchedule(num_steps=50)
        self.kept, self.calls, self.seen = 0, [], []

    def clean(self, first: int, x: Tensor) -> Tensor:
        frames = 1.0 + first + torch.arange(x.shape[1])
        return (frames + self.labels[:, None])[..., None, None].expand(x.shape)

    def __call__(self, x, t, labels):
        self.calls.append(t[0].tolist())
        self.seen.append(x)
        self.labels = labels
        return self.clean(0, x)

    def make_cache(self, batch):
        return KVCache(num_layers=1, batch=batch, num_heads=1, max_length=0, head_dim=8)

    def start(self, labels, cache):
        self.labels = labels

    def denoise(self, x, t, cache, keep=0):
        self.calls.append((self.kept, keep, t[0].tolist()))
        out = self.clean(self.kept, x)
        self.kept += keep
        return out


def make(**overrides: Any) -> Any:
    torch.manual_seed(0)
    model = arcore.create_model("ar_diffusion_tiny", num_steps=200, **overrides)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def test_what_is_computed_with_a_cache():
    """Frames that have begun and are not finished, and once more each that just finished, to be kept."""
    model = Counter()
    out = generate_frames(model, torch.tensor([2]), times=GRID, lag=2)
    assert model.calls == [
        (0, 0, [40]),
        (0, 0, [20]),
        (0, 0, [10, 40]),
        (0, 1, [-1, 20]),
        (1, 0, [10, 40]),
        (1, 1, [-1, 20]),
        (2, 0, [10]),
    ]
    torch.testing.assert_close(out[0, :, 0, 0], torch.tensor([3.0, 4.0, 5.0]))


def test_what_is_computed_without_a_cache():
    model = Counter(cacheable=False)
    generate_frames(model, torch.tensor([2]), times=GRID, lag=2)
    assert model.calls == table_times(adaptive_levels(3, 3, 2), GRID)[:-1].tolist()


def test_guidance_extrapolates():
    """u + w (c - u) with c of class 2 and u of class 9."""
    for cacheable in (True, False):
        out = generate_frames(Counter(cacheable), torch.tensor([2]), times=GRID, cfg_scale=3.0, lag=0)
        torch.testing.assert_close(out[0, :, 0, 0], torch.tensor([10.0, 11, 12]) + 3 * (2 - 9))


def test_a_context_is_kept_and_continued():
    model = Counter()
    context = torch.full((1, 2, 2, 4), 1.5)
    out = generate_frames(model, torch.tensor([2]), times=GRID, context=context, lag=0)
    assert model.calls == [(0, 2, [-1, -1, 40]), (2, 0, [20]), (2, 0, [10])]
    assert torch.equal(out[:, :2], context)
    torch.testing.assert_close(out[:, 2], torch.full((1, 2, 4), 5.0))


def test_frames_come_as_soon_as_they_are_finished():
    model = Counter()
    stream = stream_frames(model, torch.tensor([2]), times=GRID, lag=3)
    assert next(stream).shape == (1, 2, 4)
    assert len(model.calls) == 3
    assert len(list(stream)) == 2
    assert len(model.calls) == 9
    together = list(stream_frames(Counter(), torch.tensor([2]), times=GRID, lag=0))
    assert len(together) == 3


def by_hand(
    model: Any, labels: Tensor, levels: Tensor, times: Tensor, solver: Any, weight: float, seeds: list[int]
):
    """All frames in every iteration, one formula per step."""
    normals = RowNormals(torch.tensor(seeds))
    x, history = normals.draw(levels.shape[1], *model.frame_shape), None
    null = torch.full_like(labels, model.null_class)
    table = table_times(levels, times)
    for now, then in pairwise(table):
        t, s = (part.expand(len(labels), -1) for part in (now, then))
        with torch.no_grad():
            c, u = (model(x, t, kind) for kind in (labels, null))
        noise = normals.draw(*x.shape[1:]) if solver.stochastic else None
        x, history = solver.step(u + weight * (c - u), x, t, s, history=history, noise=noise)
    return x


@pytest.mark.parametrize("solver", [DDIM, DDPM, DPMSolver2M])
@pytest.mark.parametrize("lag", [0, 2, 4])
def test_a_cache_changes_nothing_but_the_time(solver, lag):
    model = make()
    labels, times = torch.tensor([3, 8]), model.schedule.grid(4, "trailing")
    solve = solver(model.schedule, "x0")
    options: Any = {"lag": lag, "solver": solve, "times": times, "cfg_scale": 2.0, "seed": [1, 2]}
    expected = by_hand(model, labels, adaptive_levels(8, 4, lag), times, solve, 2.0, [1, 2])
    assert expected.std() > 0.1
    torch.testing.assert_close(generate_frames(model, labels, **options), expected, rtol=1e-3, atol=1e-4)
    model.cacheable = False
    torch.testing.assert_close(generate_frames(model, labels, **options), expected, rtol=1e-3, atol=1e-4)


def test_other_tables():
    model = make()
    levels, times = pyramid_levels(8, 4, 1.5), model.schedule.grid(4, "trailing")
    out = generate_frames(model, torch.tensor([3]), levels=levels, times=times, cfg_scale=2.0, seed=[1])
    expected = by_hand(model, torch.tensor([3]), levels, times, DDIM(model.schedule, "x0"), 2.0, [1])
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4)


def test_long_videos_slide_a_window():
    """The window ends with the last frame that has begun; what has left it is finished and stays."""
    model = make()
    labels, times, total = torch.tensor([3]), model.schedule.grid(4, "trailing"), 13
    out = generate_frames(model, labels, frames=total, lag=1, times=times, seed=[5])
    x, solver = RowNormals(torch.tensor([5])).draw(total, *model.frame_shape), DDIM(model.schedule, "x0")
    for now, then in pairwise(table_times(adaptive_levels(total, 4, 1), times)):
        high = max(8, 1 + max(i for i in range(total) if now[i] != then[i]))
        part = slice(high - 8, high)
        with torch.no_grad():
            clean = model(x[:, part], now[None, part], labels)
        x[:, part], _ = solver.step(clean, x[:, part], now[None, part], then[None, part])
    torch.testing.assert_close(out, x, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="at most 8 frames to be on their way at once"):
        generate_frames(model, labels, frames=20, lag=1, times=model.schedule.grid(10))


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_the_released_sampler(lag):
    """Its own recursions: a template [T - 1, t_S, ..., t_1], DDIM from one alpha to the one before, in all frames."""
    model = make(temporal_causal=False)
    steps, total, weight = 4, 10 if lag else 8, 2.0
    labels, null = torch.tensor([3]), torch.tensor([model.null_class])
    bars = model.schedule.alphas_cumprod
    grid = torch.arange(0, 200, 200 // steps) + 1
    template = [199, *grid.flip(0).tolist()]
    bars_from = [*bars[grid].tolist(), bars[-1].item()]
    bars_to = [bars[0].item(), *bars[grid[:-1]].tolist(), bars[-1].item()]
    x = RowNormals(torch.tensor([5])).draw(total, *model.frame_shape).double()
    row, end, finished = [0] * total, 8, None
    while min(row) < steps:
        fresh: list[int] = []
        for i in range(total):
            done = i == 0 or row[i - 1] == steps
            fresh.append(max(0, min(steps, row[i] + 1 if done else fresh[i - 1] - lag)))
        if end < total and fresh[end] != row[end]:
            end += 1
        part = range(end - 8, end)
        t = torch.tensor([[template[fresh[i]] for i in part]])
        seen = x[:, list(part)].float()
        with torch.no_grad():
            c, u = (model(seen, t, kind).double() for kind in (labels, null))
        for place, i in enumerate(part):
            clean = (u + weight * (c - u))[:, place] if fresh[i] != row[i] else x[:, i]
            index = steps - fresh[i]
            bar, bar_to = bars_from[index], bars_to[index]
            noise = (x[:, i] - bar**0.5 * clean) / (1 - bar) ** 0.5
            before = x[:, i].clone()
            x[:, i] = bar_to**0.5 * clean + (1 - bar_to) ** 0.5 * noise
            if fresh[i] == row[i] == steps:
                finished = (x[:, i] / before).mean().item()
        row = fresh
    times = torch.cat([grid.flip(0), torch.tensor([0])])
    options: Any = {"lag": lag, "frames": total, "cfg_scale": weight, "seed": [5], "official_quirks": True}
    out = generate_frames(model, labels, times=times, **options)
    torch.testing.assert_close(out.double(), x, rtol=1e-3, atol=1e-4)
    if lag:
        assert finished is not None
        assert finished > 1
    plain = generate_frames(
        model, labels, times=torch.cat([grid.flip(0), torch.tensor([-1])]), lag=lag, frames=total
    )
    assert not torch.allclose(plain, out, atol=1e-2)


@pytest.mark.parametrize(
    ("quirks", "factor", "first", "later"),
    [(True, 1.0000212, [981, 999], [1, 981]), (False, 1.0, [999, 999], [-1, 999])],
)
def test_the_released_sampler_lets_finished_frames_grow(quirks, factor, first, later):
    """By 1.000021 per iteration with 50 of 1000 steps; in the proper one they stay bit for bit."""
    model = Counter(cacheable=False)
    model.num_frames, model.schedule = 2, VPSchedule("scaled_linear")
    generate_frames(model, torch.tensor([2]), lag=50, official_quirks=quirks)
    assert len(model.calls) == 100
    assert (model.calls[0], model.calls[50]) == (first, later)
    before, after = (model.seen[iteration][0, 0].double().mean().item() for iteration in (50, 99))
    assert (after / before) ** (1 / 49) == pytest.approx(factor, abs=2e-7)
    assert torch.equal(model.seen[50][:, 0], model.seen[99][:, 0]) != quirks


def test_half_precision_weights_and_float32_steps():
    model = arcore.create_model("ar_diffusion_tiny").bfloat16()
    out = generate_frames(model, torch.tensor([1]), times=model.schedule.grid(2), lag=1)
    assert out.dtype == torch.float32
    assert out.isfinite().all()
    assert model.training


def test_defaults():
    """50 steps, each frame 5 iterations after the one before."""
    model = Counter()
    model.schedule = VPSchedule("scaled_linear")
    generate_frames(model, torch.tensor([2]))
    assert len(model.calls) == 50 + 2 * 5
    assert model.calls[5] == (0, 0, [897, 999])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"times": torch.tensor([60, -1])}, "times from -1 to 49"),
        ({"times": torch.tensor([10, 20, -1])}, "times that decrease"),
        ({"times": torch.tensor([-1])}, "at least two"),
        ({"times": torch.tensor([10, 0])}, "end clean, at -1, but the last one is 0"),
        ({"cfg_scale": -1.0}, "cfg_scale >= 0"),
        ({"lag": 4}, "lag from 0 to steps=3 but got 4"),
        ({"lag": 1, "levels": adaptive_levels(3, 3, 1)}, "lag or levels but got both"),
        ({"levels": adaptive_levels(4, 3, 1)}, r"levels of shape \('M', 3\)"),
        ({"levels": adaptive_levels(3, 2, 1)}, "levels that start at 3"),
        ({"levels": adaptive_levels(3, 3, 1)[:-1]}, "fall to 0"),
        ({"frames": 2}, "at least 3 frames, what the model takes at once, but got 2"),
        ({"context": torch.zeros(1, 3, 2, 4)}, "fewer than 3 frames"),
        ({"context": torch.zeros(2, 1, 2, 4)}, "context of shape"),
        ({"seed": [1, 2]}, "one seed"),
    ],
)
def test_bad_calls(options, message):
    with pytest.raises(ValueError, match=message):
        generate_frames(Counter(), torch.tensor([2]), **{"times": GRID, **options})


def test_bad_types():
    with pytest.raises(TypeError, match="levels of dtype int64"):
        generate_frames(Counter(), torch.tensor([2]), times=GRID, levels=adaptive_levels(3, 3, 1).float())
    with pytest.raises(TypeError, match="times of dtype int64"):
        generate_frames(Counter(), torch.tensor([2]), times=GRID.float())
    with pytest.raises(ValueError, match="leave a schedule of 50 steps: pass times"):
        generate_frames(Counter(), torch.tensor([2]), official_quirks=True)
