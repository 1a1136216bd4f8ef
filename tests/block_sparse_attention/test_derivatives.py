"""torch.func, forward mode and second derivatives of the op against those of the dense formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.func import functional_call, grad, jacfwd, jvp, linearize, vjp, vmap

from arcore import masks
from arcore.masks import IntervalMask, TreeMask
from arcore.ops import block_sparse_attention
from arcore.ops._block_sparse_attention_rules import tiled_jvp
from tests.block_sparse_attention.cases import MASKS, Inputs, make_inputs, random_mask, random_tree
from tests.isa import ISAS, run_under

Attention = Callable[..., Any]
Mask = IntervalMask | TreeMask


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    *,
    key_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """The formula without a branch on values, so that every transform of torch.func goes through it."""
    group, allowed = q.shape[1] // k.shape[1], mask.to_bool()
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    logits = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    if key_bias is not None:
        logits = logits + key_bias.unsqueeze(2).to(logits.dtype)
    logits = logits.masked_fill(~allowed, -math.inf)
    if sinks is not None:
        sink = sinks.to(logits.dtype).view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sink], -1)
    weights = logits.softmax(-1)
    out = weights[..., : k.shape[2]] @ v
    return (out, logits.logsumexp(-1)) if return_lse else out


Values = tuple[Tensor, ...]  # q, k, v, key_bias, sinks
PLACES = (0, 1, 2, 3, 4)


def values_of(mask: Mask, seed: int, dtype: torch.dtype = torch.float32, **shape: Any) -> Values:
    x = make_inputs(
        mask, key_bias=True, sinks=True, dtype=dtype, seed=seed, **{"dim": 12, "v_dim": 20} | shape
    )
    assert x.key_bias is not None
    assert x.sinks is not None
    return x.q, x.k, x.v, x.key_bias, x.sinks


def loss(attention: Attention, mask: Mask) -> Callable[..., Tensor]:
    def compute(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, sinks: Tensor) -> Tensor:
        out, lse = attention(q, k, v, mask, key_bias=key_bias, sinks=sinks, return_lse=True)
        total: Tensor = out.float().sin().sum() + lse.cos().sum()
        return total

    return compute


def assert_same(found: Any, wanted: Any, tolerance: float = 5e-5) -> None:
    found, wanted = (torch.utils._pytree.tree_leaves(x) for x in (found, wanted))
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        scale = max(1.0, b.abs().max().item())
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=tolerance * scale)


def both(transform: Callable[[Callable[..., Tensor], Values, Values], Any], mask: Mask) -> None:
    """What `transform(loss, point, direction)` gives for the op and for the formula."""
    point, direction = values_of(mask, 1), values_of(mask, 2)
    assert_same(
        transform(loss(block_sparse_attention, mask), point, direction),
        transform(loss(dense, mask), point, direction),
    )


def inner(f: Callable[..., Tensor], direction: Values) -> Callable[..., Tensor]:
    """The derivative of f along `direction`, by reverse mode."""

    def compute(*x: Tensor) -> Tensor:
        total: Tensor = sum(
            ((g * t).sum() for g, t in zip(grad(f, argnums=PLACES)(*x), direction, strict=True)),
            torch.zeros(()),
        )
        return total

    return compute


def leaves(point: Values) -> list[Tensor]:
    return [x.clone().requires_grad_() for x in point]


def reverse_over_jvp(f: Callable[..., Tensor], point: Values, direction: Values) -> Any:
    """A jvp inside a loss that is backpropagated."""
    x = leaves(point)
    value, tangent = jvp(f, tuple(x), direction)
    return torch.autograd.grad(value + tangent.square(), x)


def reverse_over_reverse(f: Callable[..., Tensor], point: Values, direction: Values) -> Any:
    x = leaves(point)
    grads = torch.autograd.grad(f(*x), x, create_graph=True)
    return torch.autograd.grad(sum((g * t).sum() for g, t in zip(grads, direction, strict=True)), x)


def by_dual_numbers(f: Callable[..., Tensor], point: Values, direction: Values) -> Any:
    with forward_ad.dual_level():
        out = f(*(forward_ad.make_dual(x, t) for x, t in zip(point, direction, strict=True)))
        return forward_ad.unpack_dual(out).tangent


def stacked(point: Values, direction: Values) -> Values:
    return tuple(torch.stack([a, b]) for a, b in zip(point, direction, strict=True))


TRANSFORMS: dict[str, Callable[[Callable[..., Tensor], Values, Values], Any]] = {
    "grad": lambda f, x, t: grad(f, argnums=PLACES)(*x),
    "vjp": lambda f, x, t: vjp(f, *x)[1](torch.tensor(1.5)),
    "jvp": lambda f, x, t: jvp(f, x, t),
    "jvp_of_queries": lambda f, x, t: jvp(lambda q: f(q, *x[1:]), x[:1], t[:1]),
    "jvp_of_keys": lambda f, x, t: jvp(lambda k: f(x[0], k, *x[2:]), x[1:2], t[1:2]),
    "jvp_of_values": lambda f, x, t: jvp(lambda v: f(*x[:2], v, *x[3:]), x[2:3], t[2:3]),
    "jvp_of_bias": lambda f, x, t: jvp(lambda b: f(*x[:3], b, x[4]), x[3:4], t[3:4]),
    "linearize": lambda f, x, t: linearize(f, *x)[1](*t),
    "forward_ad": by_dual_numbers,
    "vmap": lambda f, x, t: vmap(f)(*stacked(x, t)),
    "vmap_of_keys": lambda f, x, t: vmap(lambda k: f(x[0], k, *x[2:]), in_dims=2)(
        torch.stack([x[1], t[1]], 2)
    ),
    "vmap_grad": lambda f, x, t: vmap(grad(f, argnums=PLACES))(*stacked(x, t)),
    "vmap_jvp": lambda f, x, t: vmap(lambda s: jvp(f, x, (s, *t[1:])))(torch.stack([x[0], t[0]])),
    "grad_of_jvp": lambda f, x, t: grad(lambda *y: jvp(f, y, t)[1], argnums=PLACES)(*x),
    "grad_of_jvp_in_its_tangents": lambda f, x, t: grad(lambda *s: jvp(f, x, s)[1] ** 2, argnums=PLACES)(*t),
    "jvp_of_grad": lambda f, x, t: jvp(grad(f, argnums=PLACES), x, t),
    "grad_of_grad": lambda f, x, t: grad(inner(f, t), argnums=PLACES)(*x),
    "vmap_grad_of_jvp": lambda f, x, t: vmap(
        lambda s: grad(lambda q: jvp(f, (q, *x[1:]), (s, *t[1:]))[1])(x[0])
    )(torch.stack([x[0], t[0]])),
    "reverse_over_jvp": reverse_over_jvp,
    "reverse_over_reverse": reverse_over_reverse,
}

POINTS: dict[str, Callable[[], Mask]] = {
    "window": lambda: masks.sliding_window(20, 7, sinks=2),
    "tree": lambda: random_tree(9, [13, 6], seed=3, batch=2),
    "batch_and_heads": lambda: random_full_rows(random_mask(11, 17, seed=4, batch=2, heads=4)),
}


def random_full_rows(mask: IntervalMask) -> IntervalMask:
    """Each row sees the last key: the dense formula has NaN gradients in rows without keys."""
    last = torch.tensor([mask.nk - 1, mask.nk], dtype=torch.int32).expand(*mask.bounds.shape[:3], 2)
    return IntervalMask(torch.cat([mask.bounds[..., :2], last], -1), mask.nk)


# torch.func.linearize itself warns about the graph that it makes.
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("mask", POINTS)
def test_transforms(mask: str, transform: str) -> None:
    both(TRANSFORMS[transform], POINTS[mask]())


def test_jacfwd_equals_jacrev() -> None:
    mask = masks.causal(5)
    x = make_inputs(mask, batch=1, heads=2, kv_heads=1, dim=4)

    def f(v: Tensor) -> Tensor:
        out: Tensor = block_sparse_attention(x.q, x.k, v, mask)
        return out

    torch.testing.assert_close(jacfwd(f)(x.v), torch.func.jacrev(f)(x.v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_tangents_are_as_good_as_eager(name: str, dtype: torch.dtype) -> None:
    mask = MASKS[name]()
    point, direction = (values_of(mask, seed, dtype, dim=24, v_dim=24) for seed in (1, 2))

    def tangents(attention: Attention, precision: torch.dtype) -> list[Tensor]:
        def f(q: Tensor, k: Tensor, v: Tensor) -> Any:
            return attention(q, k, v, mask, return_lse=True)

        found = jvp(
            f, tuple(x.to(precision) for x in point[:3]), tuple(t.to(precision) for t in direction[:3])
        )[1]
        return [x.double() for x in found]

    exact, eager = tangents(dense, torch.float64), tangents(dense, dtype)
    ours = tangents(block_sparse_attention, dtype)
    floors = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
    for found, known, wanted in zip(ours, eager, exact, strict=True):
        error, lost = (found - wanted).abs().max(), (known - wanted).abs().max()
        assert error <= 2 * lost + floors[dtype] * max(1.0, wanted.abs().max().item())


@pytest.mark.parametrize("lengths", [(1, 1), (1, 300), (97, 513), (200, 31)])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_kernel_equals_the_tiled_reference(lengths: tuple[int, int], seed: int) -> None:
    """Rows without keys, key bounds, odd lengths; several blocks of rows."""
    mask = random_mask(*lengths, seed=seed, batch=2, heads=4, key_bounds=seed == 1)
    point, direction = values_of(mask, 1), values_of(mask, 2)
    q, k, v = point[:3]
    out, lse = torch.ops.arcore.block_sparse_attention(q, k, v, mask.bounds, mask.key_bounds, 0.3)
    arguments = (q, k, v, out, lse, *direction[:3], None, mask.bounds, mask.key_bounds, 0.3)
    found = torch.ops.arcore.block_sparse_attention_jvp(*arguments)
    assert_same(found, tiled_jvp(*arguments))
    empty = ~mask.to_bool().expand(2, 4, -1, -1).any(-1)
    assert found[0][empty].eq(0).all()
    assert found[1][empty].eq(0).all()


def test_no_matrix_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts written in PyTorch give the same numbers for any block of rows."""
    mask = random_full_rows(random_mask(40, 50, seed=1, batch=2, heads=4))
    whole = reverse_over_jvp(loss(block_sparse_attention, mask), values_of(mask, 1), values_of(mask, 2))
    monkeypatch.setattr("arcore.ops._block_sparse_attention_rules._LOGITS_AT_ONCE", 2 * 4 * 50 * 7)
    parts = reverse_over_jvp(loss(block_sparse_attention, mask), values_of(mask, 1), values_of(mask, 2))
    assert_same(parts, whole)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_poison_stays_behind_the_mask(poison: float) -> None:
    mask = masks.causal(90)
    x: Inputs = make_inputs(mask, batch=1, heads=2, kv_heads=1, dim=16)
    t: Inputs = make_inputs(mask, batch=1, heads=2, kv_heads=1, dim=16, seed=1)

    def run(k: Tensor, v: Tensor, tk: Tensor, tv: Tensor) -> Tensor:
        def f(q: Tensor, k: Tensor, v: Tensor) -> Any:
            return block_sparse_attention(q, k, v, mask)

        return jvp(f, (x.q, k, v), (t.q, tk, tv))[1]

    expected = run(x.k, x.v, t.k, t.v)
    clean = (x.k, x.v, t.k, t.v)
    for i in range(4):
        dirty = [y.clone() for y in clean]
        dirty[i][:, :, 60] = poison
        found = run(*dirty)
        torch.testing.assert_close(found[:, :, :60], expected[:, :, :60], rtol=0, atol=1e-6)
        assert not found[:, :, 60:].isfinite().all(-1).any()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("second", ["reverse over reverse", "reverse over forward"])
