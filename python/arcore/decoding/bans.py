"""Masks of tokens that may not come next: words that are banned, n-grams that would repeat.

The masks are what `arcore.ops.sample` takes as `mask`: True where a token may be drawn. `&` joins several.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from arcore.nn.checks import check_sequence, check_whole


def allow_without_words(ids: Tensor, words: Sequence[Sequence[int]], vocab_size: int) -> Tensor:
    """Forbid the token that would complete one of `words`; a word of one token is always forbidden.

    Args:
        ids: int64 `[..., L]`, the tokens so far; numbers outside [0, vocab_size) are padding, wherever they are.
        words: token ids of each word.
        vocab_size: V.

    Returns:
        bool `[..., V]`, False where a token is forbidden.

    Raises:
        TypeError: ids or words are no integers.
        ValueError: a shape does not fit, a word is empty or has ids outside of [0, vocab_size).

    The rule is that of `NoBadWordsLogitsProcessor` in transformers, except that no word is exempt for being the end of
    the sequence.
    """
    name = "allow_without_words"
    tokens, lead = _tokens(name, ids, vocab_size)
    check_sequence(f"{name}: words", words, "words")
    by_length: dict[int, list[list[int]]] = {}
    given: Sequence[Any] = words
    for i, word in enumerate(given):
        if not isinstance(word, Sequence) or isinstance(word, str) or not all(type(x) is int for x in word):
            raise TypeError(
                f"{name}: expected words[{i}] to be a sequence of ints but got {word!r}; encode it with the tokenizer"
            )
        if not word or not all(0 <= x < vocab_size for x in word):
            raise ValueError(
                f"{name}: expected words[{i}] of at least one id in [0, {vocab_size}) but got {list(word)}"
            )
        by_length.setdefault(len(word), []).append(list(word))
    last, banned = [], []
    for length, group in by_length.items():
        if length - 1 > tokens.shape[1]:
            continue
        table = torch.tensor(group, dtype=torch.int64, device=ids.device)
        end = tokens[:, tokens.shape[1] - (length - 1) :]
        banned.append((end.unsqueeze(1) == table[:, :-1]).all(-1))
        last.append(table[:, -1].expand(len(tokens), -1))
    return _allowed(tokens, last, banned, vocab_size, lead)


def allow_without_repeats(ids: Tensor, size: int, vocab_size: int) -> Tensor:
    """Forbid the tokens that would complete an n-gram of `size` tokens that `ids` has already.

    Args:
        ids: int64 `[..., L]`, the tokens so far; numbers outside [0, vocab_size) are padding, wherever they are.
        size: tokens of an n-gram; 1 forbids all tokens that have come.
        vocab_size: V.

    Returns:
        bool `[..., V]`, False where a token is forbidden.

    Raises:
        TypeError: ids or numbers are no integers.
        ValueError: a shape does not fit, or a number is below 1.

    The rule is that of `NoRepeatNGramLogitsProcessor` in transformers.
    """
    name = "allow_without_repeats"
    tokens, lead = _tokens(name, ids, vocab_size)
    check_whole(f"{name}: size", size, least=1)
    if tokens.shape[1] < size:
        return _allowed(tokens, [], [], vocab_size, lead)
    grams = tokens.unfold(1, size, 1)
    end = tokens[:, tokens.shape[1] - (size - 1) :]
    repeats = (grams[..., :-1] == end.unsqueeze(1)).all(-1) & (grams >= 0).all(-1)
    return _allowed(tokens, [grams[..., -1]], [repeats], vocab_size, lead)


def _tokens(name: str, ids: Tensor, vocab_size: int) -> tuple[Tensor, torch.Size]:
    """Rows `[B, L]` with the padding, as -1, moved to their beginning."""
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(
            f"{name}: expected ids to be an int64 tensor but got {got}; convert them with .long()"
        )
    check_whole(f"{name}: vocab_size", vocab_size, least=1)
    if ids.dim() == 0:
        raise ValueError(
            f"{name}: expected ids of shape [..., L] but got (); give them a dimension with [None]"
        )
    lead = ids.shape[:-1]
    rows = ids.reshape(lead.numel(), ids.shape[-1])
    there = (rows >= 0) & (rows < vocab_size)
    order = there.int().argsort(dim=1, stable=True)
    return torch.where(there, rows, -1).gather(1, order), lead


def _allowed(
    tokens: Tensor, last: list[Tensor], banned: list[Tensor], vocab_size: int, lead: torch.Size
) -> Tensor:
    allowed = torch.ones(len(tokens), vocab_size + 1, dtype=torch.bool, device=tokens.device)
    for ids, gone in zip(last, banned, strict=True):
        allowed.scatter_(1, torch.where(gone, ids, vocab_size), False)  # one column more, for those that stay
    return allowed[:, :vocab_size].reshape(*lead, vocab_size)
