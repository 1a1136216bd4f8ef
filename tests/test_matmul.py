"""arcore.float32_matmul and half_matmul: products agree with float64, and nothing else changes."""

from __future__ import annotations

import importlib
import threading

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import arcore
from arcore import matmul

onednn = pytest.mark.skipif(matmul.why_not() is not None, reason=str(matmul.why_not()))


@pytest.fixture
def calls(monkeypatch):
    """Shapes that oneDNN was given."""
    seen: list[tuple[int, ...]] = []
    make = matmul._by_onednn

    def counted():
        linear = make()

        def call(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
            seen.append((*x.shape, w.shape[0]))
            return linear(x, w, bias)

        return call

    monkeypatch.setattr(matmul, "_by_onednn", counted)
    return seen


def close(ours: Tensor, exact: Tensor, terms: int) -> None:
    error = (ours.double() - exact).abs().max()
    assert error <= 2e-7 * terms**0.5 * exact.abs().max(), error


@onednn
@pytest.mark.parametrize("layout", ["rows", "columns", "slice of rows"])
@pytest.mark.parametrize(
    "shape", [(4, 512, 513), (17, 257, 255), (127, 100, 1000), (1000, 65, 65), (1000, 65, 33)]
)
def test_products_agree_with_float64(calls, shape, layout):
    m, k, n = shape

    a, b, bias = torch.randn(m, k), torch.randn(n, k).t(), torch.randn(n)
    if layout == "slice of rows":
        a = torch.randn(m, k + 3)[:, :k]
    if layout == "columns":
        b = b.contiguous()
        if min(m, n) >= 64:
            a = a.t().contiguous().t()
    exact = a.double() @ b.double()
    with arcore.float32_matmul("onednn"):
        assert matmul.current() == "onednn"
        close(a @ b, exact, k)
        close(torch.addmm(bias, a, b), exact + bias, k)
        close(F.linear(a, b.t(), bias), exact + bias, k)
        close(F.linear(torch.stack([a, a]), b.t(), bias)[1], exact + bias, k)
    assert len(calls) == 4
    assert matmul.current() == "torch"
    assert torch.equal(a @ b, torch.mm(a, b)) and len(calls) == 4


@onednn
def test_gradients_of_a_linear_layer(calls):
    layer = torch.nn.Linear(200, 300)
    x = torch.randn(5, 33, 200, requires_grad=True)
    back = torch.randn(5, 33, 300)
    exact = torch.autograd.grad(
        F.linear(x.double(), layer.weight.double(), layer.bias.double()),
        [x, *layer.parameters()],
        back.double(),
    )
    with arcore.float32_matmul("onednn"):
        ours = torch.autograd.grad(layer(x), [x, *layer.parameters()], back)
        tangent = torch.func.jvp(layer, (x,), (back[..., :200],))[1]
        rows = torch.vmap(layer)(x)
    for own, right in zip(ours, exact, strict=True):
        close(own, right, 300)
    close(tangent, F.linear(back[..., :200].double(), layer.weight.double()), 200)
    close(rows, layer(x).double(), 200)
    assert len(calls) >= 4


@onednn
@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.randn(3, 1024), torch.randn(1024, 1024)),
        (torch.randn(64, 64), torch.randn(64, 64)),
        (torch.randn(64, 512).double(), torch.randn(512, 64).double()),
        (torch.randn(1, 512).expand(64, 512), torch.randn(512, 64)),
        (torch.randn(70000).as_strided((64, 512), (2, 1)), torch.randn(512, 64)),
        (torch.randn(64, 1024)[:, ::2], torch.randn(512, 64)),
        (torch.randn(64, 512), torch.randn(512, 68)[:, :64]),
        (torch.randn(64, 512), torch.randn(64, 516)[:, 4:].t()),
        (torch.randn(4096, 64).t(), torch.randn(4096, 32)),
        (torch.randn(4096, 64), torch.randn(64, 31)),
        (torch.randn(4096, 15), torch.randn(15, 64)),
        (torch.randn(64, 0), torch.randn(0, 64)),
        (torch.randn(0, 512), torch.randn(512, 64)),
    ],
)
def test_what_stays_with_torch(calls, a, b):
    expected = a @ b
    with arcore.float32_matmul("onednn"):
        assert torch.equal(a @ b, expected)
    assert not calls


