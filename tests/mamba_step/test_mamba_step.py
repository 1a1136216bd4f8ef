"""One Mamba layer for one token per row: the reference against modules, the op against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from arcore.nn import MambaMixer, RMSNorm, StateCache
from arcore.ops import mamba_step, quantise_blocks, reference_block_values, reference_mamba_step
from arcore.ops._block_values import KINDS
from arcore.ops.mamba_step import MAX_ROWS
from tests.isa import ISAS, run_under

MATRICES = ("in_proj", "x_proj", "dt_proj", "out_proj")
OWN = ("x", "conv_state", "state")
ORDER = (
    "x", "norm", "in_proj", "in_bias", "conv_weight", "conv_bias", "x_proj", "dt_proj", "dt_bias", "A", "D", "out_proj",
    "out_bias", "conv_state", "state",
)  # fmt: skip


def make(
    batch: int = 3, dim: int = 48, inner: int = 96, rank: int = 3, states: int = 16, taps: int = 4, bias: bool = True
) -> dict[str, Any]:  # fmt: skip
    torch.manual_seed(0)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape) * 0.3

    sizes = {"in_bias": 2 * inner, "conv_bias": inner, "dt_bias": inner, "out_bias": dim}
    return {
        "x": values(batch, dim),
        "norm": 1 + values(dim),
        "in_proj": values(2 * inner, dim),
        "conv_weight": values(inner, taps),
        "x_proj": values(rank + 2 * states, inner),
        "dt_proj": values(inner, rank),
        "A": -0.1 - 4 * torch.rand(inner, states),
        "D": values(inner),
        "out_proj": values(dim, inner),
        "conv_state": values(batch, taps - 1, inner),
        "state": values(batch, inner, states),
        **({name: values(size) for name, size in sizes.items()} if bias else {}),
    }


def copied(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() for name, value in inputs.items()}


def double(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.double() if value.is_floating_point() else value for name, value in copied(inputs).items()
    }


def in_bfloat16(inputs: dict[str, Any], but: tuple[str, ...] = ()) -> dict[str, Any]:
    """All but the state, which is float32 always."""
    return {n: t.clone() if n in ("state", *but) else t.bfloat16() for n, t in inputs.items()}


def near(found: Tensor, exact: Tensor, by: float = 2e-6) -> None:
    """float32 sums, whatever their order is."""
    assert found.shape == exact.shape
    assert (found.double() - exact.double()).abs().max() <= by * exact.abs().max()


CASES = {
    "biases": {},
    "plain": {"bias": False},
    "one row": {"batch": 1},
    "nine rows": {"batch": 9},
    "as many as there may be": {"batch": MAX_ROWS},
    "odd sizes": {"dim": 45, "inner": 37, "rank": 1, "states": 1, "taps": 2},
    "states that end within a vector": {"inner": 131, "states": 17, "rank": 17, "taps": 5, "batch": 2},
    "half a vector of states": {"inner": 24, "states": 8, "rank": 8, "taps": 3},
    "several slices, the last one of one channel": {"inner": 257, "rank": 16, "batch": 9},
    "all states": {"inner": 20, "states": 256, "batch": 2},
    "all taps": {"taps": 8},
    "tiny": {"dim": 1, "inner": 1, "rank": 1, "states": 1, "taps": 2, "batch": 1},
}


@pytest.mark.parametrize("case", CASES)
def test_the_op_gives_the_numbers_of_the_reference(case: str) -> None:
    inputs = make(**CASES[case])  # type: ignore[arg-type]
    expected, found = double(inputs), copied(inputs)
    for _ in range(3):
        reference_mamba_step(**expected)
        assert mamba_step(**found) is found["x"]
    for name in OWN:
        near(found[name], expected[name], 5e-6)


def test_no_rows() -> None:
    inputs = make(batch=0)
    assert mamba_step(**inputs).shape == (0, 48)
    assert reference_mamba_step(**inputs).shape == (0, 48)


@pytest.mark.parametrize("but", [(), ("x",), ("x", "conv_state"), ("in_proj", "D", "conv_weight")])
@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_storage_alone(case: str, but: tuple[str, ...]) -> None:
    found = in_bfloat16(make(**CASES[case]), but)  # type: ignore[arg-type]
    expected = double(found)
    reference_mamba_step(**expected)
    mamba_step(**found)
    # x and the new input of the convolution are rounded; nothing else.
    for name in OWN:
        by = 5e-6 if found[name].dtype == torch.float32 else 2.0**-8
        near(found[name], expected[name], by)


def test_the_reference_is_norm_and_mixer() -> None:
    torch.manual_seed(0)
    norm, mixer = RMSNorm(24), MambaMixer(24, d_state=5, d_conv=3, bias=True)
    cache = StateCache(num_layers=1, batch=2, conv_shape=mixer.conv_shape, state_shape=mixer.state_shape)
    own = StateCache(num_layers=1, batch=2, conv_shape=mixer.conv_shape, state_shape=mixer.state_shape)
    assert mixer.fits_step()
    with torch.no_grad():
        for parameter in (*norm.parameters(), *mixer.in_proj.parameters()):
            parameter.add_(torch.randn_like(parameter) * 0.1)
        plan = {"norm": norm.weight, "eps": norm.eps, **mixer.step_weights()}
        for call in (reference_mamba_step, mamba_step):
            for c in (cache, own):
                c.conv.zero_()
                c.ssm.zero_()
            x = torch.randn(2, 24)
            y = x.clone()
            for _ in range(5):
                x = x + mixer.step(norm(x), cache)
                conv_state, state = own.layer(0)
                call(y, **plan, conv_state=conv_state, state=state)
                near(y, x, 1e-5)
            near(own.ssm, cache.ssm, 1e-5)
            near(own.conv, cache.conv, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("odd", [0, 3])
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype, odd: int) -> None:
    # Widths that are no multiples of a line, of a panel of rows, or of the rows that are read side by side.
    inputs = make(batch=MAX_ROWS, dim=80 + odd, inner=160 + odd, rank=5)
    if dtype == torch.bfloat16:
        inputs = in_bfloat16(inputs)
    whole = copied(inputs)
    mamba_step(**whole)
    for count in (1, 2, 3, 5, 8, 9, 17, 25):
        some = {name: value[-count:].clone() if name in OWN else value for name, value in inputs.items()}
        mamba_step(**some)
        for name in OWN:
            assert torch.equal(some[name], whole[name][-count:])


def test_threads_change_no_bit() -> None:
    inputs = make(batch=4, dim=512, inner=1025, rank=32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(copied(inputs))
            mamba_step(**results[-1])
    finally:
        torch.set_num_threads(threads)
    for name in OWN:
        assert torch.equal(results[0][name], results[1][name])


def in_blocks(inputs: dict[str, Any], kinds: tuple[str | None, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The inputs with matrices in blocks, None for floats, and the same as floats."""
    blocks, floats = copied(inputs), copied(inputs)
    for name, kind in zip(MATRICES, kinds, strict=True):
        if kind is not None:
            blocks[name] = quantise_blocks(inputs[name], kind)
            floats[name] = reference_block_values(blocks[name])
    return blocks, floats


