"""Masks of banned words and repeated n-grams, against transformers' processors and by hand."""

from __future__ import annotations

import itertools

import pytest
import torch

from arcore.decoding import allow_without_repeats, allow_without_words
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