@onednn
def test_other_forms_of_addmm(calls):
    a, b, c = torch.randn(64, 300), torch.randn(300, 80), torch.randn(64, 80)
    row = torch.randn(160)[::2]
    with arcore.float32_matmul("onednn"):
        for bias, scale in ((c, {}), (c[0], {"beta": 2}), (row, {}), (c[0], {"alpha": 0.5, "beta": 0})):
            exact = torch.addmm(bias.double(), a.double(), b.double(), **scale)
            close(torch.addmm(bias, a, b, **scale), exact, 300)
        out = torch.empty(64, 80)
        torch.mm(a, b, out=out)
        close(out, a.double() @ b.double(), 300)
        with pytest.raises(RuntimeError, match="must match the existing size"):
            torch.addmm(c[0, :79], a, b)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            a @ torch.randn(301, 80)
        with pytest.raises(RuntimeError, match=r"same dtype|same type"):
            a @ b.double()


@onednn
def test_numbers_that_are_none():
    a, b = torch.randn(64, 300), torch.randn(300, 80)
    a[1, 2], a[2, 3], a[3] = torch.nan, torch.inf, 3e38
    with arcore.float32_matmul("onednn"):
        ours = a @ b
    assert ours[1].isnan().all() and ours[2].isinf().all() and not ours[3].isfinite().any()
    assert ours[4:].isfinite().all() and ours[0].isfinite().all()


@onednn
def test_it_nests_and_ends_with_an_error(calls):
    a, b = torch.randn(64, 300), torch.randn(300, 80)
    switch = arcore.float32_matmul("onednn")
    with pytest.raises(KeyError), switch:
        with arcore.float32_matmul("torch"):
            a @ b
            assert not calls and matmul.current() == "torch"
        with switch:
            a @ b
        assert matmul.current() == "onednn"
        other = threading.Thread(target=lambda: a @ b)
        other.start()
        other.join()
        assert len(calls) == 2
        raise KeyError
    assert matmul.current() == "torch"


@onednn
@pytest.mark.slow
def test_compiled_code_goes_on_as_before():
    layer = torch.nn.Linear(200, 300)
    x = torch.randn(65, 200)
    with arcore.float32_matmul("onednn"):
        close(torch.compile(layer, fullgraph=True)(x), layer(x).double(), 200)


def test_the_choice_by_processor(monkeypatch, tmp_path):
    texts = {
        "vendor_id : AuthenticAMD\ncpu family : 26\n": True,
        "vendor_id : AuthenticAMD\ncpu family : 25\n": False,
        "vendor_id : GenuineIntel\ncpu family : 30\n": False,
        "CPU implementer : 0x41\n": False,
    }
    for text, wide in texts.items():
        file = tmp_path / "cpuinfo"
        file.write_text(text)
        monkeypatch.setattr(matmul, "Path", lambda _, file=file: file)
        assert matmul._wide_amd.__wrapped__() is wide
    monkeypatch.setattr(matmul, "_wide_amd", lambda: True)
    monkeypatch.setattr(matmul, "why_not", lambda: None)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    for capability, chosen in (("AVX512", "onednn"), ("AVX2", "torch")):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda value=capability: value)
        assert matmul.resolve("auto") == chosen
    assert matmul.resolve("torch") == "torch"


def test_errors(monkeypatch):
    with pytest.raises(ValueError, match=r"backend must be one of 'torch', 'onednn', 'auto' but got 'mkl'"):
        arcore.float32_matmul("mkl")
    monkeypatch.setattr(matmul, "why_not", lambda: "this torch was built without oneDNN")
    with pytest.raises(RuntimeError, match="built without oneDNN; choose 'torch' or 'auto'"):
        arcore.float32_matmul("onednn")
    with arcore.float32_matmul("auto"):
        assert matmul.current() == "torch"


HALVES = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


def rounded_once(ours: Tensor, exact: Tensor, dtype: torch.dtype, terms: int) -> None:
    """Within half a unit in the last place of 16 bits, and what sums in float32 lose."""
    assert ours.dtype is dtype
    if not exact.numel():
        assert ours.shape == exact.shape
        return
    slack = 2e-7 * terms**0.5 * exact.abs().max()
    error = (ours.double() - exact).abs()
    assert (error <= HALVES[dtype] * exact.abs() + slack + 1e-7).all(), error.max()


