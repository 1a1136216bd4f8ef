"""Tokens of text: bytes, or byte-pair encoding with the `tokenizers` library."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arcore._optional import require
from arcore.nn.checks import check_text, check_whole
from arcore.nn.kinds import check_kinds

DEFAULT_BPE_SIZE = 2048
FILE = "tokenizer.json"
_REPLACEMENT = "\ufffd"
# One call of the library takes about 130 bytes of memory per character, so longer texts are cut.
CHUNK = 2**20
# A cut is tried out on this many characters on both sides, at up to so many places.
_CONTEXT, _TRIES = 2048, 64
# Tokens that a stream keeps as context of the next ones.
_WINDOW = 256
_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")


class TextTokenizer(ABC):
    """Turns text into token ids and back.

    Attributes:
        vocab_size: number of tokens.
    """

    vocab_size: int

    @abstractmethod
    @check_kinds
    def encode(self, text: str) -> list[int]: ...

    @abstractmethod
    @check_kinds
    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens; bytes that are no UTF-8 become U+FFFD."""

    @abstractmethod
    @check_kinds
    def tensor(self, text: str) -> Tensor:
        """The ids of `encode` for a text of any length, as `[N]`, in the smallest dtype that holds them all."""

    def byte_tokens(self) -> frozenset[int]:
        """Tokens of single bytes that are text only together with all their neighbours of this kind."""
        return frozenset()

    def json(self) -> str | None:
        """Contents of tokenizer.json; None when there is nothing to keep."""
        return None


class ByteTokenizer(TextTokenizer):
    """UTF-8 bytes."""

    vocab_size = 256

    @check_kinds
    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    @check_kinds
    def decode(self, ids: Sequence[int]) -> str:
        try:
            return bytes(ids).decode(errors="replace")
        except ValueError:
            raise ValueError(f"expected ids of bytes, 0 to 255, but got {min(ids)} to {max(ids)}") from None

    @check_kinds
    def tensor(self, text: str) -> Tensor:
        data = bytearray(text.encode())
        return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


