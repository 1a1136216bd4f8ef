"""What must hold of token_logprobs on a device: `check_*(device, small)`, see tests/device_checks.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from arcore.ops import (
    linear_cross_entropy,
    linear_logprobs,
    reference_linear_cross_entropy,
    reference_linear_logprobs,
    reference_token_cross_entropy,
    token_cross_entropy,
    token_logprobs,
)
from tests import device_checks as checks
from tests.token_logprobs.cases import (
    IGNORE,
    Case,
    assert_as_good_as_eager,
    make_case,
    pack_mask,
    random_mask,
    run,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _ours(device: str) -> Any:
    return checks.on(device, token_logprobs)


def _there(case: Case, device: str) -> Case:
    return Case(
        checks.moved(case.logits, device),
        checks.moved(case.target, device),
        tuple(checks.moved(t, device) for t in case.cotangents),  # type: ignore[arg-type]
        {name: checks.moved(value, device) for name, value in case.options.items()},
    )


def _everything(case: Case) -> list[Tensor]:
    return list(run(token_logprobs, case, case.logits.dtype).values())


def check_options(device: str, small: bool) -> None:
    """Softcap, temperature as a number and per row, ignored targets, masks in both forms, with and without entropy."""
    rows = torch.rand(2, 5, generator=torch.Generator().manual_seed(2)) + 0.3
    kept = random_mask(2, 5, 2500, share=0.7)
    for dtype in DTYPES[:2] if small else DTYPES:
        for softcap in (None, 5.0):
            for temperature in (0.7, rows):
                for mask in (None, kept, pack_mask(kept)):
                    options = {"softcap": softcap, "temperature": temperature, "mask": mask}
                    case = make_case(2, 5, 2500, dtype=dtype, **options)
                    case.target[0, 1] = IGNORE
                    assert_as_good_as_eager(case, function=_ours(device))
                    assert_as_good_as_eager(case, entropy=False, function=_ours(device))


def check_cross_entropy(device: str, small: bool) -> None:
    """Smoothing, z-loss and agreement, of logits and of a last layer, with gradients."""
    generator = torch.Generator().manual_seed(5)
    rows, vocab = (6, 90) if small else (300, 32001)
    hidden, weight = (torch.randn(n, 24, generator=generator) for n in (rows, vocab))
    target = torch.randint(vocab, (rows,), generator=generator)
    target[1] = IGNORE
    target[2] = (hidden[2] @ weight.T).argmax()
    options = {
        "label_smoothing": 0.1,
        "z_loss": 1e-2,
        "softcap": 6.0,
        "temperature": 0.7,
        "ignore_index": IGNORE,
    }
    mask = random_mask(vocab, share=0.9)
    mask[target[2]] = True
    for kept in (None, mask):
        for ours, reference, inputs in (
            (token_cross_entropy, reference_token_cross_entropy, [hidden @ weight.T]),
            (linear_cross_entropy, reference_linear_cross_entropy, [hidden, weight]),
        ):
            found = []
            for function, dtype in ((checks.on(device, ours), torch.float32), (reference, torch.float64)):
                leaves = [x.to(dtype).requires_grad_() for x in inputs]
                out = function(*leaves, target, mask=kept, **options)
                loss = out.loss.where(out.loss.isfinite(), 0.0)
                found.append([loss, out.z_loss, out.agrees, *torch.autograd.grad(loss.sum(), leaves)])
            for a, b in zip(*found, strict=True):
                torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-4, atol=1e-5, equal_nan=True)
    assert found[0][2][2]


def check_vocabularies(device: str, small: bool) -> None:
    sizes = (1, 65) if small else (1, 2, 7, 8, 9, 31, 33, 127, 1000, 2047, 2049, 6151, 32768, 32769, 128256)
    for vocab in sizes:
        for dtype in (torch.bfloat16, torch.float32):
            assert_as_good_as_eager(make_case(3, vocab, dtype=dtype), function=_ours(device))
            mask = pack_mask(random_mask(3, vocab, share=0.7))
            assert_as_good_as_eager(make_case(3, vocab, dtype=dtype, mask=mask), function=_ours(device))


def check_scales(device: str, small: bool) -> None:
    for scale in (0.0, 30.0) if small else (0.0, 0.01, 1.0, 30.0, 1e4):
        assert_as_good_as_eager(make_case(3, 5000, scale=scale), function=_ours(device))
    sharp = make_case(50, 5000, scale=15.0)
    sharp.target = sharp.logits.argmax(-1)
    assert_as_good_as_eager(sharp, function=_ours(device))


def check_layouts(device: str, small: bool) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        case = make_case(4, 6, 100, dtype=dtype)
        expected = _everything(_there(case, device))
        sliced = case.logits.repeat_interleave(2, dim=0).repeat_interleave(3, dim=1)[::2, ::3]
        permuted = case.logits.transpose(0, 1).contiguous().transpose(0, 1)
        shifted = torch.nn.functional.pad(case.logits, (1, 2))[..., 1:-2]
        for logits in (sliced, permuted, shifted):
            other = Case(logits, case.target, case.cotangents, case.options)
            checks.assert_equal(_everything(_there(other, device)), expected, str(logits.stride()))


def check_empty(device: str, small: bool) -> None:
    for shape in ((0, 50), (3, 0, 50)):
        out = _ours(device)(torch.randn(shape), torch.zeros(shape[:-1], dtype=torch.int64))
        assert out.logp.shape == shape[:-1] and out.logsumexp.shape == shape[:-1]


def check_linear(device: str, small: bool) -> None:
    """The fused linear layer and log-probabilities, with gradients."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(37, 24, generator=generator), torch.randn(700, 24, generator=generator)
    target, grad = torch.randint(700, (37,), generator=generator), torch.randn(37, generator=generator)

    def everything(function: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (hidden, weight)]
        out = function(*leaves, target, return_entropy=True)
        results = [out.logp, out.logsumexp, out.entropy]
        grads = torch.autograd.grad(results, leaves, [grad.to(t.dtype) for t in results])
        return [t.detach() for t in (*results, *grads)]

    exact = everything(reference_linear_logprobs, torch.float64)
    for got, expected in zip(
        everything(checks.on(device, linear_logprobs), torch.float32), exact, strict=True
    ):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


