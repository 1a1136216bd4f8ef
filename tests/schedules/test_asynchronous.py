"""Times of frames: the law of the training times against counting, the sampling tables' identities."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise, product

import pytest
import torch

from arcore.schedules import (
    DDIM,
    VPSchedule,
    adaptive_levels,
    fopp_marginals,
    fopp_times,
    grouped_levels,
    pyramid_levels,
    sliding_windows,
    table_times,
    trapezoid_levels,
)


def law_by_counting(frames: int, num_steps: int) -> dict[tuple[int, ...], float]:
    """The sampler's law from its definition: ways to continue are counted by listing all rows."""
    rows = [row for row in product(range(num_steps), repeat=frames) if list(row) == sorted(row)]
    law: dict[tuple[int, ...], float] = {}
    for row in rows:
        for start in range(frames):
            chance = 1 / (frames * num_steps)
            for frame in [*range(start - 1, -1, -1), *range(start + 1, frames)]:
                if frame < start:
                    # Rows of frames 0..frame that end at t.
                    ways = Counter(t[frame] for t in {r[: frame + 1] for r in rows})
                    allowed = {t: n for t, n in ways.items() if t <= row[frame + 1]}
                else:
                    ways = Counter(t[0] for t in {r[frame:] for r in rows})
                    allowed = {t: n for t, n in ways.items() if t >= row[frame - 1]}
                chance *= allowed[row[frame]] / sum(allowed.values())
            law[row] = law.get(row, 0.0) + chance
    return law


def test_drawn_times_follow_their_law():
    law = law_by_counting(3, 4)
    assert sum(law.values()) == pytest.approx(1)
    marginals = torch.zeros(3, 4, dtype=torch.float64)
    for row, chance in law.items():
        for frame, t in enumerate(row):
            marginals[frame, t] += chance
    torch.testing.assert_close(fopp_marginals(3, 4), marginals, rtol=1e-10, atol=1e-12)
    drawn = fopp_times(40000, 3, 4, generator=torch.Generator().manual_seed(0))
    counts = Counter(tuple(row) for row in drawn.tolist())
    assert counts.keys() <= law.keys()
    for row, chance in law.items():
        assert counts[row] / 40000 == pytest.approx(chance, abs=5 * (chance / 40000) ** 0.5)


def test_claim_every_frame_sees_every_time():
    """At least a 1/F share of the even one; uniform over non-decreasing rows the rarest is as good as never drawn."""
    frames, steps = 16, 200
    least = steps * fopp_marginals(frames, steps).min()
    assert least >= 1 / frames
    assert float(least) == pytest.approx(0.0628, abs=2e-4)
    f, t = torch.meshgrid(torch.arange(frames).double(), torch.arange(steps).double(), indexing="ij")

    def log_ways(n, k):
        return torch.lgamma(n + k + 1) - torch.lgamma(n + 1) - torch.lgamma(k + 1)

    uniform = log_ways(t, f) + log_ways(steps - 1 - t, frames - 1 - f)
    uniform = uniform.softmax(dim=1)
    assert steps * uniform.min() < 1e-20


@pytest.mark.parametrize(("frames", "steps"), [(1, 1), (1, 5), (4, 1), (16, 1000)])
def test_times_never_fall_from_frame_to_frame(frames, steps):
    times = fopp_times(64, frames, steps, generator=torch.Generator().manual_seed(1))
    assert times.shape == (64, frames)
    assert (times.diff(dim=1) >= 0).all()
    assert times.min() >= 0
    assert times.max() < steps


@pytest.mark.parametrize(
    ("frames", "steps", "lag"), [(3, 4, 0), (3, 4, 1), (3, 4, 4), (16, 50, 5), (1, 5, 2)]
)
def test_adaptive_levels_follow_the_frame_by_frame_rule(frames, steps, lag):
    levels = adaptive_levels(frames, steps, lag)
    rows, row, waited = [[steps] * frames], [steps] * frames, [i * lag for i in range(frames)]
    while any(row):
        moves = [left and not wait for left, wait in zip(row, waited, strict=True)]
        row = [left - bool(move) for left, move in zip(row, moves, strict=True)]
        waited = [max(0, wait - 1) for wait in waited]
        rows.append(row)
    assert levels.tolist() == rows
    assert len(levels) == steps + (frames - 1) * lag + 1


