"""`arcore env`"""

from __future__ import annotations

from collections.abc import Sequence

from arcore.cli._parse import PlainParser

DESCRIPTION = """\
Show versions, the CPU instruction set in use, the GPU architectures that were built, threads,
and what is missing with the command that installs it. Put this into bug reports.

Example: arcore env"""


def main(argv: Sequence[str]) -> int:
    PlainParser("env", DESCRIPTION).parse_args(argv)
    from arcore.env import report

    print(report())
    return 0
