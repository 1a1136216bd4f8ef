"""arcore.float32_matmul: float32 products by oneDNN agree with float64, and nothing else changes."""

from __future__ import annotations

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