@pytest.mark.parametrize("steps", [1, 4, 50])
def test_identities_of_the_pyramid(steps):
    frames = 5
    together = pyramid_levels(frames, steps, 0)
    assert torch.equal(together, adaptive_levels(frames, steps, 0))
    one_by_one = pyramid_levels(frames, steps, steps)
    assert torch.equal(one_by_one, adaptive_levels(frames, steps, steps))
    for frame in range(1, frames):
        begun = one_by_one[:, frame] < steps
        assert not one_by_one[begun, frame - 1].any()
    for slope in (0.3, 1, 2.5):
        levels = pyramid_levels(frames, steps, slope)
        falls = -levels.diff(dim=0)
        assert set(falls.unique().tolist()) <= {0, 1}
        assert (levels.diff(dim=1) >= 0).all()
        released = [
            [min(max(steps + int(frame * slope) - row, 0), steps) for frame in range(frames)]
            for row in range(steps + int((frames - 1) * slope) + 1)
        ]
        assert levels.tolist() == released


def test_groups_follow_one_another():
    one_by_one = grouped_levels(pyramid_levels(1, 3, 0), 4)
    assert torch.equal(one_by_one, adaptive_levels(4, 3, 3))
    levels = grouped_levels(pyramid_levels(2, 2, 1), 5)
    assert levels.tolist() == [
        [2, 2, 2, 2, 2],
        [1, 2, 2, 2, 2],
        [0, 1, 2, 2, 2],
        [0, 0, 2, 2, 2],
        [0, 0, 1, 2, 2],
        [0, 0, 0, 1, 2],
        [0, 0, 0, 0, 2],
        [0, 0, 0, 0, 1],
        [0, 0, 0, 0, 0],
    ]
    whole = pyramid_levels(5, 3, 2)
    assert torch.equal(grouped_levels(whole, 5), whole)
    with pytest.raises(ValueError, match="frames >= 1"):
        grouped_levels(whole, 0)


@pytest.mark.parametrize("frames", [1, 2, 5, 6])
@pytest.mark.parametrize("slope", [0, 0.4, 1, 3.5])
def test_a_trapezoid_goes_from_both_ends_inwards(frames, slope):
    steps = 4
    levels = trapezoid_levels(frames, steps, slope)
    assert torch.equal(levels, levels.flip(1))
    assert (levels[0] == steps).all()
    assert (levels[-1] == 0).all()
    assert (levels[-2] != 0).any()
    behind = [int(min(frame, frames - 1 - frame) * slope) for frame in range(frames)]
    for frame, delay in enumerate(behind):
        assert levels[delay:, frame].tolist() == [max(steps - m, 0) for m in range(len(levels) - delay)]
        assert (levels[:delay, frame] == steps).all()
        assert levels[0].tolist() == [steps] * frames
        assert not levels[-1].any()


@pytest.mark.parametrize("lag", [4, 10, 50])
def test_windows_hold_what_moves(lag):
    levels = adaptive_levels(40, 50, lag)
    low, high = sliding_windows(levels, 16)
    assert ((high - low) == 16).all()
    place = torch.arange(40)
    moving = levels[1:] != levels[:-1]
    assert not (moving & ((place < low[:, None]) | (place >= high[:, None]))).any()
    # What has left a window is clean.
    assert not levels[1:][place < low[:, None]].any()


def test_finished_and_waiting_frames_are_copied_bit_for_bit():
    schedule = VPSchedule("scaled_linear")
    solver, grid = DDIM(schedule, "x0"), schedule.grid(4)
    times = table_times(adaptive_levels(3, 4, 2), grid)
    x, data = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    for now, then in pairwise(times):
        before = x
        x, _ = solver.step(data, x, now.expand(2, 3), then.expand(2, 3))
        assert torch.equal(x[:, now == then], before[:, now == then])
    torch.testing.assert_close(x, data)


def test_bad_inputs():
    with pytest.raises(ValueError, match="frames >= 1 but got 0"):
        fopp_times(2, 0, 4)
    with pytest.raises(ValueError, match="lag from 0 to steps=4 but got 5"):
        adaptive_levels(3, 4, 5)
    with pytest.raises(ValueError, match="uncertainty >= 0"):
        pyramid_levels(3, 4, -1)
    with pytest.raises(ValueError, match="at most 16 frames to be on their way at once but got 17"):
        sliding_windows(adaptive_levels(40, 50, 3), 16)
    with pytest.raises(ValueError, match="levels from 0 to 3"):
        table_times(torch.tensor([4]), VPSchedule().grid(3))
