"""linear_scan: against the plain loop, its derivatives, special factors, transforms, speed, and what it refuses."""

from __future__ import annotations

import time

import pytest
import torch

from arcore.ops import linear_scan, reference_linear_scan


def rows(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = 1.1 - 1.4 * torch.rand(*shape, generator=generator, dtype=torch.float64)
    return a.to(dtype), torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 1), (17, 33), (2, 5, 64), (0, 4), (3, 0)])
def test_equals_the_loop(shape: tuple[int, ...], reverse: bool) -> None:
    a, b = rows(*shape)
    initial = torch.randn(shape[:-1], dtype=torch.float64)
    for given in (None, initial):
        ours = linear_scan(a, b, initial=given, reverse=reverse)
        known = reference_linear_scan(a, b, initial=given, reverse=reverse)
        torch.testing.assert_close(ours, known, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_types_are_computed_in_float32(dtype: torch.dtype) -> None:
    a, b = rows(9, 70, dtype=dtype)
    known = reference_linear_scan(a.double(), b.double()).to(dtype)
    found = linear_scan(a, b)
    assert found.dtype == dtype
    torch.testing.assert_close(found, known, rtol=4 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("factor", [1.0, 0.0, -1.0])
def test_factors_that_a_logarithm_could_not_express(factor: float) -> None:
    _, b = rows(4, 100)
    a = torch.full_like(b, factor)
    powers = torch.tensor([factor**k for k in range(100)], dtype=torch.float64)
    known = torch.stack([(b[:, : t + 1].flip(1) * powers[: t + 1]).sum(1) for t in range(100)], 1)
    torch.testing.assert_close(linear_scan(a, b), known, rtol=1e-12, atol=1e-12)


def test_passes_of_other_devices_equal_the_loop() -> None:
    from arcore.ops._linear_scan import _doubling

    a, b = rows(6, 77)
    initial = torch.randn(6, dtype=torch.float64)
    for reverse in (False, True):
        for given in (None, initial):
            known = reference_linear_scan(a, b, initial=given, reverse=reverse)
            torch.testing.assert_close(_doubling(a, b, given, reverse), known, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reverse", [False, True])
def test_derivatives_of_both_orders_and_modes(reverse: bool) -> None:
    a, b = (t.requires_grad_() for t in rows(3, 5))
    initial = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def scan(a: torch.Tensor, b: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
        return linear_scan(a, b, initial=initial, reverse=reverse)

    assert torch.autograd.gradcheck(scan, (a, b, initial), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(scan, (a, b, initial))
    assert torch.autograd.gradcheck(lambda a: linear_scan(a, b.detach(), reverse=reverse), (a,))


def test_rows_do_not_depend_on_each_other_and_broadcast() -> None:
    a, b = rows(19, 40)
    b = b.clone()
    whole = linear_scan(a, b)
    assert torch.equal(linear_scan(a[7:8], b[7:8])[0], whole[7])
    b[3, 2] = torch.nan
    again = linear_scan(a, b)
    assert torch.equal(again[:3], whole[:3])
    assert torch.equal(again[4:], whole[4:])
    assert torch.equal(linear_scan(a[0], b[4:6]), linear_scan(a[:1].expand(2, -1), b[4:6]))
    strided = linear_scan(a.T.contiguous().T, b.T.contiguous().T)
    assert torch.equal(strided.nan_to_num(), again.nan_to_num())


def test_compiles_and_maps() -> None:
    a, b = rows(4, 9)
    known = linear_scan(a, b, reverse=True)
    compiled = torch.compile(
        lambda a, b: linear_scan(a, b, reverse=True), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(a, b), known)
    assert torch.equal(torch.vmap(lambda a, b: linear_scan(a, b, reverse=True))(a, b), known)


def test_is_fifty_times_as_fast_as_a_loop() -> None:
    a, b = rows(16, 2048, dtype=torch.float32)
    times = []
    for function, repeats in ((linear_scan, 20), (reference_linear_scan, 1)):
        function(a, b, reverse=True)
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            for _ in range(repeats):
                function(a, b, reverse=True)
            best = min(best, (time.perf_counter() - start) / repeats)
        times.append(best)
    assert times[1] >= 50 * times[0], f"{times[0] * 1e3:.3f} ms against {times[1] * 1e3:.3f} ms"


def test_refuses() -> None:
    a, b = rows(3, 4)
    with pytest.raises(
        TypeError, match=r"expected a of dtype float64.*but got int64; convert it with \.float"
    ):
        linear_scan(a.long(), b)
    with pytest.raises(TypeError, match="expected b to be a tensor but got float"):
        linear_scan(a, 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"with one T but got \(3, 4\) and \(3, 3\)"):
        linear_scan(a, b[:, :3])
    with pytest.raises(ValueError, match="leading dimensions broadcast"):
        linear_scan(a, b[:2])
    with pytest.raises(ValueError, match="expected initial to broadcast"):
        linear_scan(a, b, initial=b[0])