@pytest.mark.parametrize("batch", [1, 2, 9])
@pytest.mark.parametrize(
    "kinds", [*((kind,) * 4 for kind in KINDS), ("q8_0", "q4_1", None, "q4_0"), (None, "q8_0", None, None)]
)
def test_blocks_have_the_bits_of_float32(kinds: tuple[str | None, ...], batch: int) -> None:
    blocks, floats = in_blocks(make(batch=batch, dim=96, inner=160, rank=32), kinds)
    expected, reference = double(floats), copied(blocks)
    reference_mamba_step(**expected)
    reference_mamba_step(**reference)
    mamba_step(**floats)
    mamba_step(**blocks)
    for name in OWN:
        assert torch.equal(blocks[name], floats[name])
        near(blocks[name], expected[name], 5e-6)
        near(reference[name], expected[name], 1e-5)


def test_layouts_change_no_bit() -> None:
    inputs = make(batch=4)
    expected = copied(inputs)
    mamba_step(**expected)
    others = copied(inputs)
    others["conv_weight"] = inputs["conv_weight"].t().contiguous().t()
    # Every second row and input of something larger, and a norm that is one column of it.
    wide = torch.full((8, 6, 96), torch.nan)
    others["conv_state"] = wide[::2, ::2]
    others["conv_state"].copy_(inputs["conv_state"])
    others["state"] = torch.full((8, 96, 16), torch.nan)[1::2]
    others["state"].copy_(inputs["state"])
    others["norm"] = inputs["norm"].unsqueeze(1).expand(-1, 2)[:, 1]
    mamba_step(**others)
    for name in OWN:
        assert torch.equal(others[name], expected[name])
    assert wide[1::2].isnan().all() and wide[:, 1::2].isnan().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("states", [16, 17])
def test_what_is_no_number_stays_in_its_row(value: float, states: int) -> None:
    for name in OWN:
        inputs = make(batch=9, states=states)
        clean = copied(inputs)
        mamba_step(**clean)
        inputs[name].view(9, -1)[4, 3] = value
        mamba_step(**inputs)
        others = [0, 1, 2, 3, 5, 6, 7, 8]
        assert not inputs["x"][4].isfinite().all()
        for own in OWN:
            assert torch.equal(inputs[own][others], clean[own][others])