def halves(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "shape", [(1, 17, 15), (15, 63, 65), (33, 127, 64), (0, 64, 17), (65, 0, 17), (17, 64, 0)]
)
def test_half_products_are_rounded_once(monkeypatch, dtype, shape):
    m, k, n = shape
    monkeypatch.setattr(matmul, "PIECE", 1000)  # several pieces, the last of another size
    a, b, bias, whole = halves(dtype, (m, k), (n, k), (n,), (m, n))
    exact = a.double() @ b.t().double()
    with arcore.half_matmul("float32"):
        for left in (a, a.t().contiguous().t()):
            for right in (b.t(), b.t().contiguous()):
                rounded_once(left @ right, exact, dtype, k)
                rounded_once(torch.addmm(bias, left, right), exact + bias, dtype, k)
        rounded_once(F.linear(a[None], b, bias)[0], exact + bias, dtype, k)
        rounded_once(torch.addmm(whole, a, b.t(), beta=0.5, alpha=2), exact * 2 + whole * 0.5, dtype, k)
        rounded_once(torch.addmm(bias, a, b.t(), beta=0), exact, dtype, k)
        rounded_once(torch.bmm(a[None], b.t()[None])[0], exact, dtype, k)
        rounded_once(torch.baddbmm(whole[None], a[None], b.t()[None])[0], exact + whole, dtype, k)
        rounded_once(torch.einsum("mk,nk->nm", a, b), exact.t(), dtype, k)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_gradients(dtype):
    x, weight, bias, back = halves(dtype, (3, 21, 40), (50, 40), (50,), (3, 21, 50))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    exact = torch.autograd.grad(F.linear(*doubles), doubles, back.double())
    with arcore.half_matmul("float32"):
        ours = torch.autograd.grad(F.linear(*leaves), leaves, back)
        with torch.autocast("cpu", torch.bfloat16):
            single = torch.nn.Linear(40, 50)
            single(x.float()).sum().backward()
    for own, right in zip(ours[:2], exact[:2], strict=True):
        rounded_once(own, right, dtype, 63)
    assert single.weight.grad is not None and single.weight.grad.dtype is torch.float32


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "options", [{}, {"padding": 1, "stride": 2}, {"groups": 2, "dilation": 2}, {"transposed": True}]
)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_half_convolutions(dtype, options, dims):
    options = dict(options)
    name = f"conv_transpose{dims}d" if options.pop("transposed", False) else f"conv{dims}d"
    convolve = getattr(F, name)
    x, bias = halves(dtype, (2, 4, *(9,) * dims), (6,))
    (weight,) = halves(
        dtype,
        (4, 6, *(3,) * dims) if "transpose" in name else (6, 4 // options.get("groups", 1), *(3,) * dims),
    )
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    exact = convolve(*doubles, **options)
    (back,) = halves(dtype, tuple(exact.shape))
    right = torch.autograd.grad(exact, doubles, back.double())
    with arcore.half_matmul("float32"):
        ours = convolve(*leaves, **options)
        grads = torch.autograd.grad(ours, leaves, back)
    rounded_once(ours, exact, dtype, 4 * 3**dims)
    for own, wanted in zip(grads, right, strict=True):
        rounded_once(own, wanted, dtype, 2 * 9**dims)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("masked", [False, True])
def test_half_attention_backward(dtype, masked):
    q, k, v, back = halves(dtype, *[(2, 3, 33, 16)] * 4)
    mask = torch.randn(33, 33).to(dtype) if masked else None
    leaves = [t.requires_grad_() for t in (q, k, v)]
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    wide = None if mask is None else mask.double()
    right = torch.autograd.grad(F.scaled_dot_product_attention(*doubles, wide), doubles, back.double())
    with arcore.half_matmul("float32"):
        ours = torch.autograd.grad(F.scaled_dot_product_attention(*leaves, mask), leaves, back)
    for own, wanted in zip(ours, right, strict=True):
        # The forward rounds its output, which the backward reads.
        assert own.dtype is dtype
        assert (own.double() - wanted).abs().max() <= 4 * HALVES[dtype] * wanted.abs().max()


def test_half_products_leave_the_rest_alone():
    a, b = torch.randn(64, 300), torch.randn(300, 80)
    conv = torch.nn.Conv2d(3, 4, 3)
    image = torch.randn(2, 3, 9, 9)
    plain = [a @ b, torch.addmm(b[0], a, b), conv(image), torch.bmm(a[None].double(), b[None].double())]
    with arcore.half_matmul("float32"):
        mine = [a @ b, torch.addmm(b[0], a, b), conv(image), torch.bmm(a[None].double(), b[None].double())]
        assert all(map(torch.equal, mine, plain))
        for wrong in (b.bfloat16(), b.half()):
            with pytest.raises(RuntimeError, match=r"same dtype|same type"):
                a @ wrong
        with pytest.raises(RuntimeError, match=r"same dtype|same type"):
            a.bfloat16() @ b.half()
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            a.half() @ a.half()
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            torch.addmm(b[0].half(), a[:4].half(), a.half())
        with pytest.raises(RuntimeError):
            torch.addmm(b[0, :79].half(), a.half(), b.half())


def test_half_numbers_that_are_none():
    a, b = torch.randn(64, 300).half(), torch.randn(300, 80).half()
    a[1, 2], a[2, 3], a[3] = torch.nan, torch.inf, 6e4
    with arcore.half_matmul("float32"):
        ours = a @ b
    assert ours[1].isnan().all() and ours[2].isinf().all() and ours[3].isinf().any()
    assert ours[4:].isfinite().all()


@onednn
def test_both_choices_at_once(calls):
    a, b = torch.randn(64, 300), torch.randn(300, 80)
    low, high = a.bfloat16(), b.bfloat16()
    half, full = arcore.half_matmul("float32"), arcore.float32_matmul("onednn")
    half.__enter__()
    full.__enter__()
    a @ b
    one = low @ high
    half.__exit__(None, None, None)
    a @ b
    assert len(calls) == 2 and matmul.current() == "onednn"
    with half:
        a @ b
        assert torch.equal(low @ high, one)
        with arcore.half_matmul("torch"):
            a @ b
            assert not matmul._choice.widened
    full.__exit__(None, None, None)
    assert len(calls) == 4 and matmul._choice == matmul._Choice()
    assert torch.equal(torch.mm(a, b), a @ b) and len(calls) == 4


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rows", [1, 4, 5, 32, 33, 300])
def test_linear_widens_by_itself(monkeypatch, dtype, rows):
    monkeypatch.setattr(matmul, "slow_halves", lambda: tuple(HALVES))
    monkeypatch.setattr(importlib.import_module("arcore.nn.linear"), "slow_halves", lambda: tuple(HALVES))
    monkeypatch.setattr(matmul, "PIECE", 1000)
    x, weight, bias = halves(dtype, (rows, 63), (65, 63), (65,))
    with torch.no_grad():
        ours = arcore.nn.linear(x, weight, bias)
        batch = arcore.nn.linear(x[:, None], weight)
    exact = x.double() @ weight.double().t()
    rounded_once(ours, exact + bias, dtype, 63)
    rounded_once(batch[:, 0], exact, dtype, 63)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(0, 63), (2, 0, 63), (5, 0), (63,), (0,)])
