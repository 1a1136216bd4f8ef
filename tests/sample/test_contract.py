"""What sample promises: keys and nothing else decide, results can be replayed, bad rows stay alone."""

from __future__ import annotations

import math
import random

import pytest
import torch

from arcore.ops import confidence_mask, filter_probs, sample
from tests.sample.cases import adversarial_rows, random_call

INF = math.inf


def _rows(vocab: int = 300) -> torch.Tensor:
    return torch.stack(list(adversarial_rows(vocab).values()))


def _seeds(n: int) -> torch.Tensor:
    return torch.arange(n) * 7919 - 3


def test_a_draw_is_the_inverse_cdf_of_filter_probs():
    draw = random.Random(5)
    for _ in range(40):
        x, kw = random_call(draw)
        probs = filter_probs(x, **kw)
        seeds, offsets = _seeds(3), torch.tensor([2**40, -1, 0])
        drawn = sample(x, **kw, seed=seeds, offset=offsets, num_samples=5)
        for d in range(5):
            bits = torch.ops.arcore.random_bits(seeds, offsets, 0, d)
            assert torch.equal(drawn[:, d], torch.ops.arcore.inverse_cdf(probs, bits))


def test_a_row_never_depends_on_its_batch():
    x = _rows()
    kw = {"top_k": 40, "top_p": 0.9, "num_samples": 3, "return_prob": True}
    whole = sample(x, seed=_seeds(len(x)), **kw)
    for i in range(len(x)):
        alone = sample(x[i], seed=int(_seeds(len(x))[i]), **kw)
        assert torch.equal(alone.tokens, whole.tokens[i])
        assert torch.equal(alone.prob, whole.prob[i])
    order = torch.randperm(len(x))
    assert torch.equal(sample(x[order], seed=_seeds(len(x))[order], **kw).tokens, whole.tokens[order])


def test_thread_count_changes_nothing():
    x = torch.randn(40, 30000)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(sample(x, seed=_seeds(40), top_p=0.9, return_prob=True, return_entropy=True))
    for other in results[1:]:
        assert torch.equal(other.tokens, results[0].tokens)
        assert torch.equal(other.prob, results[0].prob)
        assert torch.equal(other.entropy, results[0].entropy)


