"""Turns a dataclass into the options of a subcommand."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from typing import NoReturn, TypeVar

Options = TypeVar("Options")
# A line of the frame, with or without a title in it.
_RULE = re.compile("[─━-]{3}")
_BORDER = "│╭╮╰╯┃┏┓┗┛|+"


def parse(options: type[Options], command: str, argv: Sequence[str]) -> Options:
    """Read the options of `arcore <command>`; the dataclass's docstring is the help text.

    Raises:
        ValueError: the options do not fit; one line.
        SystemExit: `--help` was asked for and printed.
    """
    import tyro

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint), _wide_unless_help(argv):
            markers = (tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff)
            return tyro.cli(options, prog=f"arcore {command}", args=list(argv), config=markers)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ValueError(f"{_plain(complaint.getvalue())} (see `arcore {command} --help`)") from None


class PlainParser(argparse.ArgumentParser):
    """For the commands that must work with torch alone; complains as `parse` does."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(
            prog=f"arcore {command}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see `{self.prog} --help`)")


def _plain(box: str) -> str:
    """The sentence inside the framed message that tyro prints for people."""
    words: list[str] = []
    for line in box.splitlines():
        text = line.strip().strip(_BORDER).strip()
        if not text or _RULE.search(text):
            continue
        if text.startswith(("For full helptext", "Argument helptext")):
            break
        words.append(text)
    sentence = " ".join(words) or "these options do not fit"
    return re.sub(r"no type matching .*? Got errors: - <class '\w+'>: ", "", sentence)


@contextlib.contextmanager
def _wide_unless_help(argv: Sequence[str]) -> Iterator[None]:
    """tyro wraps its messages at the terminal's width, which could cut a name in two."""
    if {"-h", "--help"} & set(argv):
        yield
        return
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(max(400, shutil.get_terminal_size().columns))
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
