"""Label smoothing, z-loss and top-1 agreement: against float64, torch's own loss, and in every mode of use."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from arcore import ops
from arcore.ops import (
    _cross_entropy,
    linear_cross_entropy,
    reference_linear_cross_entropy,
    reference_token_cross_entropy,
    token_cross_entropy,
    token_logprobs,
)
from tests.token_logprobs.cases import FLOOR, IGNORE, pack_mask, random_mask

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SETTINGS: list[dict[str, Any]] = [
    {"label_smoothing": 0.1},
    {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 6.0},
    {"label_smoothing": 1.0, "temperature": 0.7},
    {"z_loss": 0.5, "temperature": "rows"},
    {"label_smoothing": 0.3, "z_loss": 1e-2, "temperature": "rows", "softcap": 6.0, "mask": "bool"},
    {"label_smoothing": 0.3, "mask": "bits", "temperature": "rows"},
    {"label_smoothing": 0.2, "mask": "row"},
]


def make(rows: tuple[int, ...], vocab: int, dtype: torch.dtype = torch.float32, width: int = 24) -> tuple:
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(*rows, width, generator=generator).to(dtype)
    weight = (torch.randn(vocab, width, generator=generator) / 2).to(dtype)
    bias = torch.randn(vocab, generator=generator).to(dtype)
    target = torch.randint(vocab, rows, generator=generator)
    return hidden, weight, bias, target


def options(settings: dict[str, Any], rows: tuple[int, ...], vocab: int) -> dict[str, Any]:
    given = dict(settings)
    if given.get("temperature") == "rows":
        given["temperature"] = torch.rand(rows, generator=torch.Generator().manual_seed(1)) + 0.5
    kind = given.get("mask")
    if kind is not None:
        kept = random_mask(*((vocab,) if kind == "row" else (*rows, vocab)), share=0.8)
        given["mask"] = pack_mask(kept) if kind == "bits" else kept
    return given


def run(function: Any, tensors: tuple[Tensor, ...], target: Tensor, dtype: torch.dtype, **given: Any) -> dict:
    leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
    inputs = list(leaves)
    if isinstance(given.get("temperature"), Tensor):
        keep = torch.float64 if dtype == torch.float64 else torch.float32
        given["temperature"] = given["temperature"].to(keep).requires_grad_()
        inputs.append(given["temperature"])
    if len(leaves) == 3:
        out = function(leaves[0], leaves[1], target, bias=leaves[2], **given)
    else:
        out = function(leaves[0], target, **given)
    pull = torch.linspace(-1, 1, target.numel()).view(target.shape).to(out.loss.dtype)
    finite = torch.isfinite(out.loss)
    total = (torch.where(finite, out.loss, 0.0) * pull).sum()
    total = total + (torch.where(finite, out.z_loss, 0.0) * pull.flip(0)).sum()
    grads = torch.autograd.grad(total, inputs)
    names = [*(f"grad_{i}" for i in range(len(leaves))), "grad_temperature"]
    found = {"loss": out.loss.detach(), "z_loss": out.z_loss.detach(), "agrees": out.agrees}
    return found | dict(zip(names, grads, strict=False))


def assert_as_good_as_eager(
    kind: str, tensors: tuple, target: Tensor, dtype: torch.dtype, **given: Any
) -> None:
    op, reference = getattr(ops, f"{kind}_cross_entropy"), getattr(ops, f"reference_{kind}_cross_entropy")
    more = {"tile": given.pop("tile")} if "tile" in given else {}
    exact = run(reference, tensors, target, torch.float64, **given)
    eager = run(reference, tensors, target, dtype, **given)
    ours = run(op, tensors, target, dtype, **given, **more)
    assert ours.keys() == exact.keys()
    assert (ours.pop("agrees") != exact.pop("agrees")).float().mean() <= (
        0 if dtype == torch.float32 else 0.05
    )
    for name, want in exact.items():
        got, finite = ours[name].double(), torch.isfinite(want)
        assert got.shape == want.shape, name
        assert torch.equal(torch.isfinite(got), finite), name
        if not finite.any():
            continue
        error = (got - want)[finite].abs().max().item()
        lost = (eager[name].double() - want)[finite].abs().max().item()
        size = max(1.0, want[finite].abs().max().item())
        of_rows = name in ("loss", "z_loss", "grad_temperature") and kind == "token"
        floor = FLOOR[torch.float32 if of_rows else dtype] * size
        assert error <= 2 * lost + floor, f"{name}: error {error:.3e}, eager loses {lost:.3e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("vocab", [33, 500, 4500])
def test_logits(settings: dict, vocab: int, dtype: torch.dtype) -> None:
    rows = (3, 7)
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(*rows, vocab, generator=generator)).to(dtype)
    target = torch.randint(vocab, rows, generator=generator)
    target[0] = logits[0].argmax(-1)
    target[:, ::3] = IGNORE
    assert_as_good_as_eager("token", (logits,), target, dtype, **options(settings, rows, vocab))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("tile", [None, (5, 96), (21, 32)], ids=str)
def test_head(settings: dict, tile: tuple[int, int] | None, dtype: torch.dtype) -> None:
    rows, vocab = (3, 7), 500
    hidden, weight, bias, target = make(rows, vocab, dtype)
    target[:, ::3] = IGNORE
    given = options(settings, rows, vocab)
    assert_as_good_as_eager("linear", (hidden, weight, bias), target, dtype, **given, tile=tile)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_is_torchs_loss(smoothing: float) -> None:
    x, target = torch.randn(40, 300, requires_grad=True), torch.randint(300, (40,))
    target[::7] = IGNORE
    ours = token_cross_entropy(x, target, label_smoothing=smoothing).loss
    theirs = cross_entropy(x, target, label_smoothing=smoothing, reduction="none")
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad(y.sum(), x) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_z_loss_is_that_of_the_log_sum_exp() -> None:
    x, target = torch.randn(9, 50), torch.randint(50, (9,))
    out, plain = token_cross_entropy(x, target, z_loss=0.3), token_logprobs(x, target)
    assert torch.equal(out.z_loss, 0.3 * plain.logsumexp.square())
    assert torch.equal(out.loss, -plain.logp + out.z_loss)


def test_references_pass_gradcheck() -> None:
    hidden, weight, bias, target = (
        x.double() if x.is_floating_point() else x for x in make((5,), 9, width=3)
    )
    target[1] = IGNORE
    kept = torch.ones(9, dtype=torch.bool)
    kept[4] = False
    heat = torch.rand(5, dtype=torch.float64) + 0.5

    def losses(*x: Tensor) -> tuple[Tensor, Tensor]:
        out = reference_linear_cross_entropy(
            x[0],
            x[1],
            target,
            bias=x[2],
            temperature=x[3],
            label_smoothing=0.2,
            z_loss=0.1,
            softcap=3.0,
            mask=kept,
        )
        return torch.where(out.loss.isinf(), 0.0, out.loss), out.z_loss

    assert torch.autograd.gradcheck(losses, [x.requires_grad_() for x in (hidden, weight, bias, heat)])


def test_agreement_takes_the_lowest_of_equals() -> None:
    x = torch.tensor(
        [[1.0, 5.0, 5.0], [1.0, 5.0, 5.0], [7.0, 5.0, 5.0], [-math.inf] * 3, [1.0, math.nan, 0.0]]
    )
    target = torch.tensor([1, 2, 0, 0, 0])
    want = [True, False, True, False, False]
    assert token_cross_entropy(x, target).agrees.tolist() == want
    assert reference_token_cross_entropy(x, target).agrees.tolist() == want
    kept = torch.tensor([False, True, True])
    assert token_cross_entropy(x[2:3], torch.tensor([1]), mask=kept).agrees.tolist() == [True]
    wide = torch.zeros(1, 10_000)
    wide[0, [4097, 9000]] = 2.0
    assert token_cross_entropy(wide, torch.tensor([4097])).agrees.item()
    head = torch.eye(3)
    assert linear_cross_entropy(x[:3], head, target[:3]).agrees.tolist() == want[:3]


@pytest.mark.parametrize("function", [token_cross_entropy, reference_token_cross_entropy])
def test_edge_rows(function: Any) -> None:
    x = torch.randn(6, 20)
    x[1] = -math.inf
    x[2, 3] = -math.inf
    x[3, 5] = math.nan
    target = torch.tensor([0, 0, 3, 0, IGNORE, 0])
    x[4] = math.nan
    x.requires_grad_()
    out = function(x, target, label_smoothing=0.1, z_loss=0.1)
    assert out.loss[0].isfinite()
    assert out.loss[1] == out.loss[2] == math.inf
    assert out.loss[3].isnan()
    assert out.loss[4] == out.z_loss[4] == 0
    assert not out.agrees[1:5].any()
    out.loss[[0, 4, 5]].sum().backward()
    assert x.grad is not None
    others = x.grad[[0, 1, 2, 4, 5]]
    assert others.isfinite().all()
    assert (others[3] == 0).all()


def test_an_infinite_loss_sends_no_nan() -> None:
    x = torch.randn(2, 20)
    x[1] = -math.inf
    x.requires_grad_()
    token_cross_entropy(x, torch.tensor([1, 1]), label_smoothing=0.1, z_loss=0.1).loss.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert (x.grad[1] == 0).all()


def test_rows_do_not_depend_on_batch_mates_threads_or_layout() -> None:
    x, target = torch.randn(40, 9000), torch.randint(9000, (40,))

    def bits(logits: Tensor, y: Tensor) -> list[Tensor]:
        leaf = logits.detach().requires_grad_()
        out = token_cross_entropy(leaf, y, label_smoothing=0.1, z_loss=0.1)
        out.loss.sum().backward()
        assert leaf.grad is not None
        return [out.loss.detach(), out.agrees, leaf.grad]

    whole = bits(x, target)
    for row in (0, 17, 39):
        one = slice(row, row + 1)
        assert all(torch.equal(a[one], b) for a, b in zip(whole, bits(x[one], target[one]), strict=True))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert all(torch.equal(a, b) for a, b in zip(whole, bits(x, target), strict=True))
    finally:
        torch.set_num_threads(threads)
    padded = torch.zeros(40, 9100)
    padded[:, 50:9050] = x
    assert all(torch.equal(a, b) for a, b in zip(whole, bits(padded[:, 50:9050], target), strict=True))


@pytest.mark.parametrize("kind", ["token", "linear"])
def test_opcheck_and_compile(kind: str) -> None:
    hidden, weight, bias, target = make((6,), 70)
    target[2] = IGNORE
    heat = torch.rand(6) + 0.5
    if kind == "token":
        logits = linear(hidden, weight, bias).requires_grad_()
        args: tuple = (logits, target, heat.requires_grad_(), random_mask(6, 70, share=0.9), 1.0, 5.0, IGNORE)
        torch.library.opcheck(torch.ops.arcore.token_cross_entropy.default, args)

        def loss(x: Tensor, y: Tensor) -> Tensor:
            return token_cross_entropy(x, y, label_smoothing=0.1, z_loss=1e-3).loss
    else:
        leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
        args = (*leaves, target, heat.requires_grad_(), None, 1.0, 5.0, IGNORE, 4, 32)
        torch.library.opcheck(torch.ops.arcore.linear_cross_entropy.default, args)
        logits = hidden

        def loss(x: Tensor, y: Tensor) -> Tensor:
            return linear_cross_entropy(x, weight, y, label_smoothing=0.1, z_loss=1e-3, tile=(4, 32)).loss

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    logits = logits.detach()
    for n in (6, 4):
        assert torch.equal(compiled(logits[:n], target[:n]), loss(logits[:n], target[:n]))


def test_transforms_of_torch_func() -> None:
    hidden, weight, _, target = make((6,), 70)
    x = linear(hidden, weight)

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        return token_cross_entropy(logits, y, label_smoothing=0.1, z_loss=0.1).loss.sum()

    want = torch.func.grad(loss)(x, target)
    each = torch.func.vmap(torch.func.grad(loss))(x.unsqueeze(1), target.unsqueeze(1)).squeeze(1)
    assert torch.equal(each, want)
    leaf = x.clone().requires_grad_()
    assert torch.equal(torch.autograd.grad(loss(leaf, target), leaf)[0], want)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda t: loss(t, target), (x,), (x,))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(torch.autograd.grad(loss(leaf, target), leaf, create_graph=True)[0].sum(), leaf)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda h: linear_cross_entropy(h, weight, target).loss, (hidden,), (hidden,))


def test_head_holds_no_logits() -> None:
    """The largest tensor that forward and backward make is a tile, or a gradient of an input."""
    from torch.utils._python_dispatch import TorchDispatchMode

    rows, vocab = 512, 20_000
    hidden, weight, bias, target = make((rows,), vocab, width=16)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]

    class Largest(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.elements = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, Tensor):
                    self.elements = max(self.elements, t.untyped_storage().nbytes() // 4)
            return out

    with Largest() as seen:
        loss = linear_cross_entropy(
            hidden, weight, target, bias=bias, label_smoothing=0.1, tile=(512, 256)
        ).loss
        loss.sum().backward()
    assert all(x.grad is not None for x in leaves)
    assert 512 * 256 <= seen.elements <= vocab * 16 < rows * vocab // 20


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"label_smoothing": 1.5}, ValueError, "expected label_smoothing from 0 to 1 but got 1.5"),
        ({"label_smoothing": math.nan}, ValueError, "expected label_smoothing from 0 to 1 but got nan"),
        ({"label_smoothing": True}, TypeError, "expected label_smoothing to be a number but got True"),
        ({"z_loss": -1.0}, ValueError, "expected z_loss >= 0 and finite but got -1.0"),
        ({"z_loss": math.inf}, ValueError, "expected z_loss >= 0 and finite but got inf"),
        ({"z_loss": "much"}, TypeError, "expected z_loss to be a number but got 'much'"),
        ({"temperature": 0.0}, ValueError, "expected temperature to be positive"),
        ({"target": torch.tensor([0, 1, 9])}, ValueError, r"expected targets in \[0, 9\)"),
        ({"target": torch.tensor([0, 1])}, ValueError, r"expected target of shape \(3,\)"),
        ({"mask": torch.ones(3, 4, dtype=torch.bool)}, ValueError, "expected mask"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["token", "linear"])
def test_wrong_arguments(kind: str, change: dict, error: type[Exception], message: str) -> None:
    given = {"target": torch.tensor([0, 1, 2]), **change}
    with pytest.raises(error, match=rf"^arcore\.{kind}_cross_entropy: {message}"):
        if kind == "token":
            token_cross_entropy(torch.randn(3, 9), **given)
        else:
            linear_cross_entropy(torch.randn(3, 2), torch.randn(9, 2), **given)


def test_float64_names_the_reference() -> None:
    target = torch.tensor([0, 1, 2])
    with pytest.raises(TypeError, match="call reference_token_cross_entropy"):
        token_cross_entropy(torch.randn(3, 9).double(), target)
    with pytest.raises(TypeError, match="call reference_linear_cross_entropy"):
        linear_cross_entropy(torch.randn(3, 2).double(), torch.randn(9, 2).double(), target)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_way_of_a_gpu(settings: dict[str, Any], dtype: torch.dtype) -> None:
    """logp and logsumexp of `token_logprobs`, the rest by PyTorch: the same numbers and gradients."""
    generator = torch.Generator().manual_seed(2)
    logits = (3 * torch.randn(3, 4, 50, generator=generator)).to(dtype)
    target = torch.randint(50, (3, 4), generator=generator)
    logits[0, 0, :] = -math.inf
    target[1, 1] = IGNORE
    target[2] = logits[2].argmax(-1)
    given = {"temperature": 1.0, "softcap": None, "mask": None, **options(settings, (3, 4), 50)}
    smoothing, coefficient = given.pop("label_smoothing", 0.0), given.pop("z_loss", 0.0)

    def ours(x: Tensor, target: Tensor, **kw: Any) -> Any:
        return _cross_entropy._by_logprobs(x, target, smoothing, coefficient, ignore_index=IGNORE, **kw)

    def theirs(x: Tensor, target: Tensor, **kw: Any) -> Any:
        kw |= {"label_smoothing": smoothing, "z_loss": coefficient, "ignore_index": IGNORE}
        return token_cross_entropy(x, target, **kw)

    found = []
    for function in (ours, theirs):
        leaf = logits.clone().requires_grad_()
        out = function(leaf, target, **given)
        loss = out.loss.where(out.loss.isfinite(), 0.0)
        found.append((*out, torch.autograd.grad(loss.sum(), leaf)[0].float()))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)


@pytest.mark.parametrize("at_once", [1 << 25, 1], ids=["whole", "a_row"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_way_of_a_gpu_from_a_last_layer(
    settings: dict[str, Any], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cross_entropy, "_LOGITS_AT_ONCE", at_once)
    hidden, weight, bias, target = make((3, 4), 50)
    target[1, 1] = IGNORE
    given = {"temperature": 1.0, "softcap": None, "mask": None, **options(settings, (3, 4), 50)}
    smoothing, coefficient = given.pop("label_smoothing", 0.0), given.pop("z_loss", 0.0)
    found = []
    for gpu in (True, False):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        if gpu:
            x = _cross_entropy.prepare_linear(
                "linear_cross_entropy", leaves[0], leaves[1], leaves[2], target, given["temperature"],
                given["softcap"], given["mask"], IGNORE, None,
            )  # fmt: skip
            out = _cross_entropy._linear_by_rows(x, smoothing, coefficient)
        else:
            out = linear_cross_entropy(
                leaves[0], leaves[1], target, bias=leaves[2], label_smoothing=smoothing, z_loss=coefficient,
                ignore_index=IGNORE, **given,
            )  # fmt: skip
        parts = [part.view(target.shape) for part in out]
        found.append((*parts, *torch.autograd.grad(parts[0].sum(), leaves)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
