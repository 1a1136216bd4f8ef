"""Settings in tensors, whose values nobody reads before the kernel: their rows suffer, never memory or other rows."""

from __future__ import annotations

import math
import re

import pytest
import torch

from arcore.ops import _sample_reference as rules
from arcore.ops import (
    confidence_mask,
    filter_probs,
    logits_from_probs,
    reference_filter_probs,
    reference_sample,
    sample,
)

INF = math.inf
# The least and the largest that a setting may be, from which numbers just outside follow.
SETTINGS = {name: ends for name, ends in rules.RANGES.items() if name != "weights"}
HOSTILE = (INF, -INF, math.nan, 1e300, -1e300, -1.0, -1e-9, 1.5, 1e39, 3.4e38, 0.0, 1e-40, 1e-300)


def extreme_rows(vocab: int) -> torch.Tensor:
    torch.manual_seed(0)
    rows = torch.randn(4, vocab)
    rows[1] = torch.where(torch.rand(vocab) < 0.5, 3e38, -3e38)
    rows[2] = 1e38 * rows[2]
    rows[3, ::2] = -INF
    return rows


@pytest.mark.parametrize("name", [*SETTINGS, "weights"])
@pytest.mark.parametrize("vocab", [1, 17, 100, 5000])
def test_any_number_in_a_tensor_is_safe(name, vocab):
    x, seed = extreme_rows(vocab), torch.arange(4)
    low, high = rules.RANGES[name]
    for value in HOSTILE:
        setting = torch.full((4,), value, dtype=torch.float64)
        if name == "top_k":
            if not math.isfinite(value) or abs(value) > 2**62:
                continue
            setting = setting.long()
        other = {"history": torch.zeros(4, 3, dtype=torch.int64), "top_p": 0.9, "typical_p": 0.9}
        for order in ("hf", "vllm", "joint"):
            kw = {**other, "order": order}
            logits = x
            if name == "weights":
                logits, kw["weights"] = [x, x.flip(-1)], [1.0, setting]
            else:
                kw[name] = setting
            got = sample(
                logits, seed=seed, num_samples=3, return_prob=True, return_valid=True, return_entropy=True,
                return_logprob="processed", return_kept=True, **kw,
            )  # fmt: skip
            number = float(setting[0].float()) if name == "temperature" else float(setting[0])
            if not low <= number <= high:
                assert not got.valid.any(), (name, value)
            valid = got.valid
            assert (got.tokens[~valid] == -1).all() and got.prob[~valid].isnan().all()
            assert ((got.tokens[valid] >= 0) & (got.tokens[valid] < vocab)).all()
            assert ((got.prob[valid] > 0) & (got.prob[valid] <= 1)).all()
            assert (got.entropy[valid] >= -1e-6).all() and (
                got.entropy[valid] <= math.log(vocab) + 1e-5
            ).all()
            assert (got.logprob[valid] <= 0).all()
            probs = filter_probs(logits, **kw)
            assert torch.equal(probs.gather(-1, got.tokens.clamp(min=0))[valid], got.prob[valid])
            if vocab <= 17:
                assert torch.equal(reference_filter_probs(logits, **kw), probs)


def test_a_bad_row_touches_no_other():
    x, seed = torch.randn(5, 300), torch.arange(5)
    for name in SETTINGS:
        value = 2 if name == "top_k" else 0.9
        good = torch.full((5,), value, dtype=torch.int64 if name == "top_k" else torch.float64)
        bad = good.clone()
        bad[2] = -2 if name == "top_k" else math.nan
        kw = {"seed": seed, "history": torch.zeros(5, 2, dtype=torch.int64), "return_valid": True}
        got, expected = sample(x, **{name: bad}, **kw), sample(x, **{name: good}, **kw)
        assert got.valid.tolist() == [True, True, False, True, True]
        rest = torch.tensor([0, 1, 3, 4])
        assert torch.equal(got.tokens[rest], expected.tokens[rest])
        with pytest.raises(ValueError, match=re.escape("a setting out of its range")):
            sample(x, seed=seed, history=kw["history"], check=True, **{name: bad})