def test_poison_stays_behind_the_mask_in_second_derivatives(second: str, poison: float) -> None:
    """Queries, keys and values of another document are as without."""
    mask, length, place = masks.documents([20, 20]), 20, 25
    x: Inputs = make_inputs(mask, batch=1, heads=2, kv_heads=1, dim=16)
    t: Inputs = make_inputs(mask, batch=1, heads=2, kv_heads=1, dim=16, seed=1)

    def run(k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        leaves = [y.clone().requires_grad_() for y in (x.q, k, v)]

        def f(*values: Tensor) -> Any:
            return block_sparse_attention(*values, mask)

        if second == "reverse over forward":
            moved = jvp(f, tuple(leaves), (t.q, t.k, t.v))[1]
            return torch.autograd.grad(moved, leaves, x.grad_out)
        weight = x.grad_out.clone().requires_grad_()
        first = torch.autograd.grad(f(*leaves), leaves, weight, create_graph=True)
        return torch.autograd.grad(first, [*leaves, weight], [t.q, t.k, t.v])

    clean = run(x.k, x.v)
    for i in range(2):
        dirty = [x.k.clone(), x.v.clone()]
        dirty[i][:, :, place] = poison
        results = run(*dirty)
        for found, expected in zip(results, clean, strict=True):
            torch.testing.assert_close(found[:, :, :length], expected[:, :, :length], rtol=0, atol=1e-5)
        assert not all(found[:, :, length:].isfinite().all() for found in results), (
            "what is seen is not hidden"
        )


def test_a_row_that_sees_one_key_moves_with_its_value_alone() -> None:
    mask = masks.documents([1] * 40)
    (q, k, v, *_), (tq, tk, tv, *_) = (values_of(mask, s, heads=2, kv_heads=2, v_dim=12) for s in (1, 2))
    found = jvp(lambda q, k, v: block_sparse_attention(q, k, v, mask), (q, k, v), (tq, tk, tv))[1]
    assert torch.equal(found, tv)


def test_third_derivatives_and_nested_forward_mode_are_refused() -> None:
    mask = masks.causal(4)
    q = torch.randn(1, 1, 4, 8, requires_grad=True)

    def f(q: Tensor) -> Tensor:
        return block_sparse_attention(q, q, q, mask).square().sum()

    (first,) = torch.autograd.grad(f(q), q, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no third derivative; use reference_block_sparse_attention"):
        second.sum().backward()
    out, lse = torch.ops.arcore.block_sparse_attention(
        q.detach(), q.detach(), q.detach(), mask.bounds, None, 1.0
    )
    x = q.detach()
    with pytest.raises(RuntimeError, match="no nested forward-mode derivative"):
        jvp(
            lambda t: torch.ops.arcore.block_sparse_attention_jvp(
                x, x, x, out, lse, t, None, None, None, mask.bounds, None, 1.0
            ),
            (x,),
            (x,),
        )


@pytest.mark.parametrize(
    "transform", ["jvp", "grad", "vmap_grad", "reverse_over_jvp", "reverse_over_reverse"]
)
def test_compiled_transforms(transform: str) -> None:
    mask = masks.sliding_window(20, 7, sinks=2)
    point, direction = values_of(mask, 1), values_of(mask, 2)
    f = loss(block_sparse_attention, mask)
    wanted = TRANSFORMS[transform](loss(dense, mask), point, direction)
    if transform == "reverse_over_jvp":
        step = torch.compile(lambda *x: jvp(f, x, direction), fullgraph=True, backend="aot_eager")
        x = leaves(point)
        value, tangent = step(*x)
        found = torch.autograd.grad(value + tangent.square(), x)
    elif transform == "reverse_over_reverse":
        step = torch.compile(f, fullgraph=True, backend="eager")
        found = reverse_over_reverse(step, point, direction)
    else:
        step = torch.compile(lambda x, t: TRANSFORMS[transform](f, x, t), fullgraph=True, backend="aot_eager")
        found = step(point, direction)
    assert_same(found, wanted)


def test_forward_mode_under_autocast() -> None:
    mask = masks.causal(12)
    (q, k, v, *_), (tq, tk, tv, *_) = values_of(mask, 1), values_of(mask, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, tangent = jvp(lambda q, k, v: block_sparse_attention(q, k, v, mask), (q, k, v), (tq, tk, tv))
    assert out.dtype == tangent.dtype == torch.bfloat16
    half = [x.bfloat16() for x in (q, k, v, tq, tk, tv)]
    same = jvp(lambda q, k, v: block_sparse_attention(q, k, v, mask), tuple(half[:3]), tuple(half[3:]))
    assert torch.equal(tangent, same[1])


def test_a_module_by_functional_call() -> None:
    """Per-sample gradients of a layer, as torch.func's tutorials take them."""
    mask = masks.causal(6)
    layer = torch.nn.Linear(8, 24)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def one(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        q, k, v = functional_call(layer, parameters, (x,)).view(1, 6, 3, 1, 8).permute(2, 0, 3, 1, 4)
        return block_sparse_attention(q, k, v, mask).square().sum()

    x = torch.randn(3, 6, 8)
    found = vmap(grad(one), in_dims=(None, 0))(parameters, x)
    for i in range(3):
        alone = grad(one)(parameters, x[i])
        for name, value in alone.items():
            torch.testing.assert_close(found[name][i], value, rtol=0, atol=1e-5)


PROBE = """
import torch
from tests.block_sparse_attention.test_derivatives import POINTS, TRANSFORMS, both
from arcore import masks
print(torch.ops.arcore.cpu_isa())
for name in POINTS:
    both(TRANSFORMS["jvp"], POINTS[name]())
    both(TRANSFORMS["reverse_over_jvp"], POINTS[name]())
both(TRANSFORMS["jvp"], masks.next_scale((1, 2, 3, 4, 5, 6, 8)))
"""


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa: str) -> None:
    run_under(isa, PROBE)