def test_layouts_change_nothing():
    x = torch.randn(4, 6, 100)
    seeds = _seeds(24).view(4, 6)
    expected = sample(x, seed=seeds, top_k=9)
    wide = torch.randn(4, 12, 200)
    wide[:, ::2, ::2] = x
    assert torch.equal(sample(wide[:, ::2, ::2], seed=seeds, top_k=9), expected)
    assert torch.equal(
        sample(x.permute(2, 0, 1).contiguous().permute(1, 2, 0), seed=seeds, top_k=9), expected
    )
    assert torch.equal(
        sample(x.view(2, 2, 6, 100), seed=seeds.view(2, 2, 6), top_k=9), expected.view(2, 2, 6)
    )
    assert torch.equal(
        sample(x[:1].expand(4, 6, 100), seed=seeds, top_k=9)[0], sample(x[0], seed=seeds[0], top_k=9)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_first(dtype):
    x = (3 * torch.randn(5, 1000)).to(dtype)
    kw = {"seed": _seeds(5), "top_k": 50, "top_p": 0.9, "temperature": 0.8, "num_samples": 20}
    assert torch.equal(sample(x, **kw), sample(x.float(), **kw))
    uncond = torch.randn(5, 1000).to(dtype)
    kw |= {"cfg_scale": 2.0}
    assert torch.equal(sample(x, uncond=uncond, **kw), sample(x.float(), uncond=uncond.float(), **kw))


def test_rows_may_have_their_own_settings():
    x = _rows()
    n = len(x)
    torch.manual_seed(1)
    settings = {
        "temperature": 0.5 + torch.rand(n),
        "top_k": torch.randint(0, 60, (n,)),
        "top_p": torch.rand(n),
        "min_p": 0.1 * torch.rand(n),
        "typical_p": torch.rand(n),
        "epsilon": 0.01 * torch.rand(n),
        "eta": 0.01 * torch.rand(n),
    }
    settings |= {
        "cfg_scale": 1 + torch.rand(n),
        "repetition_penalty": 1 + torch.rand(n),
        "presence_penalty": torch.rand(n) - 0.5,
        "frequency_penalty": torch.rand(n) - 0.5,
    }
    other, history = torch.randn_like(x), torch.randint(x.shape[1], (n, 40))
    offset = torch.randint(10**6, (n,))
    for order in ("hf", "vllm", "joint"):
        kw = {"order": order, "return_logprob": "processed", "return_prob": True, "return_entropy": True}
        got = sample(x, uncond=other, history=history, seed=_seeds(n), offset=offset, **settings, **kw)
        for i in range(n):
            numbers = {k: v[i].item() for k, v in settings.items()}
            alone = sample(
                x[i], uncond=other[i], history=history[i], seed=int(_seeds(n)[i]), offset=int(offset[i]),
                **numbers, **kw,
            )  # fmt: skip
            for name in ("tokens", "logprob", "prob", "entropy"):
                assert torch.equal(getattr(got, name)[i], getattr(alone, name)), name


def test_settings_broadcast():
    """A setting per image, for all positions of it."""
    x = torch.randn(2, 5, 60)
    temperature, top_k = torch.tensor([[0.5], [2.0]]), torch.tensor([3, 4, 5, 6, 60])
    probs = filter_probs(x, temperature=temperature, top_k=top_k)
    for i in range(2):
        for j in range(5):
            alone = filter_probs(x[i, j], temperature=temperature[i, 0].item(), top_k=int(top_k[j]))
            assert torch.equal(probs[i, j], alone)
    weights = [1.0, torch.tensor([[0.5], [-0.5]])]
    mixed = filter_probs([x, x.flip(0)], weights=weights)
    for i in range(2):
        alone = filter_probs([x[i], x[1 - i]], weights=[1.0, weights[1][i, 0].item()])
        assert torch.equal(mixed[i], alone)


def test_kept_tokens_can_be_replayed():
    """Drawing again under the kept set needs no filter and gives the same distribution, tokens and numbers."""
    x = 3 * torch.randn(6, 500)
    kw = {"seed": _seeds(6), "return_logprob": "processed", "return_prob": True, "return_entropy": True}
    filtered = sample(x, temperature=0.8, top_k=60, top_p=0.9, typical_p=0.9, return_kept=True, **kw)
    again = sample(x, temperature=0.8, mask=filtered.kept, return_kept=True, **kw)
    for name in ("tokens", "prob", "entropy", "logprob", "kept"):
        assert torch.equal(getattr(again, name), getattr(filtered, name))
    token = torch.arange(500)
    allowed = (filtered.kept[:, token // 32] >> (token % 32) & 1).bool()
    logp = (x / 0.8).masked_fill(~allowed, -INF).double().log_softmax(-1)
    expected = logp.gather(-1, filtered.tokens[:, None]).squeeze(-1)
    torch.testing.assert_close(filtered.logprob.double(), expected, rtol=1e-6, atol=1e-6)
    assert (filtered.logprob <= 0).all()


def test_probabilities_log_probabilities_and_entropy():
    x = 2 * torch.randn(8, 400)
    kw = {"seed": _seeds(8), "top_k": 30, "num_samples": 4, "return_prob": True, "return_entropy": True}
    got = sample(x, return_logprob="processed", **kw)
    probs = filter_probs(x, top_k=30)
    assert torch.equal(got.prob, probs.gather(-1, got.tokens))
    torch.testing.assert_close(got.logprob, got.prob.log(), rtol=1e-5, atol=1e-6)
    assert got.entropy.shape == (8,)
    exact = -(probs.double() * probs.double().log()).nan_to_num(0).sum(-1)
    torch.testing.assert_close(got.entropy.double(), exact, rtol=1e-5, atol=1e-6)
    raw = sample(x, temperature=0.3, bias=torch.randn(400), return_logprob="raw", **kw)
    expected = x.double().log_softmax(-1).gather(-1, raw.tokens)
    torch.testing.assert_close(raw.logprob.double(), expected, rtol=1e-6, atol=1e-6)


def test_probabilities_sum_to_one():
    for vocab in (7, 4096, 128256):
        probs = filter_probs(torch.stack([torch.zeros(vocab), 3 * torch.randn(vocab)]))
        assert (probs.double().sum(-1) - 1).abs().max() < 2e-7


def test_bad_rows_stay_alone():
    good = torch.randn(64)
    nan, inf, forbidden = (good.clone() for _ in range(3))
    nan[5] = math.nan
    inf[7] = inf[9] = INF
    forbidden[:] = -INF
    batch = torch.stack([good, nan, good, inf, forbidden, good])
    kw = {"seed": torch.full((6,), 3), "top_k": 20, "num_samples": 50}
    got = sample(batch, return_logprob="processed", return_prob=True, return_entropy=True,
                 return_valid=True, return_kept=True, **kw)  # fmt: skip
    assert got.valid.tolist() == [True, False, True, True, False, True]
    for i in (0, 2, 5):
        assert torch.equal(got.tokens[i], sample(good, seed=3, top_k=20, num_samples=50))
    for i in (1, 4):
        assert (got.tokens[i] == -1).all()
        assert got.logprob[i].isnan().all() and got.prob[i].isnan().all() and got.entropy[i].isnan()
        assert (got.kept[i] == 0).all()
        assert (filter_probs(batch)[i] == 0).all()
    assert set(got.tokens[3].tolist()) == {7, 9}
    assert got.prob[3].eq(0.5).all()
    with pytest.raises(ValueError, match=r"row \(1,\) has NaN among its allowed logits.*2 of 6 rows"):
        sample(batch, check=True, **kw)
    with pytest.raises(ValueError, match=r"arcore\.filter_probs: expected a distribution in every row"):
        filter_probs(batch, check=True)
    sample(batch[::2], seed=torch.arange(3), mask=batch[::2] > -INF, check=False)


def test_nan_where_nobody_may_look_is_harmless():
    x = torch.randn(3, 40)
    expected = filter_probs(x, mask=torch.arange(40) < 30)
    x[:, 30:] = math.nan
    assert torch.equal(filter_probs(x, mask=torch.arange(40) < 30), expected)
    x[:, 30:] = -math.nan
    assert torch.equal(filter_probs(x, mask=torch.arange(40) < 30), expected)


def test_invalid_temperatures_of_rows():
    x = torch.randn(4, 9)
    got = sample(x, temperature=torch.tensor([1.0, -1.0, math.nan, 0.0]), seed=_seeds(4), return_valid=True)
    assert got.valid.tolist() == [True, False, False, True]
    assert got.tokens[3] == x[3].argmax()


def test_guidance_never_makes_nan():
    cond, uncond = torch.randn(2, 50), torch.randn(2, 50)
    cond[:, :10] = -INF
    uncond[:, 5:20] = -INF
    probs = filter_probs(cond, uncond=uncond, cfg_scale=3.0, check=True)
    assert (probs[:, :10] == 0).all()
    # Where only the unconditional half forbids a token, the conditional logit stands alone.
    mixed = (3 * cond - 2 * torch.where(uncond == -INF, cond, uncond)).masked_fill(cond == -INF, -INF)
    torch.testing.assert_close(probs, mixed.softmax(-1), rtol=1e-5, atol=1e-7)
    assert torch.equal(filter_probs(cond, uncond=uncond, cfg_scale=1.0), filter_probs(cond))
    nan = torch.full_like(cond, math.nan)
    assert torch.equal(filter_probs(cond, uncond=nan, cfg_scale=1.0), filter_probs(cond))


def test_several_sources_are_mixed():
    a, b, c = (torch.randn(3, 80) for _ in range(3))
    b[:, 4] = -INF
    weight = torch.tensor([0.5, 1.0, 2.0])
    probs = filter_probs([a, b, c], weights=[1.0, weight, -0.5])
    expected = (a + weight[:, None] * b - 0.5 * c).softmax(-1)
    torch.testing.assert_close(probs, expected, rtol=1e-5, atol=1e-7)
    assert (probs[:, 4] == 0).all()


def test_masks_in_both_forms():
    x = torch.randn(4, 3, 70)
    allowed = torch.rand(4, 1, 70) < 0.5
    allowed[..., 0] = True
    bits = torch.zeros(4, 1, 96, dtype=torch.int64)
    bits[..., :70] = allowed.long()
    bits[..., 70:] = 1  # beyond the vocabulary: of no effect
    words = (bits.view(4, 1, 3, 32) << torch.arange(32)).sum(-1).to(torch.int32)
    expected = x.masked_fill(~allowed, -INF).softmax(-1)
    for mask in (allowed, words, allowed.expand(4, 3, 70), words.expand(4, 3, 3)):
        torch.testing.assert_close(filter_probs(x, mask=mask), expected, rtol=1e-5, atol=1e-7)
    one = torch.rand(70) < 0.5
    torch.testing.assert_close(
        filter_probs(x, mask=one), x.masked_fill(~one, -INF).softmax(-1), rtol=1e-5, atol=1e-7
    )


def test_penalties_count_the_history_only():
    x = torch.randn(2, 20)
    history = torch.tensor([[3, 3, 3, 5, -1, 99], [4, -1, -1, -1, 4, 4]])
    prompt = torch.tensor([[7, 3], [8, 8]])
    got = filter_probs(
        x, repetition_penalty=1.5, presence_penalty=0.3, frequency_penalty=0.2, history=history, prompt=prompt
    )
    expected = x.clone()
    for row, seen, counts in ((0, (3, 5, 7), {3: 3, 5: 1}), (1, (4, 8), {4: 3})):
        for token in seen:
            value = expected[row, token]
            expected[row, token] = value / 1.5 if value > 0 else value * 1.5
        for token, times in counts.items():
            expected[row, token] -= 0.3 + 0.2 * times
    torch.testing.assert_close(got, expected.softmax(-1), rtol=1e-5, atol=1e-7)


def test_orders_differ_as_documented():
    probs = torch.tensor([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])
    x = probs.log()

    def kept(**kw):
        return int((filter_probs(x, **kw) > 0).sum())

    # After top_k=3, the first two hold 0.65 / 0.8 = 0.81 of the mass; of the whole they hold 0.65.
    assert kept(top_k=3, top_p=0.75) == 2
    assert kept(top_k=3, top_p=0.75, order="joint") == 3
    # After min_p, 0.4 + 0.25 are 0.72 of the mass left; before it, 0.65.
    assert kept(top_p=0.7, min_p=0.2, order="hf") == 3
    assert kept(top_p=0.7, min_p=0.2, order="vllm") == 2
    # Typical drops the likeliest token here; joint with top_k=1 has nothing in common, and keeps the likeliest.
    y = torch.tensor([0.4] + [0.6 / 16] * 16).log()
    assert (filter_probs(y, typical_p=0.3) > 0).tolist()[0] is False
    assert (filter_probs(y, typical_p=0.3, top_k=1, order="joint") > 0).nonzero().flatten().tolist() == [0]


@pytest.mark.parametrize(
    "off",
    [
        {"top_k": None}, {"top_k": 0}, {"top_k": -1}, {"top_k": 300}, {"top_k": 10**9}, {"top_p": None},
        {"top_p": 1.0}, {"min_p": 0.0}, {"typical_p": 1.0}, {"epsilon": 0.0}, {"eta": 0.0},
        {"repetition_penalty": 1.0, "history": torch.arange(9)}, {"presence_penalty": 0.0, "history": torch.arange(9)},
    ],
    ids=str,
)  # fmt: skip
def test_ways_to_switch_a_filter_off(off):
    x = _rows()
    assert torch.equal(filter_probs(x, **off), filter_probs(x))


def test_temperature_zero_and_greedy():
    x = _rows()
    best = torch.stack([(row == row.max()).nonzero()[0, 0] for row in x])
    assert torch.equal(sample(x, temperature=0.0, seed=_seeds(len(x))), best)
    assert torch.equal(sample(x, mode="greedy"), best)
    one_hot = filter_probs(x, temperature=0.0)
    assert torch.equal(one_hot, torch.nn.functional.one_hot(best, x.shape[-1]).float())
    assert torch.equal(sample(x, top_p=0.0, mode="greedy", num_samples=2), best[:, None].expand(-1, 2))


def test_streams_of_one_seed_are_the_positions():
    x = torch.randn(1000)
    batch = sample(x.expand(64, 1000), seed=5, offset=torch.arange(64))
    assert batch.unique().numel() > 40
    for i in (0, 13, 63):
        assert sample(x, seed=5, offset=i) == batch[i]


def test_generator_is_reproducible():
    x = torch.randn(10, 300)
    first = sample(x, generator=torch.Generator().manual_seed(4))
    assert torch.equal(sample(x, generator=torch.Generator().manual_seed(4)), first)
    assert not torch.equal(sample(x, generator=torch.Generator().manual_seed(5)), first)
    torch.manual_seed(4)
    assert torch.equal(sample(x), first)


def test_out_and_shapes():
    x = torch.randn(2, 3, 50)
    out = torch.empty(2, 3, dtype=torch.int64)
    assert sample(x, seed=torch.arange(6).view(2, 3), out=out) is out
    assert torch.equal(out, sample(x, seed=torch.arange(6).view(2, 3)))
    assert sample(x, num_samples=4).shape == (2, 3, 4)
    assert sample(x[0, 0], seed=1).shape == ()
    for shape in ((0, 50), (3, 0, 50), (0, 0)):
        empty = sample(torch.randn(shape), return_prob=True, return_kept=True)
        assert empty.tokens.shape == shape[:-1]
        assert filter_probs(torch.randn(shape)).shape == shape
    none = sample(torch.randn(2, 0), return_valid=True, return_kept=True)
    assert none.tokens.tolist() == [-1, -1] and not none.valid.any() and none.kept.shape == (2, 0)


def test_confidence_masks_choose_the_least():
    confidence = torch.tensor([[0.3, 0.1, 0.3, 0.9, 0.3], [0.5, 0.4, 0.3, 0.2, 0.1]])

    def chosen(**kw):
        return [row.nonzero().flatten().tolist() for row in confidence_mask(confidence, 2, **kw)]

    assert chosen() == [[0, 1], [3, 4]]
    assert chosen(ties="all") == [[0, 1, 2, 4], [3, 4]]
    assert chosen(ties="none") == [[1], [3, 4]]
    known = torch.tensor([False, True, False, False, True])
    assert chosen(candidates=~known) == [[0, 2], [2, 3]]
    assert confidence_mask(confidence, torch.tensor([0, 9])).sum(-1).tolist() == [0, 5]


def test_confidence_masks_are_those_of_published_decoders():
    """Their selection steps as they are written down there, on confidences with many ties."""
    for _ in range(20):
        confidence, n = torch.randint(0, 6, (3, 24)).float(), int(torch.randint(1, 24, ()))
        ordered = confidence.sort(dim=-1).values
        # HMAR masks the first n of an ascending argsort.
        hmar = torch.zeros(3, 24, dtype=torch.bool)
        hmar.scatter_(1, confidence.argsort(dim=-1, stable=True)[:, :n], True)
        assert torch.equal(confidence_mask(confidence, n), hmar)
        # MAGE's cut-off is the n-th smallest confidence, and belongs to what is masked.
        mage = confidence <= ordered[:, n - 1 : n]
        assert torch.equal(confidence_mask(confidence, n, ties="all"), mage)
        # MaskGIT's is the one after it, and does not.
        maskgit = confidence < ordered[:, n : n + 1]
        assert torch.equal(confidence_mask(confidence, n, ties="none"), maskgit)


def test_confidence_noise_has_the_gumbel_law():
    """With noise of temperature 1 on log p, the position that comes last is drawn with probability p."""
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    n = 20000
    chosen = confidence_mask(p.log().expand(n, 4), 3, temperature=1.0, seed=11, offset=torch.arange(n))
    share = (~chosen).double().mean(0)
    assert ((share - p).abs() < 4.5 * (p * (1 - p) / n).sqrt()).all()


def test_results_have_no_gradient():
    x = torch.randn(2, 9, requires_grad=True)
    assert not filter_probs(x).requires_grad
    assert not sample(x, return_prob=True).prob.requires_grad
