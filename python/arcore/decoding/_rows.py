"""What has been written in each row, and whether it has ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from arcore.nn.checks import check_whole

Decode = Callable[[list[int]], str]


@dataclass(frozen=True)
class Ends:
    """What ends a row.

    Attributes:
        sequences: of tokens.
        strings: of characters.
        decode: tokens to text, for `strings`.
        max_new_tokens: most new tokens.
    """

    sequences: tuple[tuple[int, ...], ...]
    strings: tuple[str, ...]
    decode: Decode | None
    max_new_tokens: int

    @classmethod
    def of(
        cls,
        max_new_tokens: int,
        eos: int | Sequence[int] | None = None,
        stop: Sequence[Sequence[int] | str] = (),
        decode: Decode | None = None,
        model: Any = None,
    ) -> Ends:
        """Checked ends: `eos` is a token or several, `stop` holds sequences of tokens and strings.

        Args:
            max_new_tokens: most new tokens.
            eos: None takes `model.eos_ids` where the model has them.
            stop: see above.
            decode: makes text of tokens.
            model: whose tokens they are, if it is known.

        Raises:
            TypeError: a token or a number is no whole number.
            ValueError: a number, a token or a stop is out of range, or strings come without `decode`.
        """
        max_new_tokens = check_whole("max_new_tokens", max_new_tokens, 0)
        vocab_size = getattr(model, "vocab_size", None)
        if eos is None:
            eos = tuple(getattr(model, "eos_ids", ()))
        if isinstance(stop, str):
            raise ValueError(f"expected a list of stops but got the string {stop!r}; write [{stop!r}]")
        sequences = [_tokens("eos", [one], vocab_size) for one in _several("eos", eos)]
        sequences += [_tokens("stop", one, vocab_size) for one in stop if not isinstance(one, str)]
        strings = tuple(one for one in stop if isinstance(one, str))
        if not all(sequences) or not all(strings):
            raise ValueError("expected stop sequences of at least one token but got an empty one")
        if strings and decode is None:
            raise ValueError(
                f"the stop {strings[0]!r} is a string: give decode=, which makes text of tokens, or give tokens"
            )
        return cls(tuple(sequences), strings, decode, max_new_tokens)

    @property
    def watched(self) -> bool:
        """Whether a row can end before its last token."""
        return bool(self.sequences or self.strings)

    def reached(self, tokens: list[int]) -> bool:
        """Whether the last of these tokens ends the row."""
        for end in self.sequences:
            if tuple(tokens[-len(end) :]) == end:
                return True
        if self.decode is not None and self.strings:
            # A string of n bytes needs at most n tokens; some more, so that it does not begin within a character.
            longest = max(len(one.encode()) for one in self.strings)
            text = self.decode(tokens[-(longest + 8) :])
            return any(one in text for one in self.strings)
        return False


def _several(name: str, value: Any) -> list[Any]:
    """One token or several as a list."""
    if isinstance(value, str | bytes):
        raise TypeError(
            f"expected {name} as token ids but got the text {value!r}; encode it with the tokenizer"
        )
    if hasattr(value, "__index__") and not getattr(value, "ndim", 0):
        return [value]
    if not hasattr(value, "__iter__"):
        raise TypeError(f"expected {name} as token ids but got {value!r}")
    return list(value)


def _tokens(name: str, value: Any, vocab_size: int | None) -> tuple[int, ...]:
    ids = tuple(check_whole(name, one, 0) for one in _several(name, value))
    for token in ids:
        if vocab_size is not None and token >= vocab_size:
            raise ValueError(
                f"expected {name} from 0 to {vocab_size - 1}, the model's tokens, but got {token}"
            )
    return ids


class Rows:
    """New tokens of each row.

    Args:
        batch: rows.
        ends: what ends them.

    Attributes:
        new: tokens of each row.
        active: whether each row goes on.
    """

    def __init__(self, batch: int, ends: Ends) -> None:
        self.ends = ends
        self.new: list[list[int]] = [[] for _ in range(batch)]
        self.active = [ends.max_new_tokens > 0] * batch

    def add(self, row: int, tokens: Sequence[int]) -> int:
        """Give a row tokens until it ends; returns how many it took, 0 if it had ended before."""
        taken = 0
        for token in tokens:
            if not self.active[row]:
                break
            self.new[row].append(token)
            taken += 1
            if len(self.new[row]) >= self.ends.max_new_tokens or self.ends.reached(self.new[row]):
                self.active[row] = False
        return taken

    def table(self, pad_id: int) -> tuple[Tensor, Tensor]:
        """New tokens as int64 `[B, N]` with padding behind them, and their numbers `[B]`."""
        lengths = torch.tensor([len(row) for row in self.new], dtype=torch.int64, device="cpu")
        longest = max(map(len, self.new), default=0)
        ids = [row + [pad_id] * (longest - len(row)) for row in self.new]
        return torch.tensor(ids, dtype=torch.int64, device="cpu").view(len(ids), longest), lengths
