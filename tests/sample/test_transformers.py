"""order="hf" means what the installed transformers means: its processors are the oracle."""

from __future__ import annotations

import math

import pytest
import torch

from arcore.ops import filter_probs, reference_filter_probs

lp = pytest.importorskip("transformers.generation.logits_process")

ROWS, VOCAB = 6, 500


def _logits(seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(seed))


def _oracle(logits, *processors, ids=None):
    ids = torch.zeros(len(logits), 1, dtype=torch.long) if ids is None else ids
    for processor in processors:
        logits = processor(ids, logits)
    return logits


def assert_same(logits, process, **kw):
    """The same support, and probabilities within what the processors in float32 lose against float64."""
    processed, exact = process(logits.clone()), process(logits.double()).softmax(-1)
    for function in (filter_probs, reference_filter_probs):
        probs = function(logits, **kw)
        assert torch.equal(probs > 0, processed.double().softmax(-1) > 2.0**-120)
        loss = (processed.softmax(-1) - exact).abs().max().item()
        assert (probs - exact).abs().max().item() <= 2 * loss + 1e-7


SINGLE = [
    ("temperature", 0.7, lambda: lp.TemperatureLogitsWarper(0.7)),
    ("temperature", 1.9, lambda: lp.TemperatureLogitsWarper(1.9)),
    ("top_k", 1, lambda: lp.TopKLogitsWarper(1)),
    ("top_k", 50, lambda: lp.TopKLogitsWarper(50)),
    ("top_k", 9000, lambda: lp.TopKLogitsWarper(9000)),
    ("top_p", 0.01, lambda: lp.TopPLogitsWarper(0.01)),
    ("top_p", 0.9, lambda: lp.TopPLogitsWarper(0.9)),
    ("top_p", 0.0, lambda: lp.TopPLogitsWarper(0.0)),
    ("min_p", 0.05, lambda: lp.MinPLogitsWarper(0.05)),
    ("typical_p", 0.3, lambda: lp.TypicalLogitsWarper(0.3)),
    ("typical_p", 0.95, lambda: lp.TypicalLogitsWarper(0.95)),
    ("epsilon", 0.01, lambda: lp.EpsilonLogitsWarper(0.01)),
    ("epsilon", 0.999, lambda: lp.EpsilonLogitsWarper(0.999)),
    ("eta", 0.01, lambda: lp.EtaLogitsWarper(0.01)),
    ("eta", 0.3, lambda: lp.EtaLogitsWarper(0.3)),
]


@pytest.mark.parametrize(("name", "value", "make"), SINGLE, ids=lambda v: "" if callable(v) else str(v))
def test_each_filter(name, value, make):
    for seed in range(3):
        logits = _logits(seed)
        assert_same(logits, lambda x: _oracle(x, make()), **{name: value})


SETTINGS = {
    "temperature": 0.8,
    "top_k": 100,
    "top_p": 0.95,
    "min_p": 0.02,
    "typical_p": 0.9,
    "epsilon": 0.01,
    "eta": 0.02,
}
FILTERS = {
    "top_k": lambda: lp.TopKLogitsWarper(100),
    "top_p": lambda: lp.TopPLogitsWarper(0.95),
    "min_p": lambda: lp.MinPLogitsWarper(0.02),
    "typical_p": lambda: lp.TypicalLogitsWarper(0.9),
    "epsilon": lambda: lp.EpsilonLogitsWarper(0.01),
    "eta": lambda: lp.EtaLogitsWarper(0.02),
}
IN_ORDER = {
    "hf": ["top_k", "top_p", "min_p", "typical_p", "epsilon", "eta"],
    "vllm": ["min_p", "top_k", "top_p", "typical_p", "epsilon", "eta"],
}


@pytest.mark.parametrize("order", IN_ORDER)
def test_filters_one_after_the_other(order):
    chain = [lp.TemperatureLogitsWarper(0.8), *(FILTERS[name]() for name in IN_ORDER[order])]
    for seed in range(5):
        assert_same(_logits(10 + seed), lambda x: _oracle(x, *chain), order=order, **SETTINGS)