@pytest.mark.parametrize("temperature", [1e30, 1e37, 8e37, 3e38])
@pytest.mark.parametrize("flush", [False, True])
def test_any_temperature_divides_any_finite_logits(temperature, flush):
    """exp((x - top) / T), where x - top is beyond float32 and 1 / T among the denormal numbers."""
    x = torch.tensor([3e38, -3e38, 0.0, 1e38, 2.5e38])
    supported = torch.set_flush_denormal(flush)
    try:
        got = filter_probs(x, temperature=temperature)
        drawn = sample(x, temperature=temperature, seed=1, return_logprob="processed", num_samples=50)
    finally:
        torch.set_flush_denormal(False)
    assert supported or not flush
    exact = (x.double() / temperature).log_softmax(-1)
    torch.testing.assert_close(got.double(), exact.exp(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(drawn.logprob.double(), exact[drawn.tokens], rtol=1e-6, atol=1e-6)


def test_gumbel_draws_do_not_repeat():
    """Each draw takes V numbers; beyond 2^33 of them their index leaves one word of the generator's counter."""
    vocab = 1 << 24
    x = torch.full((vocab,), -INF)
    x[5] = x[1 << 20] = 0.0
    tokens = sample(x, seed=7, num_samples=700, mode="gumbel")
    assert not torch.equal(tokens[:188], tokens[512:])
    assert 250 < (tokens == 5).sum() < 450
    indices = torch.tensor([0, 1, 5, 2**33 - 1, 2**33, 2**33 + 5, 2**40 + 3, 2**56])
    bits = rules.philox_bits(3, 9, rules.STREAM_GUMBEL, indices)
    assert bits.unique().numel() == len(indices)
    for i, index in enumerate(indices.tolist()):
        one = torch.ops.arcore.random_bits(torch.tensor([3]), torch.tensor([9]), rules.STREAM_GUMBEL, index)
        assert one.item() == bits[i].item()


X = torch.zeros(2, 8)


@pytest.mark.parametrize("value", [2.5, 2.0, True, "2", [2]])
def test_integers_given_as_fractions_are_refused(value):
    for call, name in (
        (lambda: sample(X, top_k=value, seed=torch.arange(2)), "top_k"),
        (lambda: filter_probs(X, top_k=value), "top_k"),
        (lambda: sample(X, num_samples=value, seed=torch.arange(2)), "num_samples"),
        (lambda: sample(X[0], seed=value), "seed"),
        (lambda: sample(X[0], seed=1, offset=value), "offset"),
        (lambda: confidence_mask(X, value), "count"),
        (lambda: reference_sample(X, top_k=value, seed=torch.arange(2)), "top_k"),
    ):
        with pytest.raises(TypeError, match=re.escape(f"expected {name} to be an integer but got {value!r}")):
            call()
    with pytest.raises(TypeError, match="expected top_k of an integer dtype but got float32"):
        sample(X, top_k=torch.full((2,), 2.5), seed=torch.arange(2))
    with pytest.raises(ValueError, match="expected seed to fit into int64"):
        sample(X[0], seed=2**63)


def test_wrong_kinds_of_arguments():
    for arguments, text in (
        ({"mask": [True] * 8}, "expected mask to be a tensor but got list"),
        ({"bias": 0.5}, "expected bias to be a tensor but got float"),
        ({"history": [1, 2]}, "expected history to be a tensor but got list"),
        ({"temperature": "hot"}, "expected temperature in [0, 3e+38] but got 'hot'"),
        ({"top_p": [0.5, 0.5]}, "expected top_p to be a number or a tensor but got [0.5, 0.5]"),
        (
            {"min_p": torch.zeros(2, dtype=torch.complex64)},
            "expected min_p of a real dtype but got complex64",
        ),
        ({"uncond": X, "cfg_scale": INF}, "expected cfg_scale and weights in [-3e+38, 3e+38] but got inf"),
        ({"history": torch.tensor(3)}, "expected history of shape (..., L) but got ()"),
        ({"prompt": torch.tensor(3)}, "expected prompt of shape (..., L) but got ()"),
        ({"top_k": 0, "top_p": 2.0}, "expected top_p in [0, 1] but got 2.0"),
        ({"typical_p": 1.1}, "expected typical_p in [0, 1] but got 1.1"),
    ):
        with pytest.raises((TypeError, ValueError), match=re.escape(text)):
            filter_probs(X, **arguments)
    with pytest.raises(TypeError, match="expected logits to be a tensor or several but got NoneType"):
        filter_probs(None)


META = {
    "uncond": ({"uncond": X.to("meta"), "cfg_scale": 2.0}, "logits"),
    "mask": ({"mask": X.to("meta").bool()}, "mask"),
    "bias": ({"bias": X.to("meta")}, "bias"),
    "history": ({"history": X.to("meta").long()}, "history"),
    "prompt": ({"prompt": X.to("meta").long()}, "prompt"),
    "temperature": ({"temperature": torch.ones(2, device="meta")}, "temperature"),
    "top_k": ({"top_k": torch.ones(2, device="meta", dtype=torch.int64)}, "top_k"),
    "weights": ({"weights": [torch.ones(2, device="meta")]}, "weights"),
}


@pytest.mark.parametrize("name", META)
def test_another_device_is_refused(name):
    arguments, label = META[name]
    for function in (filter_probs, sample):
        keys = {"seed": torch.arange(2)} if function is sample else {}
        with pytest.raises(ValueError, match=f"expected {label} on the device of logits, cpu, but got meta"):
            function(X, **arguments, **keys)


def test_keys_and_candidates_on_another_device_are_refused():
    keys = torch.arange(2, device="meta")
    for name in ("seed", "offset"):
        with pytest.raises(ValueError, match=f"expected {name} on the device of the other tensors, cpu"):
            sample(X, **{"seed": torch.arange(2), name: keys})
    with pytest.raises(ValueError, match="expected out on the device of logits, cpu, but got meta"):
        sample(X, seed=torch.arange(2), out=keys)
    for arguments, name in (
        ({"candidates": X.to("meta").bool()}, "candidates"),
        ({"count": keys}, "count"),
    ):
        with pytest.raises(
            ValueError, match=f"expected {name} on the device of confidence, cpu, but got meta"
        ):
            confidence_mask(X, **{"count": 2, **arguments})


def test_the_ops_below_refuse_other_devices_too():
    """Where one argument is a meta tensor, torch runs the fake instead of the kernel."""
    one = torch.zeros(1, dtype=torch.int64)
    settings = torch.tensor([[1.0, 0, 1, 0, 1, 0, 0, 1, 0, 0, 1]], dtype=torch.float64)
    good = [[X[None]], settings, None, None, None, None, one, one, 1, 0, 2, *(False,) * 5]
    torch.ops.arcore.sample(*good)
    for place, name in ((1, "settings"), (6, "seed"), (7, "offset")):
        bad = [*good]
        bad[place] = bad[place].to("meta")
        with pytest.raises(ValueError, match=f"expected {name} on the device of logits"):
            torch.ops.arcore.sample(*bad)
    with pytest.raises(ValueError, match="expected settings on the device of logits"):
        torch.ops.arcore.filter_probs(*good[:1], settings.to("meta"), *good[2:6], 0, False, False)
    with pytest.raises(ValueError, match="expected candidates on the device of confidence"):
        torch.ops.arcore.confidence_mask(X, X.to("meta").bool(), one, one, one, 0.0, 0)


def test_meta_tensors_give_meta_tensors():
    x = X.to("meta")
    got = sample(x, top_k=3, return_prob=True, return_kept=True)
    assert got.tokens.is_meta and got.tokens.shape == (2,) and got.kept.shape == (2, 1)
    assert filter_probs(x, temperature=torch.ones(2, device="meta")).is_meta
    assert confidence_mask(x, 3).is_meta


@pytest.mark.parametrize("order", ["hf", "vllm", "joint"])
def test_least_number_of_tokens_to_keep(order):
    logits = torch.randn(5, 70, generator=torch.Generator().manual_seed(1))
    logits[1] = -math.inf  # nothing to keep
    logits[2, 3] = math.nan
    logits[3, 4:] = -math.inf  # less than the least number
    top_p = torch.tensor([0.1, 0.1, 0.1, 0.1, 2.0])  # the last out of its range
    options = {"top_p": top_p, "top_k": 2, "typical_p": 0.05, "order": order, "min_tokens_to_keep": 6}
    seeds = torch.arange(5)
    found = filter_probs(logits, return_valid=True, return_kept=True, **options)
    assert found.valid.tolist() == [True, False, False, True, False]
    assert (found.probs > 0).sum(-1).tolist() == [6, 0, 0, 4, 0]
    assert found.probs[0].nonzero()[:, 0].tolist() == logits[0].topk(6).indices.sort().values.tolist()
    drawn = sample(logits, seed=seeds, return_prob=True, return_valid=True, **options)
    again = reference_sample(logits, seed=seeds, return_prob=True, return_valid=True, **options)
    assert torch.equal(drawn.tokens, again.tokens) and torch.equal(drawn.valid, found.valid)
    live = found.valid.nonzero()[:, 0]
    assert torch.equal(found.probs[live, drawn.tokens[live]], drawn.prob[live])
    plain = {**options, "min_tokens_to_keep": 1}
    assert not torch.equal(filter_probs(logits, **plain), found.probs)
    for bad, error in ((0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="expected min_tokens_to_keep"):
            sample(logits, seed=seeds, **{**options, "min_tokens_to_keep": bad})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_sampling_from_probabilities(dtype):
    weights = torch.rand(6, 300, generator=torch.Generator().manual_seed(2)).to(dtype) * 5
    weights[:, ::3] = 0
    weights[1] = 0
    weights[2, 1] = -0.5
    weights[3, 1] = math.nan
    logits = logits_from_probs(weights)
    found = filter_probs(logits, return_valid=True)
    assert found.valid.tolist() == [True, False, False, False, True, True]
    live = [0, 4, 5]
    exact = weights[live].double() / weights[live].double().sum(-1, keepdim=True)
    assert not found.probs[:, ::3].any()
    torch.testing.assert_close(found.probs[live].double(), exact, rtol=2e-6, atol=0)
    tokens = sample(logits[0].expand(20000, 300), seed=torch.arange(20000))
    counts = torch.bincount(tokens, minlength=300).double() / 20000
    assert (counts - exact[0]).abs().max() < 5 * (exact[0].max() / 20000).sqrt()
    tiny = torch.tensor([1e-300, 3e-300], dtype=torch.float64)
    assert filter_probs(logits_from_probs(tiny)).tolist() == pytest.approx([0.25, 0.75], rel=1e-4)
    for wrong in (weights.int(), [0.5, 0.5]):
        with pytest.raises(TypeError, match="logits_from_probs: expected probs to be a tensor of a float"):
            logits_from_probs(wrong)


@pytest.mark.parametrize("least", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_nucleus_by_sorting(dtype, least):
    logits = (torch.randn(6, 3000, generator=torch.Generator().manual_seed(3)) * 2).to(dtype)
    logits[5] = 1.0  # all tie
    top_p = torch.tensor([0.9, 0.5, 0.0, 0.003, 1.5, 0.25])
    options = {"top_p": top_p, "temperature": 0.8, "top_p_ties": "sorted", "min_tokens_to_keep": least}
    for function in (filter_probs, reference_filter_probs):
        found = function(logits, return_valid=True, **options)
        assert found.valid.tolist() == [True, True, True, True, False, True]
        assert not found.probs[4].any()
        for row in (0, 1, 2, 3, 5):
            probs, order = (logits[row].double() / 0.8).softmax(-1).sort(descending=True, stable=True)
            count = max(int((probs.cumsum(-1) - probs < top_p[row] - 1e-9).sum()), least)
            assert found.probs[row].nonzero()[:, 0].tolist() == order[:count].sort().values.tolist()
    if dtype == torch.bfloat16 and least == 1:
        together = filter_probs(logits, **{**options, "top_p_ties": "together"})
        assert ((together > 0).sum(-1) > (found.probs > 0).sum(-1))[[0, 5]].all()
    with pytest.raises(ValueError, match="top_p_ties='together' with order='joint'"):
        filter_probs(logits, order="joint", **options)
    with pytest.raises(ValueError, match="expected top_p_ties 'together' or 'sorted' but got 'exact'"):
        sample(logits, top_p=0.5, top_p_ties="exact", seed=torch.arange(6))


@pytest.mark.parametrize("least", [1, 3])
def test_guidance_after_bias_and_penalties_in_the_op_and_the_reference(least):
    torch.manual_seed(0)
    cond, uncond, bias = torch.randn(3, 40), torch.randn(3, 40), torch.randn(40)
    history, prompt = torch.randint(40, (3, 9)), torch.randint(40, (3, 4))
    history[:, 0] = -1
    heat = torch.tensor([1.2, 1e9, 1.0])  # out of range in the second row
    options = {
        "uncond": uncond, "cfg_scale": 2.0, "bias": bias, "repetition_penalty": heat, "presence_penalty": 0.3,
        "frequency_penalty": 0.2, "history": history, "prompt": prompt, "top_k": 12, "min_tokens_to_keep": least,
        "guidance": "after",
    }  # fmt: skip
    keys = {"seed": torch.arange(3), "num_samples": 4}
    ours, theirs = sample(cond, **options, **keys), reference_sample(cond, **options, **keys)
    assert torch.equal(ours, theirs)
    assert (ours[1] == -1).all()
    probs = filter_probs(cond, **options)
    assert torch.equal(probs, reference_filter_probs(cond, **options))
    one = {
        k: v[2:] if isinstance(v, torch.Tensor) and v.dim() > 0 and len(v) == 3 else v
        for k, v in options.items()
    }
    assert torch.equal(filter_probs(cond[2:], **one), probs[2:])

    def changed(x):
        y = x + bias
        counts = torch.stack([row[row >= 0].bincount(minlength=40) for row in history])
        seen = (counts > 0) | torch.stack([row.bincount(minlength=40) > 0 for row in prompt])
        y = torch.where(seen, torch.where(y > 0, y / heat[:, None], y * heat[:, None]), y)
        return y - 0.2 * counts - 0.3 * (counts > 0)

    mixed = 2.0 * changed(cond) - changed(uncond)
    want = filter_probs(mixed[[0, 2]], top_k=12, min_tokens_to_keep=least)
    torch.testing.assert_close(probs[[0, 2]], want, rtol=1e-5, atol=1e-7)
    # One tensor of logits has nothing to guide: both orders are the same.
    alone = {
        k: v for k, v in options.items() if k not in ("uncond", "cfg_scale", "guidance", "repetition_penalty")
    }
    both = [filter_probs(cond, **alone, repetition_penalty=1.3, guidance=g) for g in ("before", "after")]
    torch.testing.assert_close(*both, rtol=1e-5, atol=1e-7)


def test_guidance_is_before_or_after():
    with pytest.raises(
        ValueError, match=r"arcore\.sample: expected guidance 'before' or 'after' but got 'never'"
    ):
        sample(torch.randn(3), guidance="never", seed=1)
    with pytest.raises(ValueError, match=r"arcore.sample: expected history of a shape that broadcasts"):
        sample(
            torch.randn(2, 3),
            guidance="after",
            history=torch.zeros(3, 1, dtype=torch.int64),
            seed=torch.arange(2),
        )
