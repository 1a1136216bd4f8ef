"""Weights in blocks where weights in floats stand: the same numbers everywhere, nothing written, text unchanged."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import arcore
from arcore.decoding import LookupDrafter, generate, speculative_chain
from arcore.nn import BlockWeight, Linear, linear, quantise
from arcore.nn.linear import BLOCK_ROWS
from arcore.ops import quantise_blocks
from arcore.ops._block_values import KINDS


def weight_of(kind: str, rows: int = 37, columns: int = 96) -> BlockWeight:
    return BlockWeight(quantise_blocks(torch.randn(rows, columns), kind))


@pytest.mark.parametrize("kind", KINDS)
def test_ops_of_torch_get_the_numbers(kind: str) -> None:
    weight = weight_of(kind)
    values = weight.expanded()
    assert type(values) is torch.Tensor
    assert (weight.shape, weight.dtype, weight.kind) == (values.shape, torch.float32, kind)
    assert torch.equal(weight + 1, values + 1)
    assert torch.equal(weight[3:5], values[3:5])
    assert torch.equal(weight.t().contiguous(), values.t())
    assert torch.equal(weight.float(), values)
    ids = torch.tensor([[3, 0], [36, 3]])
    assert torch.equal(F.embedding(ids, weight), values[ids])
    x = torch.randn(2, 96, requires_grad=True)
    F.linear(x, weight).square().sum().backward()
    expected = torch.autograd.grad(F.linear(x, values).square().sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)
    assert "kind='" + kind in repr(weight)


def test_blocks_stay_blocks_where_they_can() -> None:
    weight = weight_of("q4_1")
    for same in (
        weight.detach(),
        weight.clone(),
        copy.deepcopy(weight),
        nn.Parameter(weight, requires_grad=False),
    ):
        assert isinstance(same, BlockWeight)
        assert torch.equal(same.blocks, weight.blocks)
    assert torch.equal(weight.new_zeros(2, 3), torch.zeros(2, 3))
    half = weight.to(torch.bfloat16)
    assert isinstance(half, BlockWeight)
    assert half.new_full((2,), 7.0).dtype == torch.bfloat16
    assert half.dtype == torch.bfloat16
    assert torch.equal(half.expanded(), weight.expanded().bfloat16())
    both = torch.cat([weight, weight_of("q4_1", rows=4)])
    assert isinstance(both, BlockWeight)
    assert both.shape == (41, 96)
    assert torch.equal(both[:37], weight.expanded())
    mixed = torch.cat([weight, weight_of("q8_0", rows=4)])
    assert type(mixed) is torch.Tensor
    layer = nn.Linear(96, 37, bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    assert layer.to(torch.bfloat16).weight.dtype == torch.bfloat16
    assert isinstance(layer.weight, BlockWeight)
    assert torch.equal(layer.weight.blocks, weight.blocks)


def test_nothing_is_written_into_blocks() -> None:
    weight = weight_of("q8_0")
    before = weight.expanded()
    with torch.no_grad():
        for write in (lambda: weight.zero_(), lambda: weight.copy_(before), lambda: weight.add_(1)):
            with pytest.raises(RuntimeError, match="weight in q8_0 blocks, which is read only"):
                write()
        held = torch.zeros(37, 96)
        held.copy_(weight)
    assert torch.equal(held, before)
    assert torch.equal(weight.expanded(), before)
    with pytest.raises(TypeError, match=r"uint8 but got torch\.float32"):
        BlockWeight(torch.zeros(3, 1, 34))
    with pytest.raises(TypeError, match=r"dtype of floats but got torch\.int8"):
        BlockWeight(weight.blocks, torch.int8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(96,), (1, 96), (2, 3, 96), (BLOCK_ROWS, 96), (BLOCK_ROWS + 1, 96), (0, 96)]
)
@torch.no_grad()
def test_linear(
    kind: str, dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["arcore.nn.linear"], "EXPANDED", 10 * 96)
    weight = weight_of(kind).to(dtype)
    x, bias = torch.randn(shape).to(dtype), torch.randn(37).to(dtype)
    for added in (None, bias):
        found = linear(x, weight, added)
        exact = F.linear(
            x.double(), weight.to(torch.float32).double(), None if added is None else added.double()
        )
        assert found.dtype == dtype
        assert found.shape == exact.shape
        if exact.numel():
            allowed = 2.0**-7 if dtype == torch.bfloat16 else 1e-6
            assert (found.double() - exact).abs().max() <= allowed * exact.abs().max()
    transposed = torch.randn(96, 5).to(dtype).t()
    torch.testing.assert_close(linear(transposed, weight), linear(transposed.contiguous(), weight))
    with pytest.raises(ValueError, match=r"x with 96 values in its last axis but got \(2, 64\)"):
        linear(torch.randn(2, 64).to(dtype), weight)


def test_linear_with_gradients_and_compiled() -> None:
    weight = weight_of("q8_0")
    x = torch.randn(3, 96, requires_grad=True)
    linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.expanded().sum(0).expand(3, -1))
    layer = quantise(Linear(96, 37), "q4_0")
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        y = torch.randn(4, 96)
        torch.testing.assert_close(compiled(y), layer(y))


def test_quantise() -> None:
    model = arcore.create_model("llama_tiny", tie_embeddings=True)
    before = sum(p.nbytes for p in model.parameters())
    assert quantise(model, "q8_0") is model
    after = sum((p.blocks if isinstance(p, BlockWeight) else p).nbytes for p in model.parameters())
    # 34 bytes for 32 floats; the feed-forward network's width 344 is no multiple of 32.
    assert after < 0.55 * before
    layer = model.layers[0]  # type: ignore[index]
    assert isinstance(layer.mlp.gate_up.weight, BlockWeight)
    assert type(layer.mlp.down.weight) is nn.Parameter
    assert not layer.mlp.gate_up.weight.requires_grad
    assert model.head_weight is model.embedding.weight  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="one of q8_0, q4_0, q4_1 but got 'int8'"):
        quantise(model, "int8")
    with pytest.raises(ValueError, match="multiple of 32 inputs but Linear has none"):
        quantise(nn.Linear(5, 5), "q8_0")
    wrong = nn.Sequential(nn.Linear(32, 3))
    with torch.no_grad():
        wrong[0].weight[0, 0] = torch.nan  # type: ignore[operator,index]
    with pytest.raises(ValueError, match=r"^0\.weight: .*expected finite"):
        quantise(wrong, "q8_0")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("preset", ["llama_tiny", "mamba_tiny"])
@torch.no_grad()
def test_text_is_that_of_the_expanded_model(kind: str, preset: str) -> None:
    model = quantise(arcore.create_model(preset).eval(), kind)
    floats = arcore.create_model(preset).eval()
    floats.load_state_dict(
        {k: v.expanded() if isinstance(v, BlockWeight) else v for k, v in model.state_dict().items()}
    )
    prompts = [list(b"in the beginning "), list(b"and ")]
    settings = {"max_new_tokens": 30, "temperature": 0.0}
    text = generate(model, prompts, **settings).rows()
    assert text == generate(floats, prompts, **settings).rows()
    if preset == "llama_tiny":
        assert speculative_chain(model, LookupDrafter(), prompts, **settings).rows() == text
    ids = torch.randint(0, 256, (2, 50))
    expected = floats(ids)
    assert (model(ids) - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def test_one_op_reads_a_layer_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    from arcore.nn import causal

    own = causal.decoder_step
    monkeypatch.setattr(causal, "decoder_step", lambda *a, **k: calls.append(k["qkv"].dtype) or own(*a, **k))
    model = quantise(arcore.create_model("llama_tiny").eval(), "q4_1")
    generate(model, [[1, 2, 3]], max_new_tokens=2, temperature=0.0)
    assert calls
    assert set(calls) == {torch.uint8}
    half = model.to(torch.bfloat16)
    assert generate(half, [[1, 2, 3]], max_new_tokens=2, temperature=0.0).ids.shape == (1, 2)
    assert isinstance(half.layers[0].attention.qkv.weight, BlockWeight)  # type: ignore[index]


def test_a_checkpoint_has_the_floats(tmp_path: Path) -> None:
    model = quantise(arcore.create_model("llama_tiny").eval(), "q4_0")
    arcore.models.save_pretrained(model, tmp_path / "m")
    again = arcore.models.from_pretrained(tmp_path / "m")
    for name, value in again.state_dict().items():
        assert type(value) is torch.Tensor
        held = model.state_dict()[name]
        assert torch.equal(value, held.expanded() if isinstance(held, BlockWeight) else held)


@pytest.mark.parametrize("kind", KINDS)
def test_inference_mode_keeps_the_blocks(kind: str) -> None:
    """Ops such as `to` arrive there as a whole, not taken apart."""
    weight = BlockWeight(quantise_blocks(torch.randn(6, 64), kind))
    with torch.inference_mode():
        fresh = BlockWeight(quantise_blocks(torch.randn(6, 64), kind))
        for one in (weight, fresh):
            for moved in (
                one.to(torch.bfloat16),
                one.half(),
                one.to("cpu", torch.float32),
                one.float(),
                one.cpu(),
            ):
                assert isinstance(moved, BlockWeight)
                assert moved.kind == kind
            assert one.to(torch.bfloat16).dtype == torch.bfloat16
            assert torch.equal(one.to(torch.bfloat16).expanded(), one.expanded().bfloat16())
            for view in (
                torch.t,
                torch.detach,
                lambda w: w[1:3],
                lambda w: w[0],
                lambda w: w.view(-1),
                lambda w: w.chunk(2)[1],
            ):
                assert torch.equal(view(one), view(one.expanded()))
            x = torch.randn(3, 64)
            torch.testing.assert_close(x @ one.t(), x @ one.expanded().t())
            torch.testing.assert_close(torch.nn.functional.linear(x, one), x @ one.expanded().t())
        layer = torch.nn.Linear(64, 6, bias=False)
        layer.weight = torch.nn.Parameter(fresh, requires_grad=False)
        assert isinstance(layer.to(torch.bfloat16).weight, BlockWeight)