def test_orders_of_two_filters_differ_as_the_oracle_does():
    """The nucleus before and after min-p, on rows where that matters."""
    logits, kept = _logits(16), {}
    for order in IN_ORDER:
        warpers = [lp.TopPLogitsWarper(0.6), lp.MinPLogitsWarper(0.1)]
        if order == "vllm":
            warpers.reverse()
        process = lambda x, warpers=warpers: _oracle(x, *warpers)  # noqa: E731
        assert_same(logits, process, order=order, top_p=0.6, min_p=0.1)
        kept[order] = process(logits) > -math.inf
    assert not torch.equal(kept["hf"], kept["vllm"])


def test_filters_all_at_once():
    """Joint: what every processor keeps of the whole distribution."""

    def process(x):
        x = _oracle(x, lp.TemperatureLogitsWarper(0.8))
        kept = torch.stack([_oracle(x, make()) > -math.inf for make in FILTERS.values()]).all(0)
        assert bool(kept.any(-1).all())
        return x.masked_fill(~kept, -math.inf)

    for seed in range(5):
        assert_same(_logits(20 + seed), process, order="joint", **SETTINGS)


def test_the_order_that_generate_builds():
    """The list of processors comes from transformers itself, not from this test."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GenerationConfig(
        do_sample=True, temperature=0.8, top_k=60, top_p=0.9, min_p=0.03, typical_p=0.9,
        epsilon_cutoff=0.01, eta_cutoff=0.02, repetition_penalty=1.3,
    )  # fmt: skip
    mixin = transformers.GenerationMixin()
    mixin.config = transformers.GPT2Config(vocab_size=VOCAB)
    logits, ids = _logits(42), torch.randint(0, VOCAB, (ROWS, 20))
    processors = mixin._get_logits_processor(config, input_ids_seq_length=20)
    assert_same(
        logits, lambda x: processors(ids, x.clone()), temperature=0.8, top_k=60, top_p=0.9, min_p=0.03,
        typical_p=0.9, epsilon=0.01, eta=0.02, repetition_penalty=1.3, prompt=ids,
    )  # fmt: skip


def test_repetition_penalty_and_bias():
    logits, ids = _logits(1), torch.randint(0, VOCAB, (ROWS, 30))

    def process(x):
        return _oracle(x, lp.RepetitionPenaltyLogitsProcessor(1.7), ids=ids)

    assert_same(logits, process, repetition_penalty=1.7, history=ids)
    assert_same(logits, process, repetition_penalty=1.7, prompt=ids[:, :12], history=ids[:, 12:])
    dense = torch.zeros(VOCAB)
    dense[3], dense[7] = 2.5, -4.0

    def biased(x):
        return _oracle(x, lp.SequenceBiasLogitsProcessor([[[3], 2.5], [[7], -4.0]]), ids=ids)

    assert_same(logits, biased, bias=dense)


def test_guidance():
    """transformers mixes log-softmax; that differs by a constant per row, so the distribution is the same."""
    cond, uncond = _logits(2), _logits(3)
    mixed = 2.5 * (cond.log_softmax(-1) - uncond.log_softmax(-1)) + uncond.log_softmax(-1)
    processed = _oracle(mixed, lp.TopKLogitsWarper(100), lp.TopPLogitsWarper(0.9))
    probs = filter_probs(cond, uncond=uncond, cfg_scale=2.5, top_k=100, top_p=0.9)
    exact = processed.double().softmax(-1)
    assert torch.equal(probs > 0, exact > 0)
    torch.testing.assert_close(probs.double(), exact, rtol=2e-5, atol=1e-7)


def test_ties_at_the_nucleus_stay_together():
    """transformers keeps as many of equal tokens as its sort happens to put last; here they share one fate."""
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, -3.0]])
    theirs = _oracle(logits, lp.TopPLogitsWarper(0.6)) > -math.inf
    ours = filter_probs(logits, top_p=0.6) > 0
    assert ours.tolist() == [[True, True, True, True, False]]
    assert bool((theirs <= ours).all())
    assert theirs.sum() < ours.sum()


LEAST = {
    "top_k": (2, lambda n: lp.TopKLogitsWarper(2, min_tokens_to_keep=n)),
    "top_p": (0.05, lambda n: lp.TopPLogitsWarper(0.05, min_tokens_to_keep=n)),
    "min_p": (0.9, lambda n: lp.MinPLogitsWarper(0.9, min_tokens_to_keep=n)),
    "typical_p": (0.01, lambda n: lp.TypicalLogitsWarper(0.01, min_tokens_to_keep=n)),
    "epsilon": (0.5, lambda n: lp.EpsilonLogitsWarper(0.5, min_tokens_to_keep=n)),
    "eta": (0.9, lambda n: lp.EtaLogitsWarper(0.9, min_tokens_to_keep=n)),
}


@pytest.mark.parametrize("least", [2, 7, 600])
@pytest.mark.parametrize("name", LEAST)
def test_least_number_of_tokens(name, least):
    value, make = LEAST[name]
    logits = _logits(least)
    least_there = min(least, VOCAB)
    assert_same(logits, lambda x: _oracle(x, make(least_there)), **{name: value}, min_tokens_to_keep=least)
    probs = filter_probs(logits, **{name: value}, min_tokens_to_keep=least)
    assert ((probs > 0).sum(-1) >= least_there).all()


def test_least_number_in_a_chain_with_temperature_and_penalty():
    ids = torch.arange(20).expand(ROWS, 20).contiguous()
    for seed in range(3):
        values = {name: value for name, (value, _) in LEAST.items()}
        chain = (
            lp.RepetitionPenaltyLogitsProcessor(1.3),
            lp.TemperatureLogitsWarper(0.7),
            *(make(5) for _, make in LEAST.values()),
        )
        more = {"temperature": 0.7, "repetition_penalty": 1.3, "history": ids, "min_tokens_to_keep": 5}
        assert_same(_logits(seed), lambda x, chain=chain: _oracle(x, *chain, ids=ids), **values, **more)


@pytest.mark.parametrize("scale", [1.5, 4.0])
def test_guidance_of_normalised_logits_before_the_penalty(scale):
    """generate(guidance_scale=...) mixes log-probabilities, and the penalty looks at the sign of what comes out."""

    class Guidance(lp.UnbatchedClassifierFreeGuidanceLogitsProcessor):
        def get_unconditional_logits(self, ids):
            return uncond.to(logits.dtype).unsqueeze(1)

    logits, uncond = _logits(1), _logits(2)
    ids = (scale * logits + (1 - scale) * uncond).topk(20).indices  # the tokens that count
    chain = (
        Guidance(scale, model=None),
        lp.RepetitionPenaltyLogitsProcessor(1.4),
        lp.TopKLogitsWarper(60),
    )
    theirs = _oracle(logits.clone(), *chain, ids=ids)
    options = {"cfg_scale": scale, "repetition_penalty": 1.4, "history": ids, "top_k": 60}
    ours = filter_probs(logits.log_softmax(-1), uncond=uncond.log_softmax(-1), **options)
    assert torch.equal(ours > 0, theirs > -math.inf)
    torch.testing.assert_close(ours, theirs.softmax(-1), rtol=2e-5, atol=1e-7)
    plain = filter_probs(logits, uncond=uncond, **options)
    assert (plain - ours).abs().max() > 1e-3


@pytest.mark.parametrize("scale", [1.5, 4.0])
def test_guidance_after_the_penalty(scale):
    """A processor of guidance at the end of the list mixes what the penalties made of both halves of the batch."""
    logits, uncond = _logits(1), _logits(2)
    ids = logits.topk(20).indices
    halves, doubled = torch.cat([logits, uncond]), torch.cat([ids, ids])
    theirs = lp.RepetitionPenaltyLogitsProcessor(1.4)(doubled, halves.clone())
    theirs = lp.ClassifierFreeGuidanceLogitsProcessor(scale)(ids, theirs)
    theirs = lp.TopKLogitsWarper(60)(ids, theirs)
    options = {"uncond": uncond, "cfg_scale": scale, "repetition_penalty": 1.4, "history": ids, "top_k": 60}
    ours = filter_probs(logits, guidance="after", **options)
    assert torch.equal(ours > 0, theirs > -math.inf)
    torch.testing.assert_close(ours, theirs.softmax(-1), rtol=2e-5, atol=1e-7)
    assert (filter_probs(logits, **options) - ours).abs().max() > 1e-3
