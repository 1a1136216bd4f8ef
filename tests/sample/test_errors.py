"""Errors name the argument, what was expected, what came, and the way out."""

from __future__ import annotations

import re

import pytest
import torch

from arcore.ops import confidence_mask, filter_probs, reference_sample, sample

X = torch.zeros(2, 8)
SEEDS = torch.arange(2)

VALUE_ERRORS = [
    (dict(top_p=-0.1), "arcore.sample: expected top_p in [0, 1] but got -0.1"),
    (dict(top_k=-2), "expected top_k in [-1, inf] but got -2"),
    (dict(min_p=1.5), "expected min_p in [0, 1] but got 1.5"),
    (dict(temperature=-1.0), "expected temperature in [0, 3e+38] but got -1.0"),
    (dict(temperature=float("nan")), "expected temperature in [0, 3e+38] but got nan"),
    (dict(repetition_penalty=0.0), "expected repetition_penalty in [1e-06, 1e+06] but got 0.0"),
    (dict(repetition_penalty=1.3), "repetition_penalty acts on the tokens of history or prompt, and there are none"),
    (dict(presence_penalty=0.5, prompt=SEEDS), "presence_penalty acts on the tokens of history, and there are none"),
    (dict(frequency_penalty=-0.5, top_k=3, min_tokens_to_keep=2), "frequency_penalty acts on the tokens of history"),
    (dict(top_p=torch.rand(3)), "expected top_p of a shape that broadcasts to (2,) but got (3,)"),
    (dict(mask=X[:, 1:].bool()), "expected mask of a shape that broadcasts to (2, 8) but got (2, 7)"),
    (dict(mask=X[:, :2].int()), "expected mask of a shape that broadcasts to (2, 1) but got (2, 2)"),
    (dict(bias=torch.zeros(3, 8)), "expected bias of a shape that broadcasts to (2, 8) but got (3, 8)"),
    (dict(uncond=X), "expected uncond and cfg_scale together but got only one of them"),
    (dict(cfg_scale=2.0), "expected uncond and cfg_scale together but got only one of them"),
    (dict(uncond=X[:1], cfg_scale=2.0), "all of the same, but got (2, 8) and (1, 8)"),
    (dict(weights=[1.0, 2.0]), "expected 1 weights, one per tensor of logits, but got 2"),
    (dict(order="flashinfer"), "expected order 'hf', 'vllm' or 'joint' but got 'flashinfer'"),
    (dict(mode="beam"), "expected mode 'inverse_cdf', 'gumbel' or 'greedy' but got 'beam'"),
    (dict(num_samples=0), "expected num_samples >= 1 but got 0"),
    (dict(return_logprob="yes"), "expected return_logprob None, 'raw' or 'processed' but got 'yes'"),
    (dict(seed=1), "give a seed per row, or offset=torch.arange(...) for positions of one sequence"),
    (dict(generator=torch.Generator()), "expected seed or generator but got both; give one"),
    (dict(out=torch.zeros(3, dtype=torch.int64)), "expected out int64 of shape (2,) but got int64 (3,)"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "text"), VALUE_ERRORS, ids=lambda v: v[:40] if isinstance(v, str) else "_".join(v)
)
def test_value_errors(arguments, text):
    for function in (sample, reference_sample):
        with pytest.raises(ValueError, match=re.escape(text)):
            function(X, **{"seed": SEEDS, **arguments})


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (dict(mask=torch.ones(2, 8)), "expected mask of dtype bool, or int32 with 32 tokens per word, but got float32"),
        (dict(history=torch.zeros(2, 3)), "expected history of dtype int64 but got float32"),
        (dict(seed=torch.zeros(2)), "expected seed of dtype int64 but got float32"),
        (dict(offset=torch.zeros(2, dtype=torch.int32)), "expected offset of dtype int64 but got int32"),
    ],
)  # fmt: skip
def test_type_errors(arguments, text):
    with pytest.raises(TypeError, match=re.escape(text)):
        sample(X, **{"seed": SEEDS, **arguments})


