"""Generation block by block."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import arcore
from arcore.decoding import generate_blocks, stream_blocks
from arcore.decoding.draws import RowNormals
from arcore.nn import KVCache
from arcore.schedules import DDIM, DDPM, FlowSchedule, VPSchedule


class Counter:
    """Denoises block k to the mean of the blocks before it plus its class, whatever the noise; notes what is called."""

    num_blocks = 3
    block_shape = (2, 3)
    null_class = 9
    prediction = "x0"

    def __init__(self):
        self.schedule = VPSchedule(num_steps=50)
        self.known, self.calls = [], []

    def make_cache(self, batch, copies=1):
        self.calls.append(("cache", batch, copies))
        return KVCache(num_layers=1, batch=batch, num_heads=1, max_length=0, head_dim=8)

    def denoise(self, x, t, labels, cache):
        self.calls.append(("denoise", x.shape[1], t[0, 0].item(), labels[0].tolist()))
        before = sum(block.mean() for block in self.known)
        return (before + labels.float())[..., None, None].expand(x.shape), None

    def commit(self, block, cache):
        self.calls.append(("commit",))
        self.known.append(block)


def test_the_order_of_calls():
    """Every block is denoised at all times, then committed, but not the last."""
    model = Counter()
    out = generate_blocks(model, torch.tensor([2]), times=torch.tensor([40, 10, -1]), cfg_scale=1.0)
    steps = [("denoise", 1, 40, [2]), ("denoise", 1, 10, [2])]
    assert model.calls == [("cache", 1, 1), *steps, ("commit",), *steps, ("commit",), *steps]
    torch.testing.assert_close(out[0, :, 0, 0], torch.tensor([2.0, 4.0, 8.0]))


def test_guidance_extrapolates():
    """u + w (c - u) with c = 2 and u = 9."""
    model = Counter()
    out = generate_blocks(model, torch.tensor([2]), times=torch.tensor([40, -1]), cfg_scale=3.0)
    assert model.calls[:2] == [("cache", 1, 2), ("denoise", 2, 40, [2, 9])]
    torch.testing.assert_close(out[0, 0], torch.full((2, 3), 9.0 + 3 * (2 - 9)))
    part = generate_blocks(
        Counter(), torch.tensor([2]), times=torch.tensor([40, -1]), cfg_scale=3.0, guided_channels=1
    )
    torch.testing.assert_close(part[0, 0], torch.tensor([[-12.0] * 3, [2.0] * 3]))


def test_a_context_is_committed_first():
    model = Counter()
    context = torch.full((1, 2, 2, 3), 1.5)
    out = generate_blocks(
        model, torch.tensor([0]), times=torch.tensor([40, -1]), cfg_scale=1.0, context=context
    )
    assert model.calls == [("cache", 1, 1), ("commit",), ("commit",), ("denoise", 1, 40, [0])]
    assert out[0, :, 0, 0].tolist() == [1.5, 1.5, 3.0]


def test_blocks_come_as_soon_as_they_are_clean():
    model = Counter()
    stream = stream_blocks(model, torch.tensor([2]), times=torch.tensor([40, -1]))
    assert next(stream).shape == (1, 2, 3)
    assert [call[0] for call in model.calls] == ["cache", "denoise", "commit"]
    assert len(list(stream)) == 2


@pytest.mark.parametrize("solver", [DDIM, DDPM])
def test_a_cache_changes_nothing_but_the_time(solver):
    """The same blocks as by recomputing everything in each step under the training mask."""
    torch.manual_seed(0)
    model = arcore.create_model("acdit_tiny")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.eval()
    labels, times, weight = torch.tensor([3, 8]), model.schedule.grid(4, "trailing"), 2.0
    solve = solver(model.schedule)
    cached = generate_blocks(model, labels, solver=solve, times=times, cfg_scale=weight, seed=[1, 2])
    normals, clean = RowNormals(torch.tensor([1, 2])), torch.zeros(2, 4, *model.block_shape)
    null = torch.full_like(labels, model.null_class)
    for block in range(4):
        x = normals.draw(*model.block_shape)
        for t, s in pairwise(times):
            noisy = clean.clone()
            noisy[:, block] = x
            every = t.expand(2, 4)
            with torch.no_grad():
                c, u = (model(clean, noisy, every, kind)[:, block] for kind in (labels, null))
            noise = normals.draw(*model.block_shape) if solve.stochastic and s >= 0 else None
            x, _ = solve.step(u + weight * (c - u), x, t, s, noise=noise)
        clean[:, block] = x
    assert cached.std() > 0.5
    torch.testing.assert_close(cached, clean, rtol=1e-3, atol=1e-3)


def test_half_precision_weights_and_float32_steps():
    model = arcore.create_model("acdit_tiny").bfloat16()
    out = generate_blocks(model, torch.tensor([1]), times=model.schedule.grid(2))
    assert out.dtype == torch.float32
    assert out.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"times": torch.tensor([60, -1])}, "times from -1 to 49"),
        ({"times": torch.tensor([10, 20, -1])}, "times that decrease"),
        ({"times": torch.tensor([10, 10, -1])}, "times that decrease"),
        ({"times": torch.tensor([-1])}, "at least two"),
        ({"times": torch.tensor([10, 0])}, "end clean, at -1, but the last one is 0"),
        ({"cfg_scale": -1.0}, "cfg_scale >= 0"),
        ({"context": torch.zeros(1, 3, 2, 3)}, "fewer than 3 blocks"),
        ({"context": torch.zeros(2, 1, 2, 3)}, "context of shape"),
        ({"seed": [1, 2]}, "one seed"),
    ],
)
def test_bad_calls(options, message):
    with pytest.raises(ValueError, match=message):
        generate_blocks(Counter(), torch.tensor([2]), **options)


def test_times_of_another_schedule():
    with pytest.raises(TypeError, match="times of dtype int64"):
        generate_blocks(Counter(), torch.tensor([2]), times=FlowSchedule().grid(3))
