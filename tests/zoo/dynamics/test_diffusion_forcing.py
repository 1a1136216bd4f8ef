"""Diffusion Forcing: the paper's claims, its published weights, its shapes and errors."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import arcore
from arcore.decoding import generate_frames
from arcore.decoding.draws import RowNormals
from arcore.models import DiffusionForcing
from arcore.schedules import DDIM, grouped_levels, pyramid_levels, trapezoid_levels
from arcore.zoo.dynamics.diffusion_forcing.plan import plan, replan

from ..conftest import shaken


def make(**overrides: Any) -> DiffusionForcing:
    torch.manual_seed(0)
    small = {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_dim": 64}
    return shaken(arcore.create_model("diffusion_forcing_tiny", **small | overrides)).eval()


def batch(model: DiffusionForcing, rows: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(rows, model.num_frames, *model.frame_shape, generator=generator)
    return x, torch.randint(1000, x.shape[:2], generator=generator), torch.arange(rows)


@torch.no_grad()
def test_a_frame_does_not_depend_on_later_frames_at_any_time():
    """Whatever the noise, the values and the times of later frames are; of earlier ones it does depend."""
    model = make()
    x, t, labels = batch(model)
    before = model(x, t, labels)
    for changed in range(model.num_frames):
        for time in (0, 500, 999):
            other, times = x.clone(), t.clone()
            other[:, changed] += 1
            times[:, changed] = time
            after = model(other, times, labels)
            assert torch.equal(after[:, :changed], before[:, :changed])
            assert (after[:, changed:] != before[:, changed:]).any(dim=2).all()
    seeing = make(causal=False)
    other = x.clone()
    other[:, -1] += 1
    assert (seeing(other, t, labels) != seeing(x, t, labels)).any(dim=2).all()


@torch.no_grad()
def test_cached_frames_at_their_times_equal_one_pass():
    model = make()
    x, t, labels = batch(model)
    whole = model(x, t, labels)
    cache, parts, place = model.make_cache(2), [], 0
    with pytest.raises(ValueError, match="a cache that `start` has begun"):
        model.denoise(x, t, cache)
    model.start(labels, cache)
    for count, keep in ((3, 2), (1, 1), (4, 0), (2, 2), (3, 1)):
        here = slice(place, place + count)
        out = model.denoise(x[:, here], t[:, here], cache, keep)
        assert (out - whole[:, here]).abs().max() <= 1e-5
        parts.append(out[:, :keep])
        place += keep
        assert cache.length == place
    assert (torch.cat(parts, dim=1) - whole[:, :place]).abs().max() <= 1e-5
    cache.select([1, 1])
    assert cache.labels.tolist() == [1, 1]
    out = model.denoise(x[[1, 1], place:], t[[1, 1], place:], cache)
    assert (out - whole[[1, 1], place:]).abs().max() <= 1e-5
    with pytest.raises(ValueError, match="keep from 0 to 1 but got 2"):
        model.denoise(x[:, :1], t[:, :1], cache, 2)
    with pytest.raises(ValueError, match="N at most 2"):
        model.denoise(x[:, :3], t[:, :3], cache)
    with pytest.raises(ValueError, match="an empty cache but it holds 6 frames"):
        model.start(labels, cache)
    with pytest.raises(ValueError, match="to cache anything, use causal=True"):
        make(causal=False).start(labels, cache)


@torch.no_grad()
def test_equal_times_are_plain_diffusion():
    """All frames together: one solver with one time for everything, as for a single image."""
    for causal in (True, False):
        model = make(causal=causal)
        labels, times = torch.tensor([3, 1]), model.schedule.grid(6, "trailing")
        drawn = generate_frames(model, labels, levels=pyramid_levels(8, 6, 0), times=times, seed=[5, 6])
        x = torch.stack(
            [torch.randn(8, 256, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6)]
        )
        solver = DDIM(model.schedule, model.prediction)
        for t, t_to in pairwise(times):
            x, _ = solver.step(model(x, t.expand(2, 8), labels), x, t, t_to)
        torch.testing.assert_close(drawn, x, rtol=0, atol=1e-5)


def plain_loop(
    model: DiffusionForcing, noise: Tensor, labels: Tensor, group: int, uncertainty: float, steps: int
) -> Tensor:
    """The released sampler from its formulas: groups of frames, every step over the whole window, no cache."""
    bars = model.schedule.alphas_cumprod
    real = torch.linspace(-1, 999, steps + 1).long()
    x, done = noise[:, :0], 0
    while done < noise.shape[1]:
        count = min(group, noise.shape[1] - done)
        x = torch.cat([x, noise[:, done : done + count]], dim=1)
        start = max(0, done + count - model.num_frames)
        height = steps + int((count - 1) * uncertainty) + 1
        table = [
            [0] * done + [min(max(steps + int(i * uncertainty) - m, 0), steps) for i in range(count)]
            for m in range(height)
        ]
        for row, row_to in pairwise(table):
            now, then = real[row][start:], real[row_to][start:]
            read = torch.where(now < 0, model.context_time, now)
            window = x[:, start:].double()
            seen = torch.where((now < 0)[:, None], bars[read].sqrt()[:, None] * window, window)
            x0 = model(seen.float(), read.expand(len(x), -1), labels).double()  # predicts the data
            bar = bars[read][:, None]
            eps = (seen - bar.sqrt() * x0) / (1 - bar).sqrt()
            bar_to = torch.where(then < 0, 1.0, bars[then])[:, None]
            moved = bar_to.sqrt() * x0 + (1 - bar_to).sqrt() * eps
            x = torch.cat([x[:, :start], torch.where((now == then)[:, None], window, moved).float()], 1)
        done += count
    return x


@torch.no_grad()
@pytest.mark.parametrize(
    ("group", "uncertainty", "frames", "causal"),
    [
        (1, 0, 8, True),
        (1, 0, 13, True),
        (2, 0, 13, True),
        (3, 1, 8, True),
        (8, 0, 13, True),
        (8, 1, 8, True),
        (8, 2.5, 8, True),
        (8, 4, 8, True),
        (8, 0, 8, False),
        (8, 1, 8, False),
    ],
)
def test_sampling_equals_the_released_loop_over_whole_windows(group, uncertainty, frames, causal):
    """With a cache, without frames that have not begun, and beyond the frames of training."""
    model = make(causal=causal)
    labels = torch.tensor([3, 10])
    noise = torch.stack(
        [torch.randn(frames, 256, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6)]
    )
    drawn = generate_frames(
        model,
        labels,
        levels=grouped_levels(pyramid_levels(group, 4, uncertainty), frames),
        times=model.schedule.grid(4, "trailing"),
        frames=frames,
        seed=[5, 6],
    )
    assert drawn.std() > 0.1
    expected = plain_loop(model, noise, labels, group, uncertainty, 4)
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_finished_frames_are_shown_with_a_little_noise_that_is_not_there():
    model: Any = make()
    asked: list[tuple[Tensor, Tensor]] = []
    denoise = model.denoise

    def listening(x, t, cache, keep=0):
        asked.append((x.clone(), t.clone()))
        return denoise(x, t, cache, keep)

    model.denoise = listening
    context, labels = torch.randn(2, 3, 256), torch.tensor([3, 1])
    options: Any = {"context": context, "times": model.schedule.grid(4, "trailing"), "seed": 1}
    assert model.context_time == model.config.stabilization - 1 == 9
    for wanted, time in ((None, 9), (0, 0), (40, 40)):
        asked.clear()
        out = generate_frames(model, labels, context_time=wanted, **options)
        assert torch.equal(out[:, :3], context)
        x, t = asked[0]
        assert (t[:, :3] == time).all()
        shrunk = context * model.schedule.alphas_cumprod[time].sqrt().float()
        torch.testing.assert_close(x[:, :3], shrunk)
        # Every finished frame but the last is read once and then lies in the cache; none is read as clean.
        assert sum(int((t[0] == time).sum()) for _, t in asked) == 7
        assert min(int(t.min()) for _, t in asked) >= 0
    asked.clear()
    generate_frames(model, labels, context_time=500, context_noise=True, **options)
    alpha, sigma = (float(part) for part in model.schedule.alpha_sigma(torch.tensor(500)))
    assert (asked[0][0][:, :3] - alpha * context).std().item() == pytest.approx(sigma, rel=0.05)
    with pytest.raises(ValueError, match="context_time from -1 to 999"):
        generate_frames(model, labels, context_time=1000, **options)


class Released(nn.Module):
    """The released transformer on PyTorch's own encoder layers, under the released names."""

    def __init__(self, values: int, size: int, layers: int, heads: int, hidden: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(size, heads, hidden, dropout=0.0)
        self.transformer = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.init_mlp = nn.Sequential(nn.Linear(values + size // 2, size), nn.ReLU(), nn.Linear(size, size))
        self.out = nn.Linear(size, values)
        self.size = size

    def forward(self, x: Tensor, t: Tensor, causal: bool) -> Tensor:
        """Frames first: `[N, B, P]` and `[N, B]`."""

        def waves(places, dim):
            rates = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim // 2 - 1))
            angles = places.double()[..., None] * rates
            return torch.cat([angles.sin(), angles.cos()], -1).float()

        hidden = self.init_mlp(torch.cat([x, waves(t, self.size // 2)], -1))
        hidden = hidden + waves(torch.arange(len(x)), self.size)[:, None]
        mask = nn.Transformer.generate_square_subsequent_mask(len(x)) if causal else None
        return self.out(self.transformer(hidden, mask=mask))


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
def test_published_weights_and_predictions(tmp_path, causal):
    """A checkpoint of the released trainer, tables and statistics of the data and all, loads strictly."""
    small = {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_dim": 64, "causal": causal, "frames": 60}
    released = shaken(Released(20, 32, 2, 2, 64)).eval()
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    bars = (1 - betas).cumprod(0)
    state = {f"diffusion_model.model.{key}": value for key, value in released.state_dict().items()}
    state |= {
        "data_mean": torch.tensor([3.5, 3.25]),
        "data_std": torch.tensor([1.25, 1.5]),
        "diffusion_model.betas": betas.float(),
        "diffusion_model.alphas_cumprod": bars.float(),
        "diffusion_model.snr": (bars / (1 - bars)).float(),
    }
    assert state["diffusion_model.model.transformer.layers.1.self_attn.in_proj_weight"].shape == (96, 32)
    path = tmp_path / "maze2d_medium_x.ckpt"
    torch.save({"state_dict": state, "epoch": 3, "optimizer_states": []}, path)
    model: Any = arcore.create_model("diffusion_forcing_maze2d_medium", weights=path, **small).eval()
    positions = 3 + torch.rand(3, 60, 2, 1, 1)
    x = model.to_frames(positions)
    assert x.shape == (3, 6, 20)
    torch.testing.assert_close(
        x[:, 0, 2:4], (positions[:, 1, :, 0, 0] - state["data_mean"]) / state["data_std"]
    )
    torch.testing.assert_close(model.to_pixels(x), positions)
    t = torch.randint(1000, (3, 6), generator=torch.Generator().manual_seed(0))
    expected = released(x.transpose(0, 1), t.T, causal).transpose(0, 1)
    assert expected.std() > 0.1
    out = model(x, t, torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="its noise schedule is not 'cosine' with 1000 steps"):
        arcore.create_model("diffusion_forcing_maze2d_medium", weights=path, beta_schedule="cosine", **small)
    del state["data_mean"]
    torch.save({"state_dict": state}, path)
    with pytest.raises(ValueError, match=r"1 missing \(mean\)"):
        arcore.create_model("diffusion_forcing_maze2d_medium", weights=path, **small)


@pytest.mark.parametrize(
    ("name", "tokens", "values"),
    [("diffusion_forcing_maze2d_medium", 61, 20), ("diffusion_forcing_maze2d_large", 81, 20)],
)
def test_published_shapes(name, tokens, values):
    with torch.device("meta"):
        model: Any = arcore.create_model(name)
    assert (model.num_frames, model.frame_shape, model.cacheable) == (tokens, (values,), False)
    size = nn.TransformerEncoderLayer(128, 4, 512, device="meta")
    per_layer = sum(parameter.numel() for parameter in size.parameters())
    rest = (20 + 64) * 128 + 128 + 128 * 128 + 128 + 128 * 20 + 20
    assert sum(parameter.numel() for parameter in model.parameters()) == 12 * per_layer + rest


def test_frames_and_videos():
    videos = torch.randn(2, 8, 1, 16, 16)
    model = make()
    assert torch.equal(model.to_pixels(model.to_frames(videos)), videos)
    stacked = make(frame_stack=4)
    assert (stacked.num_frames, stacked.frame_shape) == (2, (1024,))
    assert torch.equal(stacked.to_frames(videos)[:, 1], videos[:, 4:].flatten(1))
    assert torch.equal(stacked.to_pixels(stacked.to_frames(videos)), videos)
    with pytest.raises(ValueError, match="frames a multiple of 4"):
        stacked.to_frames(videos[:, :6])


@torch.no_grad()
def test_the_class_is_a_side_input_and_the_null_class_is_none():
    model = make()
    x, t, labels = batch(model)
    none = torch.full_like(labels, model.null_class)
    assert (model(x, t, labels) != model(x, t, none)).any(dim=2).all()
    model.embed1.weight[:, -10:] = 0
    assert torch.equal(model(x, t, labels), model(x, t, none))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"frame_stack": 3}, "frame_stack to divide the 8 frames but got frame_stack=3"),
        ({"frames": 0}, "frames to be at least 1"),
        ({"embed_dim": 30}, "embed_dim to be a multiple of 4"),
        ({"num_heads": 5}, "multiple of num_heads"),
        ({"num_classes": -1}, "num_classes to be at least 0 but got -1"),
        ({"class_drop": 1.5}, "class_drop to be from 0 to 1"),
        ({"stabilization": 0}, "stabilization to be from 1 to 1000 but got 0"),
        ({"prediction": "score"}, "prediction to be x0, v or eps but got 'score'"),
        ({"loss_weight": "snr"}, "loss_weight to be fused, min_snr or uniform"),
        ({"beta_schedule": "quadratic"}, "beta_schedule to be one of 'linear'"),
    ],
)
def test_bad_configs(overrides, message):
    with pytest.raises(ValueError, match=message):
        make(**overrides)


def test_bad_inputs():
    model = make()
    x, t, labels = batch(model)
    with pytest.raises(ValueError, match=r"frames of shape \('B', 'N', 256\), N at most 8"):
        model(torch.cat([x, x], 1), torch.cat([t, t], 1), labels)
    with pytest.raises(ValueError, match=r"times of shape \(2, 8\)"):
        model(x, t[:, 0], labels)
    with pytest.raises(ValueError, match="t from -1 to 999"):
        model(x, t + 1000, labels)
    with pytest.raises(ValueError, match="class ids from 0 to 10"):
        model(x, t, labels + 20)
    with pytest.raises(TypeError, match="weights' dtype float32 but got bfloat16"):
        model(x.bfloat16(), t, labels)
    with pytest.raises(ValueError, match=r"videos of shape \('B', 'frames', 1, 16, 16\)"):
        model.to_frames(torch.randn(2, 8, 3, 16, 16))


def released_plan(
    model: DiffusionForcing,
    start: Tensor,
    goal: Tensor,
    noise: Tensor,
    horizon: int,
    strength: float,
    steps: int,
) -> Tensor:
    """The released planner of one row from its formulas, tokens in front, noise given."""
    bars, stack = model.schedule.alphas_cumprod, model.config.frame_stack
    start, goal = (start - model.mean) / model.std, (goal - model.mean) / model.std
    tokens = len(noise)
    pad = 0 if model.config.causal else model.num_frames - tokens - 1
    x = torch.cat([start.repeat(stack)[None], noise, torch.zeros(pad, noise.shape[1])])
    real = torch.linspace(-1, 999, steps + 1).long()
    for m in range(steps + tokens - 1):
        row, row_to = (
            [0] + [min(max(steps + i - n, 0), steps) for i in range(tokens)] + [steps] * pad
            for n in (m, m + 1)
        )
        now, then = real[row], real[row_to]
        read = torch.where(now < 0, model.config.stabilization - 1, now)
        bar, bar_to = bars[read].float()[:, None], torch.where(then < 0, 1.0, bars[then]).float()[:, None]
        seen = torch.where((now < 0)[:, None], bar.sqrt() * x, x).requires_grad_()
        x0 = model(seen[None], read[None], torch.zeros(1, dtype=torch.int64))[0]
        places = x0.reshape(-1, 2)
        wanted = torch.cat([start.expand(stack, 2), goal.expand(len(places) - stack, 2)])
        away = torch.tanh((places - wanted).square().sum(1).sqrt() / 2)
        # What its weights are when they are used: those of actions overwrite those of positions.
        weight = torch.tensor([2.0] * stack + [8.0] * (len(places) - stack))
        # The mean runs over a column of distances and one of actions, of which there are none.
        reward = -1000 * torch.stack([away * weight, 0 * away], 1).mean()
        (up,) = torch.autograd.grad(strength * reward, seen)
        eps = (seen - bar.sqrt() * x0) / (1 - bar).sqrt() - (1 - bar_to).sqrt() * up
        x0 = (seen - (1 - bar).sqrt() * eps) / bar.sqrt()
        moved = bar_to.sqrt() * x0 + (1 - bar_to).sqrt() * eps
        x = torch.where((now == then)[:, None], x, moved).detach()
    return x[1 : tokens + 1].reshape(-1, 2)[:horizon] * model.std + model.mean


def planner(causal: bool) -> DiffusionForcing:
    sizes = {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_dim": 48, "frames": 24, "frame_stack": 4}
    model = shaken(arcore.create_model("diffusion_forcing_maze2d_medium", **sizes, causal=causal)).eval()
    model.mean.copy_(torch.tensor([3.5, 3.2]))
    model.std.copy_(torch.tensor([1.3, 1.5]))
    return model


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("horizon", [20, 9, 4])
def test_plans_are_those_of_the_released_planner(causal: bool, horizon: int):
    model = planner(causal)
    start, goal = (
        torch.tensor([[1.0, 1.0], [5.0, 2.0], [3.0, 3.0]]),
        torch.tensor([[6.0, 6.0], [1.0, 4.0], [4.0, 1.0]]),
    )
    found = plan(model, start, goal, horizon=horizon, guidance=0.3, steps=12, seed=[4, 5, 6])
    assert found.shape == (3, horizon, 2)
    tokens = -(-horizon // 4)
    for row in range(3):
        noise = RowNormals(torch.tensor([4 + row])).draw(tokens, 8)[0]
        expected = released_plan(model, start[row], goal[row], noise, horizon, 0.3, 12)
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-4)
    alone = plan(model, start[1:2], goal[1:2], horizon=horizon, guidance=0.3, steps=12, seed=[5])
    torch.testing.assert_close(alone[0], found[1], rtol=1e-5, atol=1e-5)


def test_guidance_changes_plans_and_replanning_goes_on_from_where_it_led():
    model = planner(False)
    start, goal = torch.ones(4, 2), torch.full((4, 2), 6.0)
    free, led = (plan(model, start, goal, guidance=strength, steps=10) for strength in (0.0, 0.5))
    assert (led - free).abs().max() > 0.1
    trapezoid = plan(model, start, goal, steps=10, levels=trapezoid_levels(5, 10, 2))
    assert trapezoid.shape == (4, 20, 2)
    seen: list[Tensor] = []

    def act(here: Tensor, wanted: Tensor) -> Tensor:
        seen.append(here)
        return here + 0.5 * (wanted - here)

    went = replan(model, act, start, goal, every=8, steps=4)
    assert went.shape == (4, 20, 2)
    assert len(seen) == 20
    assert torch.equal(seen[1], went[:, 0])


def test_plans_from_the_command_line(tmp_path, capsys, monkeypatch):
    from arcore.catalog import save_checkpoint
    from arcore.cli import main

    monkeypatch.chdir(tmp_path)
    model = planner(False)
    save_checkpoint("maze", {"model": model}, {})
    model_alone = ["run", "diffusion_forcing", "--weights", "maze"]
    common = [*model_alone, "--start", "1", "1", "--goal", "6", "5"]
    words = [*common, "--horizon", "9", "--steps", "4", "--num", "2", "--seed", "7", "--out", "ways.csv"]
    assert main([*words, "--json", "ways.json"]) == 0
    start, goal = torch.ones(2, 2), torch.tensor([[6.0, 5.0]] * 2)
    expected = plan(model, start, goal, horizon=9, steps=4, seed=[7, 8])
    ways = json.loads(Path("ways.json").read_text())["ways"]
    torch.testing.assert_close(torch.tensor(ways), expected)
    rows = Path("ways.csv").read_text().splitlines()
    assert rows[0] == "way,position,x0,x1"
    assert len(rows) == 1 + 2 * 9
    assert "way 1: 9 positions" in capsys.readouterr().out
    assert main([*words, "--replan", "4", "--json", "again.json"]) == 0
    again = replan(model, lambda here, there: there, start, goal, every=4, horizon=9, steps=4, seed=[7, 8])
    ways = json.loads(Path("again.json").read_text())["ways"]
    torch.testing.assert_close(torch.tensor(ways), again)
    assert not torch.allclose(again, expected)
    assert main([*common, "--guidance", "3", "--steps", "4", "--figure", "way.png"]) == 0
    assert Path("way.png").stat().st_size > 0
    for extra, says in (
        (["--horizon", "21"], "a horizon of at most 20 positions"),
        (["--horizon", "0"], "--horizon must be at least 1"),
        (["--replan", "-1"], "--replan must be at least 1"),
        (["--start", "1", "1", "--goal", "1"], "--goal must be 2 finite numbers"),
        (["--start", "nan", "1", "--goal", "6", "5"], "--start must be a number but got (nan, 1.0)"),
        (["--out", "ways.png"], "--out must be a .csv file"),
        (["--guidance", "nan"], "guidance"),
    ):
        assert main([*(model_alone if "--start" in extra else common), *extra]) == 2
        assert says in capsys.readouterr().err


def test_bad_plans():
    model = planner(False)
    start = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="a horizon of at most 20 positions but got 21"):
        plan(model, start, start, horizon=21)
    with pytest.raises(ValueError, match=r"start and goal of shape \('B', 2\)"):
        plan(model, start, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="levels for 5 tokens, from 8 to 0"):
        plan(model, start, start, steps=8, levels=trapezoid_levels(4, 8, 1))
    with pytest.raises(ValueError, match="expected a model of positions"):
        plan(make(), start, start)