def test_logits():
    with pytest.raises(TypeError, match="float32, bfloat16 or float16 but got float64; convert them"):
        filter_probs(X.double())
    with pytest.raises(TypeError, match="but got list"):
        filter_probs([X.tolist()])
    with pytest.raises(ValueError, match="expected weights for 2 tensors of logits but got none"):
        filter_probs([X, X])
    with pytest.raises(ValueError, match="expected 1 to 8 tensors of logits but got 9"):
        filter_probs([X] * 9, weights=[1.0] * 9)
    with pytest.raises(ValueError, match=re.escape("expected logits of shape (..., V)")):
        filter_probs(torch.tensor(1.0))


def test_confidence():
    x = torch.rand(2, 5)
    for arguments, text in (
        (dict(ties="some"), "expected ties 'exact', 'all' or 'none' but got 'some'"),
        (dict(temperature=-1.0), "expected a finite temperature >= 0 but got -1.0"),
        (dict(count=-1), "expected count >= 0 but got -1"),
        (dict(count=torch.ones(3, dtype=torch.int64)), "expected count of a shape that broadcasts to (2,)"),
        (dict(temperature=1.0, seed=3), "give a seed per row"),
    ):
        with pytest.raises(ValueError, match=re.escape(text)):
            confidence_mask(x, **{"count": 2, **arguments})
    for arguments, text in (
        (dict(count=torch.ones(2)), "expected count of dtype int64 but got float32"),
        (dict(candidates=x), "expected candidates of dtype bool but got float32"),
    ):
        with pytest.raises(TypeError, match=re.escape(text)):
            confidence_mask(x, **{"count": 2, **arguments})
    with pytest.raises(TypeError, match="expected confidence of a float dtype but got int64"):
        confidence_mask(torch.ones(2, 5, dtype=torch.int64), 2)


def test_the_op_checks_what_it_relies_on():
    """Below Python, too: wrong strides or sizes would read foreign memory."""
    one = torch.zeros(1, dtype=torch.int64)
    settings = torch.tensor([[1.0, 0, 1, 0, 1, 0, 0, 1, 0, 0, 1]], dtype=torch.float64)
    op = torch.ops.arcore.filter_probs
    good = (None, None, None, None, 0, False, False)
    with pytest.raises(RuntimeError, match=re.escape("expected settings of shape (1 or 2, 11)")):
        op([X[None]], settings[:, 1:], *good)
    with pytest.raises(RuntimeError, match="expected 1 to 8 tensors of logits but got 0"):
        op([], settings, *good)
    with pytest.raises(RuntimeError, match=re.escape("without the first ones, but got (1, 1, 2, 8)")):
        op([X[None, None]], settings, *good)
    with pytest.raises(
        RuntimeError, match=re.escape("expected all logits of shape (2, 8) but got (1, 2, 8)")
    ):
        op([X, X[None]], settings, *good)
    for fewer in (X, X[0]):  # the first dimensions may be left out
        assert torch.equal(op([fewer], settings, *good)[0], op([fewer.view(1, -1, 8)], settings, *good)[0])
    with pytest.raises(RuntimeError, match=re.escape("expected bias of shape (1, 2, 8) but got (1, 2, 7)")):
        op([X[None]], settings, X[None, :, 1:], *good[1:])
    with pytest.raises(RuntimeError, match="expected order 0, 1 or 2 but got 3"):
        op([X[None]], settings, *good[:4], 3, False, False)
    with pytest.raises(RuntimeError, match="expected seed of dtype Long but got Float"):
        torch.ops.arcore.sample(
            [X[None]], settings, *good[:4], torch.zeros(1), one, 1, 0, 0, *(False,) * 5
        )  # fmt: skip


def test_penalties_that_are_off_or_meet_an_empty_history_need_no_tokens():
    plain = sample(X, seed=SEEDS)
    none = torch.empty(2, 0, dtype=torch.int64)
    for options in (
        {"repetition_penalty": 1.0, "presence_penalty": 0, "frequency_penalty": 0.0},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5, "history": none},
        {"repetition_penalty": 1.3, "prompt": none},
        {"repetition_penalty": torch.tensor([1.0, 1.3])},
    ):
        assert torch.equal(sample(X, seed=SEEDS, **options), plain)
