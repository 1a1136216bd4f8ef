"""Tokens of text: bytes, or byte-pair encoding with the `tokenizers` library."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arcore._optional import require

DEFAULT_BPE_SIZE = 2048
FILE = "tokenizer.json"
_REPLACEMENT = "\ufffd"


class TextTokenizer(ABC):
    """Turns text into token ids and back.

    Attributes:
        vocab_size: number of tokens.
    """

    vocab_size: int

    @abstractmethod
    def encode(self, text: str) -> list[int]: ...

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens; bytes that are no UTF-8 become U+FFFD."""

    @abstractmethod
    def tensor(self, text: str) -> Tensor:
        """A long text as `[N]`, in the smallest dtype that holds the ids."""

    def json(self) -> str | None:
        """Contents of tokenizer.json; None when there is nothing to keep."""
        return None


class ByteTokenizer(TextTokenizer):
    """UTF-8 bytes."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def tensor(self, text: str) -> Tensor:
        data = bytearray(text.encode())
        return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


class BPETokenizer(TextTokenizer):
    """A tokenizer of the `tokenizers` library.

    Args:
        inner: the library's object.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.vocab_size = inner.get_vocab_size()

    @classmethod
    def train(cls, text: str, vocab_size: int = DEFAULT_BPE_SIZE) -> BPETokenizer:
        """Byte-level byte-pair encoding, made for a text; any other text can be encoded too.

        Args:
            text: what pairs are counted in.
            vocab_size: most tokens, at least 257; a short text may give fewer.

        Raises:
            ImportError: the library is missing.
            ValueError: `vocab_size` leaves no room for pairs.
        """
        if not 257 <= vocab_size <= 2**31:
            raise ValueError(
                f"byte-pair encoding needs more than the 256 bytes as tokens but got {vocab_size}"
            )
        library = require("tokenizers", extra="text")
        inner = library.Tokenizer(library.models.BPE())
        inner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        inner.train_from_iterator(text.splitlines(keepends=True), trainer)
        return cls(inner)

    @classmethod
    def load(cls, path: str | Path) -> BPETokenizer:
        """Read a tokenizer.json, ours or of published weights.

        Raises:
            FileNotFoundError: there is none.
            ValueError: the file is damaged.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no tokenizer file {path}")
        library = require("tokenizers", extra="text")
        try:
            return cls(library.Tokenizer.from_str(path.read_text(encoding="utf-8")))
        # The library raises a bare Exception.
        except Exception as error:
            raise ValueError(f"the tokenizer file {path} is damaged ({error})") from error

    def encode(self, text: str) -> list[int]:
        return list(self.inner.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.inner.decode(list(ids), skip_special_tokens=True))

    def tensor(self, text: str) -> Tensor:
        dtype = _smallest_dtype(self.vocab_size)
        # Line by line, as the pairs were counted; one call for all would keep offsets of every token in memory.
        lines = text.splitlines(keepends=True)
        parts = []
        for start in range(0, len(lines), 1024):
            coded = self.inner.encode_batch(lines[start : start + 1024], add_special_tokens=False)
            parts.append(torch.tensor([id for line in coded for id in line.ids], dtype=dtype))
        return torch.cat(parts) if parts else torch.empty(0, dtype=dtype)

    def json(self) -> str:
        return str(self.inner.to_str(pretty=True))


class TextStream:
    """Decodes one token after the other without ever showing half a character.

    Args:
        tokenizer: of the tokens.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        # Some tokenizers decode a token differently at the start of a text, so the last shown ones are kept.
        self._before: list[int] = []
        self._pending: list[int] = []

    def add(self, token: int) -> str:
        """The characters that this token completes, possibly none."""
        self._pending.append(token)
        text = self._text()
        if text.endswith(_REPLACEMENT) and len(self._pending) < 8:
            return ""
        self._before, self._pending = self._pending, []
        return text

    def rest(self) -> str:
        """What is left at the end, with U+FFFD for half a character."""
        text = self._text()
        self._before, self._pending = self._pending, []
        return text

    def _text(self) -> str:
        before = self._tokenizer.decode(self._before)
        return self._tokenizer.decode(self._before + self._pending)[len(before) :]


def make_tokenizer(wanted: str, text: str) -> TextTokenizer:
    """What `arcore train --tokenizer` names for a language model.

    Args:
        wanted: `"bytes"`, `"bpe"`, `"bpe:4096"` (trained on `text`), or the path of a tokenizer.json or its folder.
        text: the training text.

    Raises:
        FileNotFoundError: it is none of these.
        ValueError: the size or the file is unusable.
    """
    kind, _, size = wanted.partition(":")
    if wanted == "bytes":
        return ByteTokenizer()
    if kind == "bpe":
        if size and not size.isdecimal():
            raise ValueError(f"expected a number of tokens as in bpe:4096 but got {wanted!r}")
        return BPETokenizer.train(text, int(size) if size else DEFAULT_BPE_SIZE)
    path = Path(wanted)
    if not path.exists():
        raise FileNotFoundError(
            f"the tokenizer {wanted!r} is neither bytes, bpe, bpe:NUMBER nor an existing {FILE}"
        )
    return BPETokenizer.load(path / FILE if path.is_dir() else path)


def _smallest_dtype(vocab_size: int) -> torch.dtype:
    """The smallest dtype that holds all ids and that torch can index and convert."""
    if vocab_size <= 256:
        return torch.uint8
    return torch.int16 if vocab_size <= 32768 else torch.int32
