"""The `arcore` command. Each subcommand is one module here, imported only when it is called."""

from __future__ import annotations

import difflib
import errno
import importlib
import io
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from arcore._optional import require

COMMANDS = {
    "demo": "train a small next-scale image model on handwritten digits and show what it learnt",
    "train": "train a model of the zoo on your images, videos, text or tables",
    "sample": "draw images, videos or text from a trained model, or forecast",
    "data": "look through a folder of images, videos or text, or a table, before training on it",
    "run": "use a system that is neither trained nor sampled: an estimator, an analysis, an agent",
    "check": "ask systems of the zoo to prove their papers' claims",
    "zoo": "list the systems and presets, find or show some",
    "env": "show versions, instruction sets, and what is missing",
    "bench": "run the benchmarks of the source checkout",
}
# Those that compute with models; benchmarks choose for themselves.
_COMPUTING = ("demo", "train", "sample", "run", "check")
# A write that fails so may have been one of what is printed.
_NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
# Their options are read by tyro; the others work with torch alone.
_EXTRA = {"demo": "train", "train": "train", "sample": "train", "run": "zoo"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0, or 2 after a one-line error on stderr.

    `ARCORE_TRACEBACK=1` in the environment shows where an error came from; `ARCORE_MATMUL` chooses the backend of
    `arcore.float32_matmul`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if arguments[0] in ("-V", "--version"):
        from arcore._version import __version__

        print(f"arcore {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(COMMANDS)}"
        print(f"arcore: error: unknown command {name!r}: {hint}", file=sys.stderr)
        return 2
    try:
        if name in _EXTRA:
            require("tyro", extra=_EXTRA[name])
        with _plain_warnings(name):
            code = _run(name, rest)
            # What is still in the buffer may find no place, or no reader, either.
            sys.stdout.flush()
            return code
    except KeyboardInterrupt:
        print(f"arcore {name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe has left.
        _discard_output()
        return 1
    except Exception as error:
        if os.environ.get("ARCORE_TRACEBACK"):
            raise
        known = isinstance(error, (ValueError, TypeError, OSError, RuntimeError, ImportError))
        # What no part of arcore expects is named by its kind too: the message alone may say little, as of a KeyError.
        kind = "" if known else f"{type(error).__name__}: "
        said = one_line(error)
        if (
            isinstance(error, OSError)
            and error.errno in _NO_PLACE
            and not error.filename
            and _output_is_lost()
        ):
            said = f"cannot write the output: {error.strerror or said}"
        print(f"arcore {name}: error: {kind}{said}", file=sys.stderr)
        return 2


def _run(name: str, arguments: Sequence[str]) -> int:
    command = importlib.import_module(f"arcore.cli.{name}")
    if name not in _COMPUTING:
        return int(command.main(arguments))
    from arcore.matmul import float32_matmul

    with float32_matmul(os.environ.get("ARCORE_MATMUL", "auto")):  # type: ignore[arg-type]
        return int(command.main(arguments))


def _output_is_lost() -> bool:
    """Whether what is printed finds no place; if so, it is given up."""
    try:
        if not sys.stdout.isatty():
            sys.stdout.flush()
            # A buffer that could not be written is thrown away: only another byte tells.
            os.write(sys.stdout.fileno(), b"\n")
    except io.UnsupportedOperation:
        return False
    except OSError:
        _discard_output()
        return True
    return False


def _discard_output() -> None:
    """Point stdout elsewhere, so that the interpreter's last flush is quiet."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def one_line(error: BaseException) -> str:
    """What an exception says, on one line."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def _plain_warnings(command: str) -> Iterator[None]:
    """Warnings for users as one line each, without the place in the source that warned."""
    before = warnings.formatwarning

    def plain(message: Warning | str, category: type[Warning], *place: Any, **line: Any) -> str:
        if not issubclass(category, UserWarning) or os.environ.get("ARCORE_TRACEBACK"):
            return before(message, category, *place, **line)
        return f"arcore {command}: warning: {' '.join(str(message).split())}\n"

    warnings.formatwarning = plain
    try:
        yield
    finally:
        warnings.formatwarning = before


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:{width}}  {summary}" for name, summary in COMMANDS.items())
    return (
        "usage: arcore COMMAND [options]\n\n"
        "Kernels and a model zoo for autoregressive models that are not plain causal language models.\n\n"
        f"commands:\n{lines}\n\n"
        "`arcore COMMAND --help` explains a command with an example. Start with `arcore demo`.\n"
        "`arcore --version` prints the version; ARCORE_TRACEBACK=1 shows where an error came from."
    )
