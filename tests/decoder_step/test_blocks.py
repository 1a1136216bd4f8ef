"""Weights in blocks of 8 and 4 bits: their values written out by hand, and products with them bit by bit."""

from __future__ import annotations

import struct
from typing import Any

import pytest
import torch
from torch import Tensor

from arcore.ops import (
    block_values,
    decoder_step,
    quantise_blocks,
    reference_block_values,
    reference_decoder_step,
)
from arcore.ops._block_values import BLOCK, KINDS
from arcore.ops.decoder_step import MAX_ROWS
from tests.decoder_step.test_decoder_step import copied, double, make, near
from tests.isa import ISAS, run_under

MATRICES = ("qkv", "out", "gate_up", "down")
# All widths are whole blocks; the numbers of rows are odd.
SIZES = {"dim": 96, "heads": 5, "kv_heads": 1, "head_dim": 32, "hidden": 160}


def of_bytes(data: bytes, rows: int = 1) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(rows, 1, -1)


def random_blocks(kind: str, rows: int, columns: int) -> Tensor:
    """Any bytes in the numbers, scales and lowest numbers of ordinary size."""
    blocks = torch.randint(0, 256, (rows, columns // BLOCK, KINDS[kind]), dtype=torch.uint8)
    halves = 2 if kind == "q4_1" else 1
    heads = (torch.randn(rows, columns // BLOCK, halves) * 0.02).half()
    blocks[..., : 2 * halves] = heads.view(torch.uint8)
    return blocks


def test_the_values_of_blocks_are_those_that_were_written() -> None:
    eight = [*range(-16, 15), -128]
    found = block_values(of_bytes(struct.pack("<e32b", 0.125, *eight)))
    assert found.tolist() == [[value / 8 for value in eight]]
    # Byte i: number i is i % 16, number i + 16 is 15 - i % 16.
    pairs = bytes(i | (15 - i) << 4 for i in range(16))
    counted = [*range(16), *range(15, -1, -1)]
    assert block_values(of_bytes(struct.pack("<e", -0.5) + pairs)).tolist() == [
        [(q - 8) / -2 for q in counted]
    ]
    found = block_values(of_bytes(struct.pack("<ee", 0.25, -3.0) + pairs))
    assert found.tolist() == [[q / 4 - 3 for q in counted]]
    assert found.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_the_op_gives_the_values_of_the_reference(kind: str) -> None:
    for rows, columns in ((1, 32), (5, 96), (37, 640), (0, 64)):
        blocks = random_blocks(kind, rows, columns)
        found = block_values(blocks)
        assert found.shape == (rows, columns)
        assert torch.equal(found, reference_block_values(blocks))
    none = torch.empty(3, 0, KINDS[kind], dtype=torch.uint8)
    assert block_values(none).shape == reference_block_values(none).shape == (3, 0)
    strided = random_blocks(kind, 6, 64)[::2]
    assert torch.equal(reference_block_values(strided), block_values(strided.contiguous()))
    # A scale that is the smallest of float16, one that is no number, and an infinite one.
    for scale in (2.0**-24, float("nan"), float("inf")):
        blocks = random_blocks(kind, 2, 64)
        blocks[1, 1, :2] = torch.tensor([scale]).half().view(torch.uint8)
        assert torch.equal(
            block_values(blocks).nan_to_num(7.0), reference_block_values(blocks).nan_to_num(7.0)
        )


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_weights_are_within_half_a_step(kind: str) -> None:
    weight = torch.randn(7, 128) * torch.logspace(-6, 3, 7).unsqueeze(1)
    weight[2, :32] = 0
    weight[3, :32] = 0.25
    blocks = quantise_blocks(weight, kind)
    assert blocks.shape == (7, 4, KINDS[kind])
    assert quantise_blocks(weight[:0], kind).shape == (0, 4, KINDS[kind])
    error = (block_values(blocks) - weight).view(7, 4, BLOCK).abs().amax(-1)
    by_block = weight.view(7, 4, BLOCK)
    if kind == "q4_1":
        step = (by_block.amax(-1) - by_block.amin(-1)) / 15
    else:
        step = by_block.abs().amax(-1) / (127 if kind == "q8_0" else 8)
    # Four bits from -8 to 7: what is as large as the largest on the other side is a step off.
    most = {"q8_0": 0.5, "q4_1": 0.5, "q4_0": 1.0}[kind]
    # Scales and lowest numbers are rounded to float16, below 2^-14 to multiples of 2^-24.
    rounding = 2.0**-11 * by_block.abs().amax(-1) + 2.0**-24 * 128
    assert (error <= most * step + 2 * rounding).all()
    assert (block_values(blocks)[2, :32] == 0).all()
    assert ((block_values(blocks)[3, :32] - 0.25).abs() <= 2.0**-11).all()


def test_blocks_of_blocks_are_the_same() -> None:
    """Numbers that fit blocks exactly come back exactly."""
    blocks = random_blocks("q8_0", 9, 96)
    blocks[..., 2] = 127
    blocks[..., 3:][blocks[..., 3:] == 128] = 129
    assert torch.equal(block_values(quantise_blocks(block_values(blocks), "q8_0")), block_values(blocks))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [*range(1, 10), 16, 17, 23, MAX_ROWS])
def test_products_have_the_bits_of_float32(kind: str, count: int) -> None:
    for rows, columns in ((37, 96), (4, 32), (1, 640)):
        blocks, bias = random_blocks(kind, rows, columns), torch.randn(rows)
        x = torch.randn(count, columns)
        for added in (None, bias):
            found = torch.ops.arcore.linear_step(x, blocks, added)
            assert torch.equal(found, torch.ops.arcore.linear_step(x, reference_block_values(blocks), added))
            exact = x.double() @ reference_block_values(blocks).double().t() + (0 if added is None else added)
            near(found, exact, x.double().abs() @ reference_block_values(blocks).double().abs().t())
            # Alone as among others.
            assert torch.equal(torch.ops.arcore.linear_step(x[-1:], blocks, added), found[-1:])


def in_blocks(inputs: dict[str, Any], kinds: tuple[str | None, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The inputs with weights in blocks, None for floats, and the same as floats."""
    blocks, floats = copied(inputs), copied(inputs)
    for name, kind in zip(MATRICES, kinds, strict=True):
        if kind is not None:
            blocks[name] = quantise_blocks(inputs[name], kind)
            floats[name] = reference_block_values(blocks[name])
    return blocks, floats


@pytest.mark.parametrize("batch", [1, 3, 8, 13])
@pytest.mark.parametrize(
    "kinds", [*((kind,) * 4 for kind in KINDS), ("q8_0", "q4_1", "q4_0", None), (None, "q4_0", None, "q8_0")]
)
def test_a_layer_has_the_bits_of_float32(kinds: tuple[str | None, ...], batch: int) -> None:
    blocks, floats = in_blocks(make(batch=batch, **SIZES), kinds)
    expected = double(floats)
    reference_decoder_step(**expected)
    reference = copied(blocks)
    reference_decoder_step(**reference)
    decoder_step(**floats)
    decoder_step(**blocks)
    for name in ("x", "keys", "values"):
        assert torch.equal(blocks[name], floats[name])
    assert (blocks["x"] - expected["x"]).abs().max() <= 3e-6 * expected["x"].abs().max()
    assert (reference["x"] - blocks["x"]).abs().max() <= 1e-5 * expected["x"].abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_drafts_and_threads_change_no_bit(kind: str) -> None:
    inputs, _ = in_blocks(make(batch=2, room=90, **SIZES), (kind,) * 4)
    inputs["lengths"] = torch.tensor([70, 2])
    inputs["x"] = torch.randn(10, 96)
    angles = inputs["cos"][:1].expand(10, -1).contiguous(), inputs["sin"][:1].expand(10, -1).contiguous()
    inputs["cos"], inputs["sin"] = angles
    together = copied(inputs)
    decoder_step(**together, drafts=5)
    for place in range(5):
        own = [place, 5 + place]
        x = inputs["x"][own].clone()
        alone = {"x": x, "cos": angles[0][own], "sin": angles[1][own], "lengths": inputs["lengths"] + place}
        decoder_step(**{**inputs, **alone})
        assert torch.equal(x, together["x"][own])
    threads = torch.get_num_threads()
    wide = dict(SIZES, dim=512, hidden=1024)
    inputs, _ = in_blocks(make(batch=4, **wide), (kind,) * 4)
    try:
        torch.set_num_threads(2)
        two = decoder_step(**copied(inputs))
        torch.set_num_threads(1)
        assert torch.equal(decoder_step(**inputs), two)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_activations(kind: str) -> None:
    given = make(**SIZES)
    inputs = {
        name: value.bfloat16()
        if isinstance(value, Tensor) and value.is_floating_point() and name not in ("cos", "sin")
        else value
        for name, value in given.items()
    }
    blocks, floats = in_blocks(inputs, (kind,) * 4)
    expected = double(floats)
    reference_decoder_step(**expected)
    decoder_step(**blocks)
    # Only the cache and the result are rounded.
    exact = expected["x"]
    assert (blocks["x"].double() - exact).abs().max() <= 1.5 * 2.0**-8 * exact.abs().max()


def test_a_scale_that_is_no_number_stays_in_its_row() -> None:
    for kind in KINDS:
        blocks = random_blocks(kind, 9, 64)
        blocks[4, 1, :2] = torch.tensor([float("nan")]).half().view(torch.uint8)
        found = torch.ops.arcore.linear_step(torch.randn(3, 64), blocks, None)
        assert found[:, 4].isnan().all()
        assert found[:, [0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()


def test_refuses_what_does_not_fit() -> None:
    blocks = random_blocks("q8_0", 6, 64)
    for wrong, error, message in (
        (torch.zeros(4, 64), TypeError, "a tensor of uint8 but got torch.float32"),
        ([1], TypeError, "a tensor of uint8 but got list"),
        (
            blocks[..., :33],
            ValueError,
            r"S one of 34 \(q8_0\), 18 \(q4_0\), 20 \(q4_1\) but got \[6, 2, 33\]",
        ),
        (blocks.view(12, 34), ValueError, r"but got \[12, 34\]"),
        (blocks[::2], ValueError, "expected blocks to be contiguous"),
    ):
        with pytest.raises(error, match=message):
            block_values(wrong)  # type: ignore[arg-type]
    for weight, kind, error, message in (
        (torch.zeros(4, 64), "q5_0", ValueError, "kind to be one of q8_0, q4_0, q4_1 but got 'q5_0'"),
        (torch.zeros(4, 48), "q8_0", ValueError, r"K a multiple of 32 but got \[4, 48\]"),
        (torch.zeros(64), "q8_0", ValueError, r"but got \[64\]"),
        (torch.zeros(4, 0), "q8_0", ValueError, r"but got \[4, 0\]"),
        (torch.zeros(4, 64, dtype=torch.int32), "q8_0", TypeError, "floats but got torch.int32"),
        (torch.full((4, 64), 1e9), "q8_0", ValueError, "fit float16 but got up to 1e\\+09|1000000000"),
        (torch.full((4, 64), float("nan")), "q4_1", ValueError, "expected finite numbers"),
        (torch.full((4, 64), float("inf")), "q4_0", ValueError, "expected finite numbers"),
    ):
        with pytest.raises(error, match=message):
            quantise_blocks(weight, kind)
    x = torch.randn(2, 64)
    for given, weight, message in (
        (x[:, :32], blocks, r"for a weight of \(6, 2, 34\) in blocks of 32 columns"),
        (
            x,
            blocks[..., :30].contiguous(),
            r"34 \(q8_0\), 18 \(q4_0\) or 20 \(q4_1\) bytes but got \(6, 2, 30\)",
        ),
        (x, blocks[::2], "expected weight to be contiguous"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.arcore.linear_step(given, weight, None)
    inputs, _ = in_blocks(make(**SIZES), ("q8_0",) * 4)
    for change, message in (
        ({"qkv": inputs["qkv"][:-1]}, "qkv"),
        ({"down": inputs["down"][:, :-1].contiguous()}, "down"),
        ({"gate_up": inputs["gate_up"][0]}, "gate_up of shape"),
        ({"out": torch.zeros(96, 160, dtype=torch.uint8)}, "out of bytes, shape"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=message):
            decoder_step(**copied(inputs) | change)


def test_schema_and_fake() -> None:
    blocks = random_blocks("q4_1", 6, 64)
    torch.library.opcheck(torch.ops.arcore.block_values.default, (blocks,))
    torch.library.opcheck(torch.ops.arcore.linear_step.default, (torch.randn(2, 64), blocks, None))
    inputs, _ = in_blocks(make(**SIZES), ("q8_0", "q4_1", "q4_0", "q8_0"))
    order = (
        "x", "norm1", "qkv", "qkv_bias", "out", "out_bias", "norm2", "gate_up", "gate_up_bias", "down", "down_bias",
        "keys", "values", "cos", "sin", "lengths", "num_heads",
    )  # fmt: skip
    torch.library.opcheck(
        torch.ops.arcore.decoder_step.default,
        (*(inputs[name] for name in order), 0, 1e-5),
        test_utils=("test_schema", "test_faketensor"),
    )
    with torch._subclasses.FakeTensorMode() as mode:
        fake = torch.ops.arcore.block_values(mode.from_tensor(blocks))
    assert fake.shape == (6, 64)
    assert fake.dtype == torch.float32


UNDER = """
import torch
import arcore
from arcore.ops import block_values, quantise_blocks, reference_block_values
print(torch.ops.arcore.cpu_isa())
torch.manual_seed(0)
for kind in ("q8_0", "q4_0", "q4_1"):
    for rows, columns in ((37, 96), (5, 32), (2, 1056)):
        blocks = quantise_blocks(torch.randn(rows, columns), kind)
        values = reference_block_values(blocks)
        assert torch.equal(block_values(blocks), values), kind
        for count in (1, 2, 5, 8, 11):
            x = torch.randn(count, columns)
            found = torch.ops.arcore.linear_step(x, blocks, None)
            assert torch.equal(found, torch.ops.arcore.linear_step(x, values, None)), (kind, count)
            exact = x.double() @ values.double().t()
            assert (found.double() - exact).abs().max() <= 1e-6 * exact.abs().max()
"""


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa: str) -> None:
    run_under(isa, UNDER)
