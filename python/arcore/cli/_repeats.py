"""Options that stand several times on a command line: joined where several values are meant, else refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Flag:
    """An option.

    Attributes:
        name: what it is called in messages, e.g. `"--num"` for `-n` too.
        count: values that it takes; None: any number; 0: a switch.
        adds: repeated options add their values, which are words; numbers such as a point's belong together.
        names: its value is names separated by commas, and repeated options add theirs.
    """

    name: str
    count: int | None = 1
    adds: bool = False
    names: bool = False


def joined(argv: Sequence[str], flags: Mapping[str, Flag]) -> list[str]:
    """The arguments, in which every option stands once.

    Parsers take the last of several and say nothing: `--data a --data b` would train on b alone.

    Args:
        argv: the arguments.
        flags: the options by how they are written, `"--batch-size"` or `"-n"`.

    Returns:
        The arguments; values of a repeated option stand where it came first.

    Raises:
        ValueError: an option whose value replaces the one before was given different ones.
    """
    kept: list[list[str]] = [
        []
    ]  # the words before the first option, then each option with all up to the next
    firsts: dict[str, tuple[list[str], list[str]]] = {}  # by name: the option's words in `kept`, its values
    end = list(argv).index("--") if "--" in argv else len(argv)
    place = 0
    while place < end:
        word, equals, attached = argv[place].partition("=")
        flag = flags.get(word.replace("_", "-")) if word.startswith("-") else None
        place += 1
        if flag is None or flag.count == 0:
            kept[-1].append(argv[place - 1])
            continue
        values, start = [attached] if equals else [], place - 1
        while not equals and place < end and len(values) != flag.count and not _is_flag(argv[place], flags):
            values.append(argv[place])
            place += 1
        if flag.name not in firsts:
            words = list(argv[start:place])
            firsts[flag.name] = words, values
            kept += [words, []]
            continue
        words, before = firsts[flag.name]
        if flag.adds or flag.names:
            before += values
            words[:] = [word, *([",".join(before)] if flag.names else before)]
        elif before != values:
            raise ValueError(
                f"{flag.name} was given as {' '.join(before)!r} and as {' '.join(values)!r}: give it once"
            )
    return [word for words in kept for word in words] + list(argv[end:])


def _is_flag(word: str, flags: Mapping[str, Flag]) -> bool:
    return word.startswith("--") or word.partition("=")[0] in flags
