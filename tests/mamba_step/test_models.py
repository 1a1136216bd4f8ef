"""Mamba models write the same tokens with one op per layer as with an op per part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import arcore.zoo.state_space.mamba.model as home
from arcore.nn import quantise
from arcore.ops import mamba_step
from arcore.zoo.state_space.mamba.config import MambaConfig
from arcore.zoo.state_space.mamba.model import Mamba

STEPS = 6


def model(**change: Any) -> Mamba:
    torch.manual_seed(0)
    settings = {"d_model": 64, "n_layer": 3, "vocab_size": 96, **change}
    made = Mamba(MambaConfig(**settings)).eval().requires_grad_(False)
    for layer in made.layers:
        layer.norm.weight.add_(torch.randn_like(layer.norm.weight) * 0.1)
    return made


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each call of the op that models make."""
    found: list[int] = []

    def counted(x: Tensor, **given: Any) -> Tensor:
        found.append(len(x))
        return mamba_step(x, **given)

    monkeypatch.setattr(home, "mamba_step", counted)
    return found


def written(network: Mamba, rows: int, monkeypatch: pytest.MonkeyPatch, with_op: bool) -> tuple[Tensor, Any]:
    """Logits after a prompt and after some more tokens, and the cache at the end."""
    torch.manual_seed(1)
    ids = torch.randint(0, 96, (rows, 5 + STEPS))
    with monkeypatch.context() as patch:
        if not with_op:
            patch.setattr(Mamba, "_plans", lambda *_: {})
        cache = network.make_cache(rows)
        network.prefill(ids[:, :5], cache)
        logits = [network.step(ids[:, 5 + t], cache) for t in range(STEPS)]
    assert cache.lengths == (5 + STEPS,) * rows
    return torch.stack(logits), cache


CASES: dict[str, dict[str, Any]] = {
    "published": {},
    "biases, other sizes": {"bias": True, "d_state": 17, "d_conv": 3, "dt_rank": 5, "expand": 3},
    "no bias at all": {"conv_bias": False},
    "feed-forward networks": {"d_intermediate": 96},
    "attention between": {"attn_layer_idx": (1,), "attn_num_heads": 4, "attn_rotary_dim": 8},
}


@pytest.mark.parametrize("rows", [1, 3, 9])
@pytest.mark.parametrize("case", CASES)
def test_float32(case: str, rows: int, monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    network = model(**CASES[case])
    expected, before = written(network, rows, monkeypatch, False)
    assert not calls
    found, after = written(network, rows, monkeypatch, True)
    assert calls == [rows] * STEPS * (2 if case == "attention between" else 3)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after.ssm, before.ssm, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after.conv, before.conv, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("residual", [True, False])
def test_bfloat16(residual: bool, monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    network = model(residual_in_fp32=residual, d_model=128).bfloat16()
    exact = model(residual_in_fp32=residual, d_model=128).bfloat16().float()
    reference, _ = written(exact, 2, monkeypatch, False)
    separate, _ = written(network, 2, monkeypatch, False)
    assert not calls
    found, cache = written(network, 2, monkeypatch, True)
    assert calls == [2] * STEPS * 3
    assert cache.conv.dtype == torch.bfloat16
    # What lies between the products is not rounded, so the op errs no more than the separate ops.
    error, of_separate = ((x - reference).abs().mean() for x in (found, separate))
    assert error <= 1.1 * of_separate


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_1"])
def test_blocks(kind: str, monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    network = quantise(model(), kind)
    assert isinstance(network, Mamba)
    expected, _ = written(network, 2, monkeypatch, False)
    found, _ = written(network, 2, monkeypatch, True)
    assert calls == [2] * STEPS * 3
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_row_gets_the_same_bits_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    network = model(d_model=128)
    cache, alone = network.make_cache(5), network.make_cache(1)
    states = torch.randn_like(cache.ssm)
    cache.ssm.copy_(states)
    alone.ssm.copy_(states[:, 3:4])
    ids = torch.tensor([3, 1, 4, 1, 5])
    for _ in range(3):
        network.step(ids, cache)
        network.step(ids[3:4], alone)
        assert torch.equal(cache.ssm[:, 3], alone.ssm[:, 0])


class Adapted(nn.Linear):
    """Somebody's adapter."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.sum(-1, keepdim=True)


def test_what_is_not_plain_keeps_its_ways(monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    def adapted(network: Mamba) -> Any:
        network.layers[1].mixer.out_proj = Adapted(128, 64).requires_grad_(False)

    def hooked(network: Mamba) -> Any:
        return network.layers[1].mixer.x_proj.register_forward_hook(lambda _, inputs, out: out + 1)

    def hooked_norm(network: Mamba) -> Any:
        return network.layers[1].norm.register_forward_pre_hook(lambda _, inputs: (inputs[0] + 1,))

    def without_activation(network: Mamba) -> Any:
        network.layers[1].mixer.conv1d.activation = None

    for change in (adapted, hooked, hooked_norm, without_activation):
        torch.manual_seed(2)
        network = model()
        kept = change(network)
        expected, _ = written(network, 2, monkeypatch, False)
        calls.clear()
        found, _ = written(network, 2, monkeypatch, True)
        assert calls == [2] * STEPS * 2, change.__name__  # the two other layers
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        del kept
    for network in (model(rms_norm=False), model().half()):
        calls.clear()
        written(network, 2, monkeypatch, True)
        assert calls == []


def test_where_the_op_has_no_place(calls: list[int]) -> None:
    network, ids = model(), torch.tensor([1, 2])
    cache = network.make_cache(2)
    with torch.autocast("cpu", torch.bfloat16):
        network.step(ids, cache)
    assert calls == []
    many = network.make_cache(65)
    network.step(torch.zeros(65, dtype=torch.int64), many)
    assert calls == []
    with pytest.raises(Exception, match=r"row|batch|expected"):
        network.step(torch.tensor([1, 2, 3]), cache)
    assert calls == []
    network.step(ids, cache)
    assert len(calls) == 3


def test_a_step_compiles(calls: list[int]) -> None:
    network, ids = model(), torch.tensor([1, 2])
    cache, eager = network.make_cache(2), network.make_cache(2)
    compiled = torch.compile(network.step, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(ids, cache), network.step(ids, eager), atol=1e-5, rtol=1e-5)


def test_what_the_embedding_returned_is_not_overwritten() -> None:
    network, ids = model(), torch.tensor([1, 2])
    kept: list[Tensor] = []
    network.embedding.register_forward_hook(lambda _, inputs, out: kept.append(out))
    network.step(ids, network.make_cache(2))
    assert torch.equal(kept[0], network.embedding.weight[ids])
