"""opcheck, torch.compile, torch.export."""

from __future__ import annotations

import pytest
import torch

from arcore.ops import linear_logprobs, token_logprobs
from tests.token_logprobs.cases import make_case, pack_mask, random_mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", ["plain", "all"])
def test_opcheck(dtype, options):
    case = make_case(2, 3, 70, dtype=dtype)
    rows = mask = None
    if options == "all":
        rows = (torch.rand(2, 3) + 0.5).requires_grad_()
        mask = pack_mask(random_mask(2, 3, 70, share=0.9))
    for entropy in (False, True):
        torch.library.opcheck(
            torch.ops.arcore.token_logprobs.default,
            (case.logits.requires_grad_(), case.target, rows, mask, 0.9, 5.0, -100, entropy),
        )


@pytest.mark.parametrize("with_rows", [False, True])
def test_opcheck_of_the_backward(with_rows):
    case = make_case(2, 3, 70)
    rows = torch.rand(2, 3) + 0.5 if with_rows else None
    state = torch.ops.arcore.token_logprobs(case.logits, case.target, rows, None, 1.0, 0.0, -100, True)[3]
    for grads in (case.cotangents, (case.cotangents[0], None, None)):
        torch.library.opcheck(
            torch.ops.arcore.token_logprobs_backward.default,
            (*grads, case.logits, case.target, rows, None, state, 1.0, 0.0, -100),
        )


@pytest.mark.parametrize("bias", [None, torch.zeros(70)])
def test_opcheck_of_the_linear_op(bias):
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(70, 8, requires_grad=True)
    target = torch.randint(70, (6,))
    torch.library.opcheck(
        torch.ops.arcore.linear_logprobs.default,
        (hidden, weight, bias, target, None, None, 1.0, 0.0, -100, True, 4, 32),
    )


def test_opcheck_of_the_pieces():
    """What linear_logprobs runs on a tile writes what its schema says."""
    tile, target = torch.randn(3, 40), torch.tensor([1, 2, 69])
    state = torch.zeros(3, 4, dtype=torch.float64)
    checks = ("test_schema", "test_autograd_registration")
    torch.library.opcheck(
        torch.ops.arcore.token_logprobs_update_.default,
        (tile, target, None, None, 1.0, 0.0, -100, 0, 70, True, state), test_utils=checks,
    )  # fmt: skip
    torch.library.opcheck(
        torch.ops.arcore.token_logprobs_finish.default,
        (state, target, None, 1.0, -100, 70, True), test_utils=checks,
    )  # fmt: skip
    torch.library.opcheck(
        torch.ops.arcore.token_logprobs_tile_backward_.default,
        (torch.randn(3), None, None, tile, target, None, None, state, 1.0, 0.0, -100, 0, 70, True),
        test_utils=checks,
    )  # fmt: skip


class Score(torch.nn.Module):
    def __init__(self, fused: bool):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Linear(16, 16)
        self.head = torch.nn.Linear(16, 90)
        self.fused = fused

    def forward(self, x, target, temperature):
        x = torch.relu(self.body(x))
        if self.fused:
            out = linear_logprobs(
                x, self.head.weight, target, bias=self.head.bias, temperature=temperature, return_entropy=True
            )
        else:
            out = token_logprobs(self.head(x), target, temperature=temperature, return_entropy=True)
        return out.logp, out.entropy


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("fused", [False, True])
def test_compile_fullgraph(backend, fused):
    model = Score(fused)
    arguments = (torch.randn(2, 5, 16), torch.randint(90, (2, 5)), torch.rand(2, 5) + 0.5)

    def step(function):
        model.zero_grad()
        logp, entropy = function(*arguments)
        (entropy.sum() * 0.1 - logp.sum()).backward()
        return [logp.detach(), entropy.detach(), *(p.grad.clone() for p in model.parameters())]

    expected = step(model)
    got = step(torch.compile(model, fullgraph=True, backend=backend))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_compile_with_dynamic_rows(fused):
    compiled = torch.compile(Score(fused), fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (2, 3, 7):
        logp, _ = compiled(torch.randn(rows, 5, 16), torch.randint(90, (rows, 5)), torch.rand(rows, 5) + 0.5)
        assert logp.shape == (rows, 5)


@pytest.mark.parametrize("fused", [False, True])
def test_export(fused):
    model = Score(fused).eval()
    arguments = (torch.randn(2, 5, 16), torch.randint(90, (2, 5)), torch.rand(2, 5) + 0.5)
    program = torch.export.export(model, arguments)
    for a, b in zip(program.module()(*arguments), model(*arguments), strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_leaves_logits_alone():
    case = make_case(3, 50)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = token_logprobs(case.logits, case.target)
    assert torch.equal(out.logp, token_logprobs(case.logits, case.target).logp)


def test_inference_mode():
    case = make_case(3, 50)
    with torch.inference_mode():
        assert token_logprobs(case.logits, case.target).logp.shape == (3,)
        assert linear_logprobs(torch.randn(3, 4), torch.randn(50, 4), case.target).logp.shape == (3,)