def test_schema_and_fake() -> None:
    for change in ({}, {"bias": False}):
        inputs = make(**change)  # type: ignore[arg-type]
        torch.library.opcheck(
            torch.ops.arcore.mamba_step.default,
            (*(inputs.get(name) for name in ORDER), 1e-5),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_compiles_as_one_graph() -> None:
    inputs = make()
    expected = copied(inputs)
    mamba_step(**expected)

    def step(x: Tensor, conv_state: Tensor, state: Tensor) -> Tensor:
        given = {n: t for n, t in inputs.items() if n not in OWN}
        return mamba_step(x, conv_state=conv_state, state=state, **given) * 2

    own = [inputs[name].clone() for name in OWN]
    with torch.no_grad():
        found = torch.compile(step, fullgraph=True, backend="aot_eager")(*own)
    assert torch.equal(found, 2 * expected["x"])
    for name, value in zip(OWN, own, strict=True):
        assert torch.equal(value, expected[name])


@pytest.mark.parametrize("name", [*ORDER])
def test_has_no_derivative_and_says_so(name: str) -> None:
    inputs = make()
    with pytest.raises(RuntimeError, match="no gradient"):
        mamba_step(**inputs | {name: inputs[name].clone().requires_grad_()})
    with pytest.raises(NotImplementedError, match="forward-mode tangents"), forward_ad.dual_level():
        mamba_step(**inputs | {name: forward_ad.make_dual(inputs[name], torch.ones_like(inputs[name]))})
    for transform in (
        lambda f: torch.func.grad(lambda t: f(t).sum())(inputs[name]),
        lambda f: torch.func.jvp(f, (inputs[name],), (torch.ones_like(inputs[name]),)),
        lambda f: torch.vmap(f)(torch.stack([inputs[name]] * 2)),
    ):
        with pytest.raises(RuntimeError, match=r"expected no transform of torch\.func"):
            transform(lambda t: mamba_step(**inputs | {name: t}))


@pytest.mark.parametrize("name", [*ORDER])
def test_arguments_that_are_no_tensors_or_elsewhere(name: str) -> None:
    inputs = make()
    if "bias" not in name:
        with pytest.raises(TypeError, match=f"expected {name} to be a tensor but got list"):
            mamba_step(**inputs | {name: [1.0]})
    if name != "x":
        with pytest.raises(ValueError, match=f"expected {name} on the device of x, cpu, but got meta"):
            mamba_step(**inputs | {name: torch.zeros(2, device="meta")})
    with pytest.raises(ValueError, match=f"expected {name} of dtype float32|expected {name} of dtype"):
        mamba_step(**inputs | {name: inputs[name].double()})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(48)}, ValueError, r"x of shape \(batch, dim\) but got \(48\)"),
        ({"x": torch.zeros(65, 48)}, ValueError, "at most 64 rows but got 65"),
        ({"x": torch.zeros(2, 48)}, ValueError, r"state of shape \(2, 96, 16\) but got \(3, 96, 16\)"),
        ({"x": torch.zeros(48, 3).t()}, ValueError, "x to be contiguous"),
        ({"state": torch.zeros(3, 96)}, ValueError, r"state of shape \(batch, inner, states\) but got"),
        ({"state": torch.zeros(3, 16, 96).transpose(1, 2)}, ValueError, "states of a row to lie side by side"),
        ({"state": torch.zeros(3, 96, 257)}, ValueError, "1 to 256 states but got 257"),
        ({"state": torch.zeros(3, 96, 16).bfloat16()}, ValueError, "state of dtype float32 but got BFloat16"),
        ({"conv_state": torch.zeros(3, 2, 96)}, ValueError, r"conv_state of shape \(3, 3, 96\)"),
        ({"conv_state": torch.zeros(3, 96, 3).transpose(1, 2)}, ValueError, "channels of conv_state to lie"),
        ({"conv_weight": torch.zeros(96, 1)}, ValueError, "conv_weight of 2 to 8 taps but got 1"),
        ({"conv_weight": torch.zeros(96, 9)}, ValueError, "conv_weight of 2 to 8 taps but got 9"),
        ({"conv_weight": torch.zeros(96, 1, 4)}, ValueError, r"conv_weight of shape \(inner, taps\)"),
        ({"conv_weight": torch.zeros(95, 4)}, ValueError, r"conv_weight of shape \(96, 4\) but got \(95, 4\)"),
        ({"norm": torch.ones(47)}, ValueError, r"norm of shape \(48\) but got \(47\)"),
        ({"in_proj": torch.zeros(96, 48)}, ValueError, r"in_proj of shape \(192, 48\) but got \(96, 48\)"),
        ({"in_proj": torch.zeros(48, 192).t()}, ValueError, "in_proj to be contiguous"),
        ({"x_proj": torch.zeros(34, 96)}, ValueError, r"x_proj of shape \(35, 96\) but got \(34, 96\)"),
        ({"x_proj": torch.zeros(35, 3, 33, dtype=torch.uint8)}, ValueError, r"x_proj of bytes, shape"),
        ({"x_proj": torch.zeros(35, 2, 34, dtype=torch.uint8)}, ValueError, r"x_proj of shape \(35, 3, 34\)"),
        ({"in_proj": torch.zeros(192, 1, 34, dtype=torch.uint8)}, ValueError, "in whole blocks of 32 but got 48"),
        ({"dt_proj": torch.zeros(96)}, ValueError, r"dt_proj of shape \(rows, columns\), or that in blocks"),
        ({"dt_proj": torch.zeros(96, 0)}, ValueError, "rank of at least 1 but got 0"),
        ({"out_proj": torch.zeros(48, 95)}, ValueError, r"out_proj of shape \(48, 96\) but got \(48, 95\)"),
        ({"A": torch.zeros(96, 15)}, ValueError, r"A of shape \(96, 16\) but got \(96, 15\)"),
        ({"D": torch.zeros(95)}, ValueError, r"D of shape \(96\) but got \(95\)"),
        ({"in_bias": torch.zeros(96)}, ValueError, r"in_bias of shape \(192\) but got \(96\)"),
        ({"conv_bias": torch.zeros(95)}, ValueError, r"conv_bias of shape \(96\) but got \(95\)"),
        ({"dt_bias": torch.zeros(95)}, ValueError, r"dt_bias of shape \(96\) but got \(95\)"),
        ({"out_bias": torch.zeros(47)}, ValueError, r"out_bias of shape \(48\) but got \(47\)"),
        ({"eps": float("nan")}, ValueError, "eps to be finite and at least 0 but got nan"),
        ({"eps": -1e-5}, ValueError, "eps to be finite and at least 0"),
        ({"eps": "small"}, TypeError, "eps to be a number but got 'small'"),
        ({"eps": True}, TypeError, "eps to be a number but got True"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    inputs = make()
    before = copied(inputs)
    with pytest.raises(error, match=rf"^arcore\.mamba_step: expected .*{message}"):
        mamba_step(**inputs | change)
    for name in OWN:
        assert torch.equal(inputs[name], before[name])


def test_writes_into_memory_that_nobody_else_reads() -> None:
    inputs = make()
    state, out_proj, conv_state = inputs["state"], inputs["out_proj"], inputs["conv_state"]
    for change in (
        {"state": state[:1].expand(3, -1, -1)},
        {"conv_state": conv_state[:1].expand(3, -1, -1)},
        {"x": inputs["x"][:1].expand(3, -1).contiguous().as_strided((3, 48), (0, 1))},
        {"conv_state": state.view(-1)[: 3 * 3 * 96].view(3, 3, 96)},
        {"x": state.view(-1)[: 3 * 48].view(3, 48)},
        {"x": out_proj.view(-1)[: 3 * 48].view(3, 48)},
        {"norm": inputs["x"][0]},
        {"D": conv_state[0, 0]},
        {"A": state[1]},
        {"out_bias": inputs["x"][2]},
    ):
        with pytest.raises(ValueError, match=r"memory|contiguous"):
            mamba_step(**inputs | change)


UNDER = """
import torch
import arcore
from arcore.ops import mamba_step, quantise_blocks, reference_block_values, reference_mamba_step
from tests.mamba_step.test_mamba_step import CASES, MATRICES, OWN, copied, double, make, near
print(torch.ops.arcore.cpu_isa())
for case in CASES.values():
    inputs = make(**case)
    expected = double(inputs)
    first = {n: t[-1:].clone() if n in OWN else t for n, t in inputs.items()}
    reference_mamba_step(**expected)
    mamba_step(**inputs)
    mamba_step(**first)
    for name in OWN:
        near(inputs[name], expected[name], 5e-6)
        assert torch.equal(first[name], inputs[name][-1:])
for kind in ("q8_0", "q4_0", "q4_1"):
    blocks = make(dim=96, inner=160, rank=32)
    floats = copied(blocks)
    for name in MATRICES:
        blocks[name] = quantise_blocks(blocks[name], kind)
        floats[name] = reference_block_values(blocks[name])
    mamba_step(**blocks)
    mamba_step(**floats)
    for name in OWN:
        assert torch.equal(blocks[name], floats[name]), kind
"""


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa: str) -> None:
    run_under(isa, UNDER)