def check_opcheck(device: str, small: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        case = _there(make_case(2, 3, 70, dtype=dtype), device)
        rows = (torch.rand(2, 3, device=device) + 0.5).requires_grad_()
        mask = checks.moved(pack_mask(random_mask(2, 3, 70, share=0.9)), device)
        for arguments in ((None, None, 1.0, 0.0), (rows, mask, 0.9, 5.0)):
            torch.library.opcheck(
                torch.ops.arcore.token_logprobs.default,
                (case.logits.requires_grad_(), case.target, *arguments, IGNORE, True),
            )
        logits, plain = case.logits.detach(), rows.detach()
        state = torch.ops.arcore.token_logprobs(logits, case.target, plain, None, 1.0, 0.0, IGNORE, True)[3]
        torch.library.opcheck(
            torch.ops.arcore.token_logprobs_backward.default,
            (*case.cotangents, logits, case.target, plain, None, state, 1.0, 0.0, IGNORE),
        )


def check_compile(device: str, small: bool) -> None:
    case = _there(make_case(2, 5, 70), device)

    def step(logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        out = token_logprobs(2 * logits, target, temperature=0.7, return_entropy=True)
        return out.logp, out.logsumexp, out.entropy

    logits = case.logits.requires_grad_()
    checks.assert_compiles(step, logits, case.target, backend=checks.backend_for(small))


def check_graph(device: str, small: bool) -> None:
    """Forward and backward in a captured graph, replayed with other inputs, without waiting for the device."""
    for dtype, vocab in ((torch.float32, 1000), (torch.bfloat16, 2000 if small else 128256)):
        cases = [make_case(5, vocab, dtype=dtype, seed=s) for s in range(4)]

        def step(logits: Tensor, target: Tensor, *cotangents: Tensor) -> list[Tensor]:
            return _everything(Case(logits, target, cotangents))  # type: ignore[arg-type]

        checks.assert_replays(device, step, [(c.logits, c.target, *c.cotangents) for c in cases])
        case = _there(cases[0], device)
        with checks.no_host_sync(device):
            _everything(case)


def check_determinism(device: str, small: bool) -> None:
    for shape in ((7, 900),) if small else ((700, 4096), (9, 128256)):
        case = _there(make_case(*shape, dtype=torch.bfloat16), device)
        checks.assert_repeatable(lambda case=case: _everything(case), 5 if small else 50)


def check_batch_mates(device: str, small: bool) -> None:
    for vocab in (900,) if small else (900, 40000, 128256):
        case = _there(make_case(5, vocab, dtype=torch.bfloat16), device)
        together = _everything(case)
        for i in range(5):
            rows = slice(i, i + 1)
            mine = Case(case.logits[rows], case.target[rows], tuple(t[rows] for t in case.cotangents))
            checks.assert_equal(_everything(mine), [t[rows] for t in together], f"row {i}")


def check_large_offsets(device: str, small: bool) -> None:
    """Rows more than 2^31 elements apart, and more than 2^31 logits and gradients."""
    case = _there(make_case(2, 3, 500, dtype=torch.bfloat16), device)
    far = Case(checks.far_apart(case.logits, small, device), case.target, case.cotangents)
    checks.assert_equal(_everything(far), _everything(case), "far apart")
    rows, vocab = (5, 300) if small else (17000, 128256)
    checks.need_memory(8 * rows * vocab, device)
    pair = _there(make_case(2, vocab, dtype=torch.bfloat16), device)

    def grown(t: Tensor) -> Tensor:
        return torch.cat([t[:1].expand(rows - 1, *t.shape[1:]), t[1:]])

    whole = _everything(Case(grown(pair.logits), grown(pair.target), tuple(map(grown, pair.cotangents))))
    expected = _everything(pair)
    for i, source in ((0, 0), (rows - 2, 0), (rows - 1, 1)):
        checks.assert_equal([t[i] for t in whole], [t[source] for t in expected], f"row {i}")


CHECKS = (
    check_options,
    check_cross_entropy,
    check_vocabularies,
    check_scales,
    check_layouts,
    check_empty,
    check_linear,
    check_opcheck,
    check_compile,
    check_graph,
    check_determinism,
    check_batch_mates,
    check_large_offsets,
)
SANITIZED = (check_options, check_vocabularies, check_layouts)
# Their failure cannot be brought about by wrong results: the op is called by its own name, or on nothing.
NOT_DISTURBED = (check_opcheck, check_empty)
FUNCTIONS = ("token_logprobs", "linear_logprobs", "token_cross_entropy", "linear_cross_entropy")