def test_linear_of_nothing(monkeypatch, dtype, shape):
    monkeypatch.setattr(matmul, "slow_halves", lambda: tuple(HALVES))
    monkeypatch.setattr(importlib.import_module("arcore.nn.linear"), "slow_halves", lambda: tuple(HALVES))
    x, weight, bias = halves(dtype, shape, (65, shape[-1]), (65,))
    with torch.no_grad():
        for added in (bias, None):
            ours = arcore.nn.linear(x, weight, added)
            wide = None if added is None else added.double()
            rounded_once(ours, F.linear(x.double(), weight.double(), wide), dtype, 63)


def test_the_choice_of_halves(monkeypatch):
    class Ops:
        @staticmethod
        def _is_mkldnn_bf16_supported() -> bool:
            return True

        @staticmethod
        def _is_mkldnn_fp16_supported() -> bool:
            return False

    monkeypatch.setattr(torch.ops, "mkldnn", Ops, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert matmul.slow_halves.__wrapped__() == (torch.float16,)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert matmul.slow_halves.__wrapped__() == (torch.bfloat16, torch.float16)
    with pytest.raises(
        ValueError, match=r"backend must be one of 'torch', 'float32', 'auto' but got 'onednn'"
    ):
        arcore.half_matmul("onednn")
    monkeypatch.setattr(matmul, "slow_halves", lambda: (torch.float16,))
    monkeypatch.setenv("ARCORE_MATMUL", "torch")
    with matmul.half_matmul_of_commands():
        assert not matmul._choice.widened
    monkeypatch.delenv("ARCORE_MATMUL")
    with matmul.half_matmul_of_commands():
        assert matmul._choice.widened == {torch.float16}
