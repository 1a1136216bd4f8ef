"""Texts that can be continued, copied and rewound, for searches over continuations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from arcore.decoding.sampling import Sampling
from arcore.nn.checks import check_sequence, check_whole
from arcore.nn.kinds import check_kinds
from arcore.nn.protocols import DraftableModel


class Session:
    """Rows of text, what the model has read of them, and what it expects next.

    Args:
        model: the model.
        prompt: one list of tokens per row, none of them empty.
        max_length: most tokens of a row, prompt included.
        device: of the model.

    Attributes:
        texts: tokens of each row.
        logits: float32 `[B, V]`, after each row's last token.
        calls: calls of the model so far, those of the session it was forked from not counted.

    Raises:
        TypeError: the model cannot read drafts.
        ValueError: a row is empty.
    """

    def __init__(
        self,
        model: DraftableModel,
        prompt: Sequence[Sequence[int]],
        *,
        max_length: int,
        device: torch.device | str = "cpu",
    ) -> None:
        if not isinstance(model, DraftableModel):
            raise TypeError(f"{type(model).__name__} cannot be rewound: it has no `extend`")
        check_sequence("prompt", prompt, "rows of tokens")
        for row in prompt:
            check_sequence("a row of the prompt", row, "tokens")
        max_length = check_whole("max_length", max_length, 1, "token")
        if not prompt or not all(len(row) for row in prompt):
            raise ValueError("expected at least one token in every row of the prompt")
        self.model = model
        self.calls = 0
        self.texts: list[list[int]] = [[] for _ in prompt]
        self.cache: Any = model.make_cache(len(prompt), max_length)
        self.logits = torch.empty(0, device=device)
        self.feed(prompt)

    @check_kinds
    def fork(self, rows: Sequence[int]) -> Session:
        """A session of its own with copies of these rows, any of them several times; this one stays as it is."""
        other = object.__new__(Session)
        other.model, other.calls = self.model, 0
        other.texts = [list(self.texts[row]) for row in rows]
        other.cache = self.cache.fork(list(rows))
        other.logits = self.logits[list(rows)]
        return other

    @torch.no_grad()
    @check_kinds
    def feed(self, tokens: Sequence[Sequence[int]]) -> None:
        """Continue each row by these tokens, of which a row may have none."""
        if len(tokens) != len(self.texts):
            raise ValueError(f"expected tokens for each of {len(self.texts)} rows but got {len(tokens)}")
        self._read([list(row) for row in tokens])

    @torch.no_grad()
    @check_kinds
    def rewind(self, lengths: Sequence[int]) -> None:
        """Forget all but the first tokens of each row, of which at least one is left."""
        if len(lengths) != len(self.texts) or any(
            not 1 <= n <= len(text) for n, text in zip(lengths, self.texts, strict=False)
        ):
            raise ValueError(
                f"expected a length from 1 to {[len(text) for text in self.texts]} for each row but got {list(lengths)}"
            )
        if [len(text) for text in self.texts] == list(lengths):
            return
        # The last token is read again for its logits.
        self.cache.truncate([n - 1 for n in lengths])
        last = [[text[n - 1]] for n, text in zip(lengths, self.texts, strict=True)]
        self.texts = [text[: n - 1] for n, text in zip(lengths, self.texts, strict=True)]
        self._read(last)

    @torch.no_grad()
    @check_kinds
    def draw(self, count: int, sampling: Sampling, seeds: Tensor) -> list[list[int]]:
        """Continue each row by `count` drawn tokens, and return them.

        Args:
            count: tokens.
            sampling: how they are drawn.
            seeds: int64 `[B]`; a token's draw depends on its row's seed, its position and its logits.
        """
        new: list[list[int]] = [[] for _ in self.texts]
        for _ in range(count):
            offsets = torch.tensor([len(text) for text in self.texts], device=self.logits.device)
            drawn = sampling.draw(self.logits[:, : self.model.vocab_size], seeds, offsets)
            assert isinstance(drawn, Tensor)
            tokens = [[token] for token in drawn.tolist()]
            self._read(tokens)
            new = [have + one for have, one in zip(new, tokens, strict=True)]
        return new

    def _read(self, tokens: list[list[int]]) -> None:
        longest = max(map(len, tokens))
        if longest == 0:
            return
        self.calls += 1
        device = self.logits.device
        table = torch.tensor([row + [0] * (longest - len(row)) for row in tokens], device=device)
        out = self.model.extend(table, self.cache)
        self.cache.commit([len(row) for row in tokens])
        last = torch.tensor([max(len(row) - 1, 0) for row in tokens], device=device)
        logits = out.logits[torch.arange(len(tokens), device=device), last]
        if self.logits.numel():
            empty = torch.tensor([not row for row in tokens], device=device).unsqueeze(1)
            logits = torch.where(empty, self.logits, logits)
        self.logits = logits
        self.texts = [text + row for text, row in zip(self.texts, tokens, strict=True)]
