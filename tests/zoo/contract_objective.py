"""What every objective must do. A system's test file has a class `Contract` like `ClippedRatio` below."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from .conftest import contracts

Batch = dict[str, Tensor]


class ClippedRatio:
    """A test double: the clipped importance ratio of policy-gradient methods, mean over tokens.

    A contract of an objective has a `batch(seed)` of float64 tensors whose first dimension counts rows, the names of
    those it `learns`, the `loss(batch)`, a plain `reference(batch)` in float64, `special_case()` (our loss and the
    known one), `padded(batch)` (the same rows, longer), and `tolerance`, relative to the largest gradient.
    """

    learns = ("logprobs",)
    tolerance = 1e-12

    def batch(self, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        old = -torch.rand(4, 6, generator=generator, dtype=torch.float64)
        new = old + 0.3 * torch.randn(4, 6, generator=generator, dtype=torch.float64)
        lengths = torch.tensor([6, 1, 4, 3])
        return {
            "logprobs": new,
            "old": old,
            "advantages": torch.randn(4, generator=generator, dtype=torch.float64),
            "mask": torch.arange(6) < lengths[:, None],
        }

    def loss(self, batch: Batch, clip: float = 0.2) -> Tensor:
        ratio = (batch["logprobs"] - batch["old"]).exp()
        gain = batch["advantages"][:, None]
        value = torch.minimum(ratio * gain, ratio.clamp(1 - clip, 1 + clip) * gain)
        return -value.masked_fill(~batch["mask"], 0.0).sum() / batch["mask"].sum()

    def reference(self, batch: Batch) -> Tensor:
        total, count = torch.zeros((), dtype=torch.float64), 0
        for row in range(len(batch["mask"])):
            for place in range(batch["mask"].shape[1]):
                if batch["mask"][row, place]:
                    ratio = torch.exp(batch["logprobs"][row, place] - batch["old"][row, place])
                    gain = batch["advantages"][row]
                    clipped = 0.8 if ratio < 0.8 else 1.2 if ratio > 1.2 else ratio
                    total = total - min(ratio * gain, clipped * gain)
                    count += 1
        return total / count

    def special_case(self) -> tuple[Tensor, Tensor]:
        """Without a limit it is the importance-weighted advantage."""
        batch = self.batch(3)
        ratio = (batch["logprobs"] - batch["old"]).exp()
        known = -(ratio * batch["advantages"][:, None])[batch["mask"]].mean()
        return self.loss(batch, clip=torch.inf), known

    def padded(self, batch: Batch) -> Batch:
        wide = {name: torch.nn.functional.pad(batch[name], (0, 3), value=7.0) for name in ("logprobs", "old")}
        return batch | wide | {"mask": torch.nn.functional.pad(batch["mask"], (0, 3))}


@pytest.fixture(params=contracts("objective", ClippedRatio))
def contract(request: pytest.FixtureRequest) -> Any:
    return request.param()


def gradients(contract: Any, function: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    leaves = {name: batch[name].clone().requires_grad_() for name in contract.learns}
    loss = function(batch | leaves)
    loss.backward()
    return loss.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def close(contract: Any, ours: Tensor, theirs: Tensor) -> bool:
    return bool((ours - theirs).abs().max() <= contract.tolerance * theirs.abs().max().clamp(min=1e-30))


@pytest.mark.parametrize("seed", [0, 1])
def test_gradient_equals_a_plain_float64_reference(contract: Any, seed: int) -> None:
    batch = contract.batch(seed)
    loss, ours = gradients(contract, contract.loss, batch)
    known, theirs = gradients(contract, contract.reference, batch)
    assert close(contract, loss, known)
    for name in contract.learns:
        assert theirs[name].any()
        assert close(contract, ours[name], theirs[name]), name


def test_reduces_to_its_special_case(contract: Any) -> None:
    ours, known = contract.special_case()
    assert close(contract, ours, known)


def test_padding_changes_nothing(contract: Any) -> None:
    batch = contract.batch(2)
    padded = contract.padded(batch)
    assert any(padded[name].shape != batch[name].shape for name in batch)
    loss, plain = gradients(contract, contract.loss, batch)
    again, wide = gradients(contract, contract.loss, padded)
    assert close(contract, again, loss)
    for name in contract.learns:
        same = wide[name][tuple(slice(0, size) for size in plain[name].shape)]
        assert close(contract, same, plain[name])
        assert wide[name].abs().sum() == pytest.approx(same.abs().sum().item(), rel=1e-9)


def test_the_order_of_rows_changes_nothing(contract: Any) -> None:
    batch = contract.batch(4)
    order = torch.randperm(len(next(iter(batch.values()))), generator=torch.Generator().manual_seed(0))
    loss, plain = gradients(contract, contract.loss, batch)
    again, mixed = gradients(contract, contract.loss, {name: value[order] for name, value in batch.items()})
    assert close(contract, again, loss)
    for name in contract.learns:
        assert close(contract, mixed[name], plain[name][order])
