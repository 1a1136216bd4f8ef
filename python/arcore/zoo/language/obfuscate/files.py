"""Files of code by their endings: which there are, and which language renames them."""

from __future__ import annotations

import ast
import keyword
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from arcore._files import read_text
from arcore.zoo.language.obfuscate import rename, trees
from arcore.zoo.language.obfuscate.renamed import Obfuscated

ENDINGS = (".py", *trees.LANGUAGES)


def code_files(sources: Sequence[str]) -> list[Path]:
    """Files of code: those named, those of folders and below, and for `stdlib` the top level of Python's library.

    Raises:
        FileNotFoundError: one does not exist.
        ValueError: there is none, or one has another ending.
    """
    found: list[Path] = []
    known = ", ".join(ENDINGS)
    for source in sources:
        path = Path(source)
        if source == "stdlib":
            found += sorted(Path(os.__file__).parent.glob("*.py"))
        elif path.is_dir():
            found += sorted(one for one in path.rglob("*") if one.suffix.lower() in ENDINGS and one.is_file())
        elif not path.is_file():
            raise FileNotFoundError(
                f"{source} does not exist: give files of code ({known}), folders of them, or stdlib"
            )
        elif path.suffix.lower() not in ENDINGS:
            raise ValueError(f"{source}: expected a file of code, whose name ends in one of {known}")
        else:
            found.append(path)
    if not found:
        raise ValueError(f"there is no file of code ({known}) in {', '.join(sources)}")
    return found


def read(path: Path) -> str:
    """The text of a file of code.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its bytes are no text; of Python, in the encoding that it declares.
    """
    if trees.language_of(path) is None:
        return rename.read(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give files of code or folders of them")
    return read_text(path)


@contextmanager
def _shallow(path: Path) -> Iterator[None]:
    """Code whose tree is deeper than Python's stack, such as a sum of 20,000 terms, is named and not a traceback."""
    try:
        yield
    # CPython's parser reports its own stack's end as a MemoryError.
    except (RecursionError, MemoryError) as error:
        raise ValueError(
            f"{path}: an expression in it is nested too deeply to be read; leave the file out"
        ) from error


def obfuscate_file(path: Path) -> Obfuscated:
    """Obfuscate a file; errors are those of `read`, and a ValueError with file and line where it does not parse."""
    language = trees.language_of(path)
    with _shallow(path):
        if language is None:
            return rename.obfuscate(read(path), str(path))
        return trees.obfuscate(read(path), language, str(path))


def functions_of(path: Path, longest: int) -> list[Obfuscated]:
    """Functions of a file, obfuscated, whose source has at most `longest` characters and is ASCII.

    Errors are those of `obfuscate_file`.
    """
    with _shallow(path):
        return _functions_of(path, longest)


def _functions_of(path: Path, longest: int) -> list[Obfuscated]:
    language = trees.language_of(path)
    if language is not None:
        return trees.functions(read(path), language, longest, str(path))
    found = []
    for node in ast.walk(rename.parse(read(path), str(path))):
        if isinstance(node, ast.FunctionDef):
            text = ast.unparse(node)
            if len(text) <= longest and text.isascii():
                found.append(rename.obfuscate(text, f"{path}: {node.name}"))
    return found


def restore(code: str, names: Mapping[str, str], language: str = "python") -> str:
    """Obfuscated code under other names; `names` goes from those to the obfuscated ones, as in `Obfuscated`."""
    if language == "python":
        return rename.restore(code, names)
    by_name = {one.name: one for one in trees.LANGUAGES.values()}
    return trees.rename(code, {new: old for old, new in names.items()}, by_name[language])


def language_name(path: Path) -> str:
    """python, c, javascript, java or go."""
    language = trees.language_of(path)
    return "python" if language is None else language.name


def check_compiles(one: Obfuscated, path: Path) -> None:
    """See that obfuscated code still parses, Python's also that it compiles.

    Raises:
        SyntaxError, ValueError: it does not.
    """
    if one.language != "python":
        restore(one.code, {}, one.language)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compile(one.code, str(path), "exec")


# Words that no identifier may be in any of the languages.
_WORDS = (
    "abstract assert auto boolean break byte case catch chan char class const continue debugger default defer delete",
    "do double else enum export extends extern false final finally float for func function go goto if implements",
    "import in inline instanceof int interface let long map native new nil null package private protected public range",
    "register restrict return select short signed sizeof static strictfp struct super switch synchronized this throw",
    "throws transient true try type typedef typeof union unsigned var void volatile while with yield",
)
RESERVED = frozenset(keyword.kwlist) | {word for line in _WORDS for word in line.split()}
