"""Turns dataclasses into the options of a subcommand."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import io
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NoReturn,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from arcore.cli._repeats import Flag, joined

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
    return _cli(options, command, joined(argv, _flags([options])))


def _cli(options: type[Options], command: str, argv: Sequence[str]) -> Options:
    import tyro

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint), _wide_unless_help(argv):
            markers = (tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)
            found = tyro.cli(options, prog=f"arcore {command}", args=list(argv), config=markers)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ValueError(f"{_plain(complaint.getvalue())} (see `arcore {command} --help`)") from None
    _refuse_nan(found)
    return found


def _refuse_nan(options: Any) -> None:
    """NaN means nothing in any option, and compares as if it were inside all bounds."""
    for found in dataclasses.fields(options):
        value = getattr(options, found.name)
        if dataclasses.is_dataclass(value):
            _refuse_nan(value)
        elif any(part != part for part in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"--{found.name.replace('_', '-')} must be a number but got {value}")


def parse_groups(
    command: str, text: str, groups: Mapping[str, Group], argv: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Read options that stand in several dataclasses.

    The help text of an option is its entry under `Attributes:` in the dataclass's docstring. A field's metadata may
    hold `flag` (its name on the command line), `aliases`, `metavar`, `positional`, and `names` (the value is names
    separated by commas, so the option may be repeated). Options of any number of words may be repeated too.

    Args:
        command: what stands behind `arcore`, for the help text.
        text: what the command does.
        groups: titles and what stands under them.
        argv: the arguments.

    Returns:
        For each group the options that were given, by field.

    Raises:
        ValueError: the options do not fit; one line.
        SystemExit: `--help` was asked for and printed.
    """
    made = {title.replace(" ", "_"): _made(title, group) for title, group in groups.items()}
    whole: Any = dataclasses.make_dataclass(
        "Options",
        [(name, kind, dataclasses.field(default_factory=kind)) for name, (kind, _) in made.items()],
    )
    whole.__doc__ = text
    found = _cli(whole, command, joined(argv, _flags([group.options for group in groups.values()])))
    chosen: dict[str, dict[str, Any]] = {}
    for title in groups:
        name = title.replace(" ", "_")
        values = getattr(found, name)
        chosen[title] = {
            field: value
            for field in made[name][1]
            if (value := getattr(values, field)) is not None and value is not False
        }
    return chosen


@dataclass(frozen=True)
class Group:
    """Options of one dataclass.

    Attributes:
        options: the dataclass.
        defaults: by field, what is shown as default where that is not the dataclass's.
        without: fields that are no options.
    """

    options: type
    defaults: Mapping[str, Any] = field(default_factory=dict)
    without: Sequence[str] = ()


def _made(title: str, group: Group) -> tuple[type, list[str]]:
    """A dataclass for tyro, in which nothing has a default, so that what was given is known; and its fields."""
    from tyro.conf import Positional, arg

    helps = _helps(group.options)
    hints = get_type_hints(group.options, include_extras=False)
    rows: list[Any] = []
    for found in dataclasses.fields(group.options):
        if found.name in group.without:
            continue
        default = group.defaults.get(found.name, found.default)
        kind, is_flag = hints[found.name], hints[found.name] is bool
        nothing = any(default is nothing for nothing in (None, False, dataclasses.MISSING))
        shown = "" if nothing else f"(default: {_shown(default)})"
        settings: dict[str, Any] = {"help": helps.get(found.name, ""), "help_behavior_hint": shown}
        for key, name in (("flag", "name"), ("aliases", "aliases"), ("metavar", "metavar")):
            if key in found.metadata:
                settings[name] = found.metadata[key]
        if not is_flag:
            settings.setdefault("metavar", _metavar(kind))
        wanted: Any = kind if is_flag else kind | None
        annotated: Any = Annotated[wanted, arg(**settings)]
        if found.metadata.get("positional"):
            positional: Any = Positional
            annotated = positional[annotated]
        rows.append((found.name, annotated, dataclasses.field(default=False if is_flag else None)))
    made = dataclasses.make_dataclass(title.title().replace(" ", ""), rows, frozen=True)
    made.__doc__ = ""
    return made, [name for name, *_ in rows]


def _flags(kinds: Sequence[type]) -> dict[str, Flag]:
    """The options of dataclasses by how they are written."""
    flags: dict[str, Flag] = {}
    for kind in kinds:
        hints = get_type_hints(kind)
        for found in dataclasses.fields(kind):
            if found.metadata.get("positional"):
                continue
            first = _parts(hints[found.name])[0]
            count, inner = 0 if first is bool else 1, get_args(first)
            many = get_origin(first) is tuple and Ellipsis in inner
            if get_origin(first) is tuple:
                count = len(inner)
            name = f"--{found.metadata.get('flag', found.name).replace('_', '-')}"
            adds = many and inner[0] in (str, Path)
            flag = Flag(name, None if many else count, adds, bool(found.metadata.get("names")))
            flags |= dict.fromkeys((name, *found.metadata.get("aliases", ())), flag)
    return flags