@check_kinds
class BPETokenizer(TextTokenizer):
    """A tokenizer of the `tokenizers` library.

    Args:
        inner: the library's object. What it says about truncation and padding is switched off: a text is encoded whole.

    Attributes:
        vocab_size: the largest id and 1; ids may have holes.

    Raises:
        ValueError: it has no tokens.
    """

    def __init__(self, inner: Any) -> None:
        inner.no_truncation()
        inner.no_padding()
        self.inner = inner
        vocabulary = inner.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ValueError("it has no tokens")
        self.vocab_size = max(vocabulary.values()) + 1
        self._byte_tokens = frozenset(id for token, id in vocabulary.items() if _BYTE_TOKEN.fullmatch(token))

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
        check_text("text", text)
        vocab_size = check_whole("vocab_size", vocab_size, 0)
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
        inner.train_from_iterator(_groups_of_lines(text), trainer)
        return cls(inner)

    @classmethod
    @check_kinds
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

    @check_kinds
    def encode(self, text: str) -> list[int]:
        """Ids of a text.

        Raises:
            ValueError: the tokenizer has no token for some of it, nor one for what is unknown.
        """
        try:
            return list(self.inner.encode(text, add_special_tokens=False).ids)
        except TypeError:
            raise
        # The library raises a bare Exception.
        except Exception as error:
            raise _unreadable(error) from error

    @check_kinds
    def decode(self, ids: Sequence[int]) -> str:
        return str(self.inner.decode(list(ids), skip_special_tokens=True))

    @check_kinds
    def tensor(self, text: str) -> Tensor:
        dtype = _smallest_dtype(self.vocab_size)
        parts = []
        for piece in self._pieces(text):
            # Without offsets, which would take most of the memory.
            try:
                (coded,) = self.inner.encode_batch_fast([piece], add_special_tokens=False)
            except Exception as error:
                raise _unreadable(error) from error
            parts.append(torch.tensor(coded.ids, dtype=dtype))
        return torch.cat(parts) if parts else torch.empty(0, dtype=dtype)

    def byte_tokens(self) -> frozenset[int]:
        return self._byte_tokens

    def _pieces(self, text: str) -> Iterator[str]:
        """A text in pieces whose ids, one after the other, are those of the text."""
        start = 0
        while len(text) - start > 2 * CHUNK:
            cut = next((at for at in self._cuts(text, start + CHUNK) if self._may_cut(text, at)), None)
            if cut is None:
                break
            yield text[start:cut]
            start = cut
        if start < len(text):
            yield text[start:]

    def _cuts(self, text: str, start: int) -> Iterator[int]:
        """Places after `start` where a letter is followed by a space or the end of a line, spread over a piece."""
        places = re.compile(r"(?<=\w)(?=\s)")
        for number in range(_TRIES):
            found = places.search(text, start + number * (CHUNK // _TRIES))
            if found is not None and 0 < found.start() < len(text):
                yield found.start()

    def _may_cut(self, text: str, at: int) -> bool:
        """Whether both sides of a place have the same ids apart as together."""
        left, right = text[max(0, at - _CONTEXT) : at], text[at : at + _CONTEXT]
        return self.encode(left + right) == self.encode(left) + self.encode(right)

    def json(self) -> str:
        return str(self.inner.to_str(pretty=True))


def _unreadable(error: Exception) -> ValueError:
    return ValueError(
        f"the tokenizer cannot read this text: {error}; use one with a token for what is unknown, or of bytes"
    )


@check_kinds
class TextStream:
    """Decodes one token after the other without ever showing half a character.

    The pieces joined are what `decode` makes of all tokens.

    Args:
        tokenizer: of the tokens.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes = tokenizer.byte_tokens()
        # Some tokenizers decode a token differently at the start of a text, so the tokens shown last are kept in front.
        self._tokens: list[int] = []
        self._settled = 0  # tokens that are shown and will not change any more
        self._shown = 0  # characters of the text of `_tokens` that are shown

    @check_kinds
    def add(self, token: int) -> str:
        """The characters that this token completes, possibly none."""
        self._tokens.append(int(token))
        end = len(self._tokens)
        # Such a token may still turn its whole run of bytes from characters into U+FFFD.
        while end > self._settled and self._tokens[end - 1] in self._bytes:
            end -= 1
        text = self._tokenizer.decode(self._tokens[:end])
        # The last of these may become a character; what stands before it is wrong for good.
        ready = len(text) - text.endswith(_REPLACEMENT)
        piece, self._shown = text[self._shown : ready], max(self._shown, ready)
        if piece and ready == len(text) and end == len(self._tokens):
            self._settle()
        return piece

    def rest(self) -> str:
        """What is left at the end, with U+FFFD for half a character."""
        text = self._tokenizer.decode(self._tokens)
        piece = text[self._shown :]
        self._shown = len(text)
        self._settle()
        return piece

    def _settle(self) -> None:
        """Everything is shown: drop tokens from far back."""
        fresh = len(self._tokens) - self._settled
        kept = self._tokens[-max(fresh, _WINDOW // 2) :]
        if len(self._tokens) > _WINDOW and self._tokenizer.decode(kept):
            self._tokens = kept
            self._shown = len(self._tokenizer.decode(kept))
        self._settled = len(self._tokens)


def make_tokenizer(wanted: str | os.PathLike[str], text: str) -> TextTokenizer:
    """What `arcore train --tokenizer` names for a language model.

    Args:
        wanted: `"bytes"`, `"bpe"`, `"bpe:4096"` (trained on `text`), the path of a tokenizer.json or its folder, or a
            preset whose weights a package ships with its tokenizer, e.g. `"smollm2"`.
        text: the training text.

    Raises:
        TypeError: `wanted` is neither a text nor a path.
        FileNotFoundError: it is none of these.
        ValueError: the size or the file is unusable.
    """
    if not isinstance(wanted, str | os.PathLike):
        raise TypeError(f"expected the tokenizer as bytes, bpe, bpe:NUMBER or a path but got {wanted!r}")
    check_text("text", text)
    wanted = os.fspath(wanted)
    kind, _, size = wanted.partition(":")
    if wanted == "bytes":
        return ByteTokenizer()
    if kind == "bpe":
        if size and not size.isdecimal():
            raise ValueError(f"expected a number of tokens as in bpe:4096 but got {wanted!r}")
        return BPETokenizer.train(text, int(size) if size else DEFAULT_BPE_SIZE)
    path = Path(wanted)
    if not path.exists():
        # Packages' weights know tokenizers, not the reverse.
        from arcore.data.real.weights import packaged_tokenizer

        found = packaged_tokenizer(wanted)
        if found is None:
            raise FileNotFoundError(
                f"the tokenizer {wanted!r} is neither bytes, bpe, bpe:NUMBER nor an existing {FILE}"
            )
        return found
    return BPETokenizer.load(path / FILE if path.is_dir() else path)


def _groups_of_lines(text: str, size: int = 65536) -> Iterator[str]:
    """A text in parts that end with lines; pairs are counted across the lines of a part."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + size) + 1 or len(text)
        yield text[start:end]
        start = end


def _smallest_dtype(vocab_size: int) -> torch.dtype:
    """The smallest dtype that holds all ids and that torch can index and convert."""
    if vocab_size <= 256:
        return torch.uint8
    return torch.int16 if vocab_size <= 32768 else torch.int32
