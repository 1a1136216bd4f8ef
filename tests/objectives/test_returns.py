"""Returns and GAE against plain loops, with ends of episodes, padding and values after the last step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from arcore.objectives import discounted_returns, gae


def batch(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([11, 1, 6, 0])
    return {
        "rewards": torch.randn(4, 11, generator=generator, dtype=torch.float64),
        "values": torch.randn(4, 11, generator=generator, dtype=torch.float64),
        "done": torch.rand(4, 11, generator=generator) < 0.2,
        "mask": torch.arange(11) < lengths[:, None],
        "last": torch.randn(4, generator=generator, dtype=torch.float64),
    }


def loop(b: dict[str, Tensor], discount: float, smoothing: float) -> Tensor:
    out = torch.zeros_like(b["rewards"])
    for row in range(4):
        steps = int(b["mask"][row].sum())
        later, value = 0.0, float(b["last"][row])
        for t in reversed(range(steps)):
            alive = 0.0 if b["done"][row, t] else 1.0
            delta = b["rewards"][row, t] + discount * alive * value - b["values"][row, t]
            later = float(delta) + discount * smoothing * alive * later
            out[row, t], value = later, float(b["values"][row, t])
    return out


@pytest.mark.parametrize(("discount", "smoothing"), [(0.99, 0.95), (1.0, 1.0), (0.9, 0.0), (0.0, 0.5)])
def test_gae_equals_the_loop(discount: float, smoothing: float) -> None:
    b = batch()
    b["rewards"][~b["mask"]] = math.nan
    b["values"][~b["mask"]] = math.nan
    found = gae(**b, discount=discount, smoothing=smoothing)
    known = loop(b, discount, smoothing)
    torch.testing.assert_close(found.advantages, known, rtol=1e-12, atol=1e-12)
    values = torch.where(b["mask"], b["values"], 0.0)
    torch.testing.assert_close(found.returns, known + values, rtol=1e-12, atol=1e-12)


def test_returns_are_advantages_over_no_value() -> None:
    b = batch(1)
    known = loop(b | {"values": torch.zeros(4, 11, dtype=torch.float64), "last": b["last"] * 0}, 0.9, 1.0)
    found = discounted_returns(b["rewards"], discount=0.9, done=b["done"], mask=b["mask"])
    torch.testing.assert_close(found, known, rtol=1e-12, atol=1e-12)
    one = discounted_returns(torch.zeros(1, 3), discount=0.5, last=torch.tensor([8.0]))
    assert one.tolist() == [[1.0, 2.0, 4.0]]


def test_whole_smoothing_is_the_return_less_the_value() -> None:
    b = batch(2)
    found = gae(**b, discount=0.97, smoothing=1.0)
    whole = discounted_returns(b["rewards"], discount=0.97, done=b["done"], mask=b["mask"], last=b["last"])
    torch.testing.assert_close(found.returns, whole, rtol=1e-10, atol=1e-10)


def test_refuses() -> None:
    b = batch()
    with pytest.raises(ValueError, match=r"expected discount to be from 0 to 1 but got 1\.5"):
        discounted_returns(b["rewards"], discount=1.5)
    with pytest.raises(ValueError, match="expected smoothing to be from 0 to 1 but got -1"):
        gae(b["rewards"], b["values"], smoothing=-1)
    with pytest.raises(ValueError, match=r"expected values of rewards's shape \(4, 11\) but got \(4, 10\)"):
        gae(b["rewards"], b["values"][:, 1:])
    with pytest.raises(ValueError, match="it has a gap"):
        gae(b["rewards"], b["values"], mask=~b["mask"])
    with pytest.raises(ValueError, match="expected done bool"):
        gae(b["rewards"], b["values"], done=b["rewards"])
    with pytest.raises(ValueError, match="one value per row"):
        gae(b["rewards"], b["values"], last=b["rewards"])
    broken = b["rewards"].clone()
    broken[2, 3] = torch.nan
    with pytest.raises(ValueError, match=r"gae: expected finite rewards but got nan at \[2, 3\]"):
        gae(broken, b["values"])
    shut = torch.arange(11) < torch.tensor([11, 11, 3, 11]).unsqueeze(1)
    assert gae(broken, b["values"], mask=shut).advantages.isfinite().all()
    with pytest.raises(ValueError, match="expected floating-point rewards"):
        discounted_returns(b["mask"])