def _helps(options: type) -> dict[str, str]:
    """The text of each option, from the docstrings of a dataclass and of those that it extends."""
    from docstring_parser import parse as parse_docstring

    helps: dict[str, str] = {}
    for kind in reversed(options.__mro__):
        if dataclasses.is_dataclass(kind):
            for entry in parse_docstring(kind.__dict__.get("__doc__") or "").params:
                words = " ".join((entry.description or "").split())
                # A value that the option takes is shown as it is written.
                words = words if words.startswith("`") else words[:1].upper() + words[1:]
                helps[entry.arg_name] = words.replace("`", "").replace('"', "")
    return helps


def _metavar(kind: Any) -> str:
    """What stands for a value of a type."""
    choices = [choice for part in _parts(kind) for choice in get_args(part) if get_origin(part) is Literal]
    if choices:
        return "|".join(map(str, choices))
    first = _parts(kind)[0]
    if get_origin(first) is tuple:
        inner = [part for part in get_args(first) if part is not Ellipsis]
        return " ".join(_metavar(part) for part in inner)
    return {int: "N", float: "X", Path: "PATH"}.get(first, "NAME")


def _parts(kind: Any) -> list[Any]:
    """The types of a union, None aside."""
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return [part for part in parts if part is not type(None)]


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


class PlainParser(argparse.ArgumentParser):
    """For the commands that must work with torch alone; complains as `parse` does."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(
            prog=f"arcore {command}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        flags: dict[str, Flag] = {}
        for action in self._actions:
            if action.option_strings:
                name = action.option_strings[-1]
                several, switch = action.nargs in ("*", "+"), action.nargs == 0 or action.const is not None
                count = 0 if switch or isinstance(action, argparse._AppendAction) else None if several else 1
                flags |= dict.fromkeys(
                    action.option_strings, Flag(name, count, several and action.type is None)
                )
        return super().parse_known_args(joined(args, flags), namespace)

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
    if len(words) > 1 and (words[1].startswith(words[0]) or words[0] in _TITLES):
        # The title of the frame says the same.
        words = words[1:]
    sentence = " ".join(words) or "these options do not fit"
    # That an option can be left out is no choice.
    sentence = re.sub(r"'None', |, 'None'", "", sentence)
    sentence = re.sub(r"no type matching .*? Got errors: - <class '\w+'>: ", "", sentence)
    for pattern, ours in _REWORDED:
        sentence = re.sub(pattern, ours, sentence)
    return sentence


_TITLES = ("Value error", "Invalid choice", "Missing argument")


def _choices(found: re.Match[str]) -> str:
    known = ", ".join(sorted(re.findall(r"'([^']*)'", found[3])))
    return f"{found[2]} must be one of {known} but got {found[1]}"


def _unknown(found: re.Match[str]) -> str:
    """Options that there are not, and those whose names are close."""
    # What stands behind an unknown option is its value and says nothing more.
    unknown = re.findall(r"--?[A-Za-z][\w-]*", found[1]) or found[1].split(", ")
    known = dict.fromkeys(re.findall(r"--[a-z][a-z-]*", found[2] or ""))
    close = [name for name in known if name not in unknown]
    close = difflib.get_close_matches(unknown[0], close, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    return f"Unrecognized options: {', '.join(unknown)}{hint}"


_REWORDED: tuple[tuple[str, Any], ...] = (
    (r"^Unrecognized options: (.+?)(?: Perhaps you meant: (.*))?$", _unknown),
    (
        r"^Error parsing (\S+): invalid literal for int\(\) with base 10: (.*)$",
        r"\1 must be a whole number but got \2",
    ),
    (r"^Error parsing (\S+): could not convert string to float: (.*)$", r"\1 must be a number but got \2"),
    (
        r"^Error parsing (\S+): no type matching \{(.+?)\} could be instantiated from \[(.*?)\]\..*$",
        lambda found: (
            f"{found[1]} must be {found[2].replace('FLOAT', 'X').replace('INT', 'N')} but got {found[3]}"
        ),
    ),
    (r"^invalid choice (.+) for argument '(\S+)'\. Expected one of \((.*)\)\.$", _choices),
    (r"^Missing value for argument '(\S+)'\. Expected 1 values\.$", r"\1 needs a value"),
)


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
