"""Masks of banned words and repeated n-grams, against transformers' processors and by hand."""

from __future__ import annotations

import itertools

import pytest
import torch

from arcore.decoding import Sampling, allow_without_repeats, allow_without_words, generate, stream
from arcore.decoding.laws import small_model
from arcore.ops import sample

VOCAB = 6


def _ids(seed: int, length: int) -> torch.Tensor:
    return torch.randint(VOCAB, (40, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("length", [1, 2, 3, 9, 30])
def test_the_rules_are_those_of_transformers(length):
    lp = pytest.importorskip("transformers.generation.logits_process")
    ids, zeros = _ids(length, length), torch.zeros(40, VOCAB)
    for size in (1, 2, 3, 4):
        theirs = lp.NoRepeatNGramLogitsProcessor(size)(ids, zeros.clone()) == 0
        assert torch.equal(allow_without_repeats(ids, size, VOCAB), theirs)
    words = [[3], [1, 2], [1, 4], [2, 0, 5], [5, 5, 5, 1]]
    theirs = lp.NoBadWordsLogitsProcessor(words, eos_token_id=None)(ids, zeros.clone()) == 0
    assert torch.equal(allow_without_words(ids, words, VOCAB), theirs)


@pytest.mark.parametrize("pad", [-1, VOCAB, -100])
def test_padding_is_skipped_wherever_it_is(pad):
    ids = torch.tensor([1, 2, 3, 1, 2])
    rows = torch.full((3, 2, 9), pad)
    for row, places in zip(
        rows.view(6, 9),
        [range(5), range(4, 9), (0, 2, 4, 6, 8), (1, 2, 3, 7, 8), (0, 1, 2, 3, 8), (2, 3, 4, 5, 6)],
        strict=True,
    ):
        row[list(places)] = ids
    words = [[1, 2, 0], [2, 4], [5]]
    assert allow_without_words(ids, words, VOCAB).tolist() == [False, True, True, True, False, False]
    assert allow_without_repeats(ids, 3, VOCAB).tolist() == [True, True, True, False, True, True]
    for whole, alone in (
        (allow_without_words(rows, words, VOCAB), allow_without_words(ids, words, VOCAB)),
        (allow_without_repeats(rows, 3, VOCAB), allow_without_repeats(ids, 3, VOCAB)),
    ):
        assert whole.shape == (3, 2, VOCAB)
        assert torch.equal(whole, alone.expand_as(whole))
    nothing = torch.full((2, 4), pad)
    assert allow_without_repeats(nothing, 1, VOCAB).all()
    assert allow_without_repeats(nothing[:, :0], 2, VOCAB).all()
    assert (
        allow_without_words(nothing, [[1, 2]], VOCAB).all() and allow_without_words(nothing, [], VOCAB).all()
    )
    assert not allow_without_words(nothing[:, :0], [[4]], VOCAB)[:, 4].any()


def test_no_bigram_comes_twice():
    ids = torch.zeros(4, 1, dtype=torch.int64)
    for step in range(20):
        allowed = allow_without_repeats(ids, 2, VOCAB)
        token = sample(torch.zeros(4, VOCAB), mask=allowed, seed=torch.arange(4), offset=step, check=True)
        ids = torch.cat([ids, token[:, None]], 1)
        if not allow_without_repeats(ids, 2, VOCAB).any(-1).all():
            break
    assert ids.shape[1] > 5
    for row in ids.tolist():
        pairs = list(itertools.pairwise(row))
        assert len(set(pairs)) == len(pairs)


def test_errors():
    ids = torch.zeros(2, 3, dtype=torch.int64)
    for call, error, text in (
        (lambda: allow_without_words(ids, [[]], 6), ValueError, r"words\[0\] of at least one id in \[0, 6\)"),
        (lambda: allow_without_words(ids, [[1], [6]], 6), ValueError, r"words\[1\] .* but got \[6\]"),
        (lambda: allow_without_words(ids, ["no"], 6), TypeError, r"sequence of ints but got 'no'; encode"),
        (lambda: allow_without_words(ids, [[1.0]], 6), TypeError, r"words\[0\] to be a sequence of ints"),
        (lambda: allow_without_words(ids.int(), [[1]], 6), TypeError, r"int64 tensor but got torch\.int32"),
        (lambda: allow_without_words([[1]], [[1]], 6), TypeError, r"int64 tensor but got list"),
        (lambda: allow_without_repeats(ids[0, 0], 2, 6), ValueError, r"shape \[\.\.\., L\] but got \(\)"),
        (lambda: allow_without_repeats(ids, 0, 6), ValueError, "size"),
        (lambda: allow_without_repeats(ids, 2, 0), ValueError, "vocab_size"),
        (lambda: allow_without_repeats(ids, 1.5, 6), TypeError, "size"),
    ):
        with pytest.raises(error, match=text):
            call()


def test_generate_bans_what_its_sampling_says():
    """Prompt and new tokens count, row by row; draws of rows without a ban's effect stay the same."""
    model = small_model(VOCAB, seed=3)
    prompts = [[1, 2, 3], [4, 5], [0]]
    free = generate(model, prompts, max_new_tokens=40, seed=1)
    assert any(3 in row for row in free.rows())
    words = generate(model, prompts, max_new_tokens=40, seed=1, without_words=[[3], [1, 2]])
    for prompt, row in zip(prompts, words.rows(), strict=True):
        text = prompt[-1:] + row
        assert 3 not in row
        assert [1, 2] not in [text[i : i + 2] for i in range(len(text) - 1)]
    grams = generate(model, prompts, max_new_tokens=12, seed=1, without_repeats=2, repetition_penalty=1.1)
    for prompt, row in zip(prompts, grams.rows(), strict=True):
        text = prompt + row
        pairs = [tuple(text[i : i + 2]) for i in range(len(text) - 1)]
        assert len(pairs) == len(set(pairs))
    # A row alone and in the batch, and a stream, give the same text.
    settings = {"without_repeats": 2, "max_new_tokens": 12}
    alone = generate(model, prompts[:1], seed=1, **settings).rows()[0]
    batch = generate(model, prompts, seed=1, **settings).rows()[0]
    assert alone == batch == [int(t[0]) for t in stream(model, prompts[:1], seed=1, **settings)]


def test_generate_takes_what_sample_takes():
    model = small_model(VOCAB, seed=3)
    plain = generate(model, [[1]], max_new_tokens=20, seed=2).rows()
    for off in ({"top_k": 0}, {"top_k": -1}, {"top_k": VOCAB}, {"top_p": 1.0}, {"min_p": 0.0}, {"epsilon": 0.0},
                {"eta": 0.0}, {"typical_p": 1.0}, {"guidance": "after"}):  # fmt: skip
        assert generate(model, [[1]], max_new_tokens=20, seed=2, **off).rows() == plain, off
    likeliest = generate(model, [[1]], max_new_tokens=20, seed=2, temperature=0).rows()
    assert generate(model, [[1]], max_new_tokens=20, seed=2, top_p=0.0).rows() == likeliest
    wider = generate(model, [[1]], max_new_tokens=20, seed=2, top_p=0.0, min_tokens_to_keep=VOCAB).rows()
    assert wider == plain
    tied = generate(model, [[1]], max_new_tokens=20, seed=2, top_p=0.5, top_p_ties="sorted").rows()
    assert tied == generate(model, [[1]], max_new_tokens=20, seed=2, top_p=0.5).rows()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"without_words": "bad"}, TypeError, "expected without_words as lists of token ids but got 'bad'"),
        ({"without_words": [[]]}, TypeError, "expected without_words as lists of token ids"),
        ({"without_words": [["bad"]]}, TypeError, "expected without_words as lists of token ids"),
        ({"without_repeats": 0}, ValueError, "without_repeats must be at least 1 but got 0"),
        ({"min_tokens_to_keep": 0}, ValueError, "min_tokens_to_keep must be at least 1 but got 0"),
        ({"guidance": "never"}, ValueError, "expected guidance to be one of"),
        ({"top_p_ties": "sorted", "order": "joint"}, ValueError, "expected top_p_ties='together'"),
        ({"epsilon": 1.5}, ValueError, "expected 0 <= epsilon <= 1 but got 1.5"),
    ],
)
def test_wrong_settings_of_generate(settings, error, message):
    with pytest.raises(error, match=message):
        stream(small_model(VOCAB), [[1]], max_new_tokens=3, **settings)


def test_loops_that_do_not_follow_the_text_refuse_bans():
    with pytest.raises(ValueError, match="this loop does not follow the text; use generate"):
        Sampling(without_repeats=2).probs(torch.zeros(2, VOCAB))
    with pytest.raises(ValueError, match="this loop does not follow the text; use generate"):
        Sampling(without_words=[[1]]).draw(torch.zeros(2, VOCAB), torch.arange(2), torch.arange(2))
