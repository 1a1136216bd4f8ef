"""Names for stretches of queries and keys, from which pictures take their colours."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Segment(NamedTuple):
    """Positions ``[start, stop)``. Segments of one `group` share a colour; `title` is written beside the axis."""

    start: int
    stop: int
    group: str
    title: str

    def cut(self, start: int, stop: int) -> Segment:
        """The part within ``[start, stop)``, counted from `start`."""
        return self._replace(start=max(self.start, start) - start, stop=min(self.stop, stop) - start)


class Labels(NamedTuple):
    """What a mask's queries and keys are, for pictures; no part of the mask's value.

    `ordered` says that the groups form a sequence (scales, blocks), which pictures show as a colour ramp.
    """

    queries: tuple[Segment, ...]
    keys: tuple[Segment, ...]
    ordered: bool = False

    def cut(self, start: int, stop: int, nk: int) -> Labels:
        """Labels of the rows ``[start, stop)`` and the keys ``[0, nk)``."""
        return self._replace(queries=_cut(self.queries, start, stop), keys=_cut(self.keys, 0, nk))


def consecutive(
    sizes: Iterable[int], titles: Iterable[str], groups: Iterable[str] | None = None, start: int = 0
) -> tuple[Segment, ...]:
    """Segments one after the other, without those of size 0; each is a group of its own by default."""
    titles = list(titles)
    segments = []
    for size, title, group in zip(sizes, titles, titles if groups is None else groups, strict=True):
        if size:
            segments.append(Segment(start, start + size, group, title))
        start += size
    return tuple(segments)


def _cut(segments: tuple[Segment, ...], start: int, stop: int) -> tuple[Segment, ...]:
    return tuple(s.cut(start, stop) for s in segments if s.start < stop and s.stop > start)
