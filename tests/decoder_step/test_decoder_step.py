"""One layer for one token per row: the reference against modules, the op against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from arcore.nn import DecoderLayer, GatedMLP, GroupedAttention, RotaryTable, TokenCache
from arcore.ops import decoder_step, reference_decoder_step
from arcore.ops.decoder_step import MAX_ROWS


def make(
    batch: int = 3, dim: int = 48, heads: int = 6, kv_heads: int = 2, head_dim: int = 16, hidden: int = 80,
    room: int = 70, bias: bool = True, dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:  # fmt: skip
    torch.manual_seed(0)
    rows = (heads + 2 * kv_heads) * head_dim

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype) * 0.3

    lengths = torch.tensor([5, 0, 63, 40, 17, 31, 32, 69])[torch.arange(batch) % 8]
    angles = RotaryTable(head_dim).at(lengths.unsqueeze(1))
    return {
        "x": values(batch, dim),
        "norm1": 1 + values(dim),
        "qkv": values(rows, dim),
        "out": values(dim, heads * head_dim),
        "norm2": 1 + values(dim),
        "gate_up": values(2 * hidden, dim),
        "down": values(dim, hidden),
        "keys": values(batch, kv_heads, room, head_dim),
        "values": values(batch, kv_heads, room, head_dim),
        "cos": angles.cos.view(batch, head_dim).to(dtype),
        "sin": angles.sin.view(batch, head_dim).to(dtype),
        "lengths": lengths,
        "num_heads": heads,
        **({f"{n}_bias": values(s) for n, s in
            (("qkv", rows), ("out", dim), ("gate_up", 2 * hidden), ("down", dim))} if bias else {}),
    }  # fmt: skip


def copied(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()
    }


def double(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in copied(inputs).items()
    }


def near(found: torch.Tensor, exact: torch.Tensor, terms: torch.Tensor | None = None) -> None:
    """float32 sums, whatever their order is; `terms`: the sums of absolute values, where these may cancel."""
    size = exact if terms is None else terms
    assert (found.double() - exact.double()).abs().max() <= 1e-6 * size.abs().max()


CASES = {
    "biases": {},
    "plain": {"bias": False},
    "one row": {"batch": 1},
    "many rows": {"batch": 8},
    "as many as there may be": {"batch": MAX_ROWS},
    "wide heads": {"head_dim": 160, "heads": 2, "kv_heads": 1, "dim": 32},
    "heads that end within a vector": {"head_dim": 24, "heads": 4, "kv_heads": 2},
    "heads narrower than a vector": {"head_dim": 4, "heads": 8, "kv_heads": 4},
    "heads wider than four vectors, and odd": {"head_dim": 100, "heads": 4, "kv_heads": 4},
    "odd sizes": {"dim": 45, "head_dim": 6, "heads": 3, "kv_heads": 1, "hidden": 37},
    "tiny": {"dim": 1, "head_dim": 2, "heads": 1, "kv_heads": 1, "hidden": 1},
    "a key head each": {"heads": 3, "kv_heads": 3, "hidden": 16},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("window", [None, 20])
def test_the_op_gives_the_numbers_of_the_reference(case: str, window: int | None) -> None:
    inputs = make(**CASES[case])  # type: ignore[arg-type]
    expected, found = double(inputs), copied(inputs)
    # Nobody may look behind a row's tokens.
    for b, length in enumerate(inputs["lengths"].tolist()):
        found["keys"][b, :, length:] = found["values"][b, :, length:] = torch.nan
    reference_decoder_step(**expected, window=window)
    assert decoder_step(**found, window=window) is found["x"]
    near(found["x"], expected["x"])
    for b, length in enumerate(inputs["lengths"].tolist()):
        for name in ("keys", "values"):
            torch.testing.assert_close(
                found[name][b, :, : length + 1].double(),
                expected[name][b, :, : length + 1],
                atol=1e-5,
                rtol=1e-5,
            )


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_storage_alone(case: str) -> None:
    inputs = make(**CASES[case])  # type: ignore[arg-type]
    angles = ("cos", "sin")
    found = {
        name: value.bfloat16()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and name not in angles
        else value
        for name, value in copied(inputs).items()
    }
    expected = double(found)
    reference_decoder_step(**expected)
    decoder_step(**found)
    # The new keys and values, and x at the end, are rounded; nothing else.
    scale = expected["x"].abs().max().item()
    assert (found["x"].double() - expected["x"]).abs().max() <= 1.5 * 2.0**-8 * scale
    for b, length in enumerate(inputs["lengths"].tolist()):
        for name in ("keys", "values"):
            exact = expected[name][b, :, : length + 1]
            assert (
                found[name][b, :, : length + 1].double() - exact
            ).abs().max() <= 2.0**-8 * exact.abs().max()
    with pytest.raises(RuntimeError, match="expected qkv of dtype bfloat16, as x, but got Float"):
        decoder_step(**found | {"qkv": inputs["qkv"]})


def test_the_reference_is_a_layer_of_modules() -> None:
    inputs = make(batch=1, bias=False)
    layer = DecoderLayer(
        48,
        attention=GroupedAttention(48, num_heads=6, num_kv_heads=2, head_dim=16),
        mlp=GatedMLP(48, 80),
    )
    with torch.no_grad():
        for module, name in (
            (layer.norm1, "norm1"), (layer.attention.qkv, "qkv"), (layer.attention.out, "out"),
            (layer.norm2, "norm2"), (layer.mlp.gate_up, "gate_up"), (layer.mlp.down, "down"),
        ):  # fmt: skip
            module.weight.copy_(inputs[name])
        cache = TokenCache(num_layers=1, batch=1, num_heads=2, max_length=20, head_dim=16)
        table = RotaryTable(16)
        from arcore.masks import causal

        before = torch.randn(1, 5, 48)
        layer(before, table.span(0, 5, torch.device("cpu")), causal(5), cache, 0)
        cache.commit(5)
        expected = layer(
            inputs["x"].unsqueeze(1), table.span(5, 6, torch.device("cpu")), causal(1, 5), cache, 0
        )
        keys, values = cache.layer(0)
        reference_decoder_step(**{**inputs, "keys": keys, "values": values})
        torch.testing.assert_close(inputs["x"], expected[:, 0], atol=1e-5, rtol=1e-5)
        assert layer.fits_step()


def test_a_row_does_not_depend_on_the_others_or_on_threads() -> None:
    inputs = make(batch=8)
    whole = copied(inputs)
    decoder_step(**whole)
    for b in range(8):
        one = {
            name: value[b : b + 1].clone()
            if name in ("x", "keys", "values", "cos", "sin", "lengths")
            else value
            for name, value in inputs.items()
        }
        assert torch.equal(decoder_step(**one)[0], whole["x"][b])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        again = copied(make(batch=8, dim=512, hidden=1024))
        two = decoder_step(**copied(again))
        torch.set_num_threads(1)
        assert torch.equal(decoder_step(**again), two)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [*range(1, 18), 23, 24, 25, MAX_ROWS])
@pytest.mark.parametrize("odd", [0, 3])
def test_the_number_of_rows_changes_no_bit(count: int, dtype: torch.dtype, odd: int) -> None:
    # Widths that are no multiples of a line, of a panel of rows, or of the rows that are read side by side.
    given = make(batch=MAX_ROWS, dim=80 + odd, hidden=112 + odd, kv_heads=3)
    inputs = {
        name: value.to(dtype)
        if isinstance(value, torch.Tensor) and value.is_floating_point() and name not in ("cos", "sin")
        else value
        for name, value in given.items()
    }
    own = ("x", "keys", "values", "cos", "sin", "lengths")
    whole = copied(inputs)
    decoder_step(**whole)
    some = {name: value[-count:].clone() if name in own else value for name, value in inputs.items()}
    assert torch.equal(decoder_step(**some), whole["x"][-count:])
    weight, bias = inputs["qkv"][:47], inputs["qkv_bias"][:47]
    product = torch.ops.arcore.linear_step(inputs["x"], weight, bias)
    few = torch.ops.arcore.linear_step(inputs["x"][-count:], weight, bias)
    assert torch.equal(few, product[-count:])
    exact = torch.nn.functional.linear(inputs["x"].double(), weight.double(), bias.double())
    allowed = 2.0**-8 if dtype == torch.bfloat16 else 1e-6
    assert (product.double() - exact).abs().max() <= allowed * exact.abs().max()


def test_refuses_what_does_not_fit() -> None:
    for change, message in (
        ({"x": torch.zeros(3, 40)}, "norm1|dim"),
        ({"qkv": torch.zeros(4, 48)}, "qkv"),
        ({"down": torch.zeros(48, 79)}, "down"),
        ({"lengths": torch.tensor([5, 0, 70])}, "lengths from 0 to 69"),
        ({"lengths": torch.tensor([5, 0, -1])}, "lengths from 0 to 69"),
        ({"lengths": torch.tensor([5, 0])}, "lengths"),
        ({"num_heads": 5}, "multiple of kv_heads"),
        ({"x": torch.zeros(3, 48, dtype=torch.float64)}, "float32"),
        ({"cos": torch.zeros(2, 16)}, "cos"),
        ({"gate_up": torch.zeros(160, 96)[:, ::2]}, "contiguous"),
    ):
        with pytest.raises(RuntimeError, match=message):
            decoder_step(**make() | change)
    with pytest.raises(RuntimeError, match=f"at most {MAX_ROWS} rows"):
        decoder_step(**make(batch=MAX_ROWS + 1))
    with pytest.raises(RuntimeError, match="head_dim to be even but got 5"):
        decoder_step(**make(head_dim=16) | {n: torch.zeros(3, 2, 70, 5) for n in ("keys", "values")})
    inputs = make()
    inputs["qkv"].requires_grad_(True)
    with pytest.raises(RuntimeError, match="no gradient"):
        decoder_step(**inputs)


def test_the_schema_says_what_is_written() -> None:
    inputs = make()
    order = (
        "x", "norm1", "qkv", "qkv_bias", "out", "out_bias", "norm2", "gate_up", "gate_up_bias", "down", "down_bias",
        "keys", "values", "cos", "sin", "lengths", "num_heads",
    )  # fmt: skip
    torch.library.opcheck(
        torch.ops.arcore.decoder_step.default,
        (*(inputs[name] for name in order), 0, 1e-5),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("texts", [1, 3])
@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("length", [0, 5, 40])
def test_drafts_of_a_text_see_the_text_and_their_ancestors(texts: int, tree: bool, length: int) -> None:
    parents = [-1, 0, 0, 1, 2] if tree else [-1, 0, 1, 2, 3]
    inputs = make(batch=texts, room=60)
    inputs["lengths"] = torch.tensor([length, 3, 17][:texts])
    words, depth = [], []
    for i, parent in enumerate(parents):
        words.append((words[parent] if parent >= 0 else 0) | 1 << i)
        depth.append(depth[parent] + 1 if parent >= 0 else 0)
    rows = 5 * texts
    positions = (inputs["lengths"].unsqueeze(1) + torch.tensor(depth)).view(rows, 1)
    angles = RotaryTable(16).at(positions)
    inputs["cos"], inputs["sin"] = angles.cos.view(rows, 16), angles.sin.view(rows, 16)
    inputs["x"] = torch.randn(rows, 48) * 0.3
    seen = torch.tensor(words * texts) if tree else None
    expected, found = double(inputs), copied(inputs)
    for text, count in enumerate(inputs["lengths"].tolist()):
        found["keys"][text, :, count:] = found["values"][text, :, count:] = torch.nan
    reference_decoder_step(**expected, drafts=5, seen=seen)
    decoder_step(**found, drafts=5, seen=seen)
    near(found["x"], expected["x"])
    # A path through the drafts, one token at a time behind what is there, gives the same numbers.
    path = [0, 2, 4] if tree else [0, 1, 2, 3, 4]
    alone = copied(inputs)
    for place, node in enumerate(path):
        own = [text * 5 + node for text in range(texts)]
        x = inputs["x"][own].clone()
        more = {
            "x": x,
            "cos": alone["cos"][own],
            "sin": alone["sin"][own],
            "lengths": inputs["lengths"] + place,
        }
        decoder_step(**{**alone, **more})
        assert torch.equal(x, found["x"][own])


@pytest.mark.parametrize("window", [1, 3, 9, 90])
def test_a_window_may_begin_within_the_drafts(window: int) -> None:
    inputs = make(batch=2, room=90)
    inputs["lengths"] = torch.tensor([70, 2])
    inputs["x"] = torch.randn(10, 48) * 0.3
    angles = RotaryTable(16).at((inputs["lengths"].unsqueeze(1) + torch.arange(5)).view(10, 1))
    inputs["cos"], inputs["sin"] = angles.cos.view(10, 16), angles.sin.view(10, 16)
    expected, found = double(inputs), copied(inputs)
    reference_decoder_step(**expected, drafts=5, window=window)
    decoder_step(**found, drafts=5, window=window)
    near(found["x"], expected["x"])


@pytest.mark.parametrize("seen", [False, True])
def test_as_many_drafts_as_there_may_be(seen: bool) -> None:
    inputs = make(batch=1, room=70)
    inputs["lengths"] = torch.tensor([5])
    inputs["x"] = torch.randn(MAX_ROWS, 48) * 0.3
    angles = RotaryTable(16).at((5 + torch.arange(MAX_ROWS)).view(MAX_ROWS, 1))
    inputs["cos"], inputs["sin"] = angles.cos.view(MAX_ROWS, 16), angles.sin.view(MAX_ROWS, 16)
    # All before itself: the last one's word has every bit.
    words = torch.tensor([(2 << t) - 1 if t < 63 else -1 for t in range(MAX_ROWS)])
    expected, found = double(inputs), copied(inputs)
    reference_decoder_step(**expected, drafts=MAX_ROWS)
    decoder_step(**found, drafts=MAX_ROWS, seen=words if seen else None)
    near(found["x"], expected["x"])


def test_drafts_that_do_not_fit_are_refused() -> None:
    inputs = make(batch=2, room=8)
    inputs["lengths"] = torch.tensor([2, 3])
    inputs["x"], cos, sin = torch.randn(4, 48), inputs["cos"][:1], inputs["sin"][:1]
    inputs |= {"cos": cos, "sin": sin}
    for change, complaint in (
        ({"drafts": 3}, "drafts of at least 1 that divide the rows of x but got 3 for 4"),
        ({"drafts": 2, "lengths": torch.tensor([2, 7])}, "expected lengths from 0 to 6"),
        ({"drafts": 2, "seen": torch.tensor([1, 3, 1, 1])}, r"expected seen\[3\] to have the bit 1"),
        ({"drafts": 2, "seen": torch.tensor([1, 3, 1, 6])}, r"expected seen\[3\] to have the bit 1"),
        ({"drafts": 2, "seen": torch.tensor([1, 3, 1, 2]), "window": 4}, "no window together with seen"),
        ({"drafts": 2, "seen": torch.tensor([1, 3])}, "seen"),
    ):
        with pytest.raises(RuntimeError, match=complaint):
            decoder_step(**{**copied(inputs), **change})
