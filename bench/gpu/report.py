"""What a benchmark hands over: records, and reasons why a peer has none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from timing import Ceilings, Run, Timing, time_calls, time_graph, where_graphs_are_captured


@dataclass
class Report:
    """Collects records in the form of bench/results/*.json (`extra_info` of a pytest-benchmark entry)."""

    device: str
    ceilings: Ceilings
    save: Callable[[Report], None]
    records: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    # Implementations that are measured here; None: all.
    wanted: frozenset[str] | None = None
    # What is wrong with the results of the implementation that is measured now, if it is arcore's.
    wrong: list[str] = field(default_factory=list)

    @property
    def gpu(self) -> bool:
        return self.device == "cuda"

    def skip(self, op: str, case: str, impl: str, direction: str, reason: str) -> None:
        reason = reason.strip().splitlines()[0][:200] if reason.strip() else "no reason given"
        self.skipped.append({"op": op, "case": case, "impl": impl, "direction": direction, "reason": reason})
        print(f"skipped: {op} {case} {direction} {impl}: {reason}", flush=True)
        self.save(self)

    def add(
        self, *, op: str, case: str, impl: str, direction: str, dtype: str, timing: Timing, **more: Any
    ) -> None:
        record = {
            "op": op, "case": case, "impl": impl, "direction": direction, "dtype": dtype,
            "seconds": timing.seconds, "low": timing.low, "high": timing.high, "rounds": timing.rounds,
            "method": timing.method, **more,
        }  # fmt: skip
        self.records.append(record)
        print(
            f"measured: {op} {case} {direction} {impl}: {timing.seconds * 1e3:.4f} ms{_beside(impl, more)}",
            flush=True,
        )
        self.save(self)

    def find(self, **wanted: Any) -> dict[str, Any] | None:
        """The record with these values, if there is one."""
        for record in self.records:
            if all(record.get(key) == value for key, value in wanted.items()):
                return record
        return None

    def measure(self, make_runs: Callable[[], list[Run]], *, graph: bool = False, **names: Any) -> None:
        """Times what `make_runs` returns; it raises where the result is wrong or the peer cannot do the case.

        With `graph` in a captured graph, and with its launches where the calls cannot be captured.
        `names` are the keys of the record; a callable value is computed from the seconds.
        """
        where = {key: names[key] for key in ("op", "case", "impl", "direction")}
        if self.wanted is not None and names["impl"] not in self.wanted:
            return
        OWN[0], self.wrong = names["impl"].startswith("arcore"), []
        WRONG[0] = self.wrong
        try:
            if graph:
                with where_graphs_are_captured(self.device):
                    runs = make_runs()
                timing = self._time_graph(runs)
            else:
                timing = time_calls(make_runs(), self.device)
        except WrongResultError as error:
            self.skip(**where, reason=f"wrong result, so no number: {error}")
            return
        except Exception as error:
            self.skip(**where, reason=f"{type(error).__name__}: {error}")
            return
        extra = {key: value(timing.seconds) if callable(value) else value for key, value in names.items()}
        if self.wrong:
            extra["wrong"] = "; ".join(dict.fromkeys(self.wrong))
        self.add(timing=timing, **extra)

    def _time_graph(self, runs: list[Run]) -> Timing:
        try:
            return time_graph(runs, self.device)
        except RuntimeError as error:
            print(f"not captured, so timed with its launches: {str(error).splitlines()[0][:200]}", flush=True)
            return time_calls(runs, self.device)


def _beside(impl: str, values: dict[str, Any]) -> str:
    """What a number is to be read with: TFLOP/s or the multiple of its floor, and the goal of arcore's own."""
    said = [f"{values['tflops']:.0f} TFLOP/s"] if values.get("tflops") else []
    said += [f"{values['times_floor']:.2f} x floor"] if values.get("times_floor") else []
    if impl.startswith("arcore"):
        own = "goal_sm80" if impl == "arcore" else "goal_sm90a"
        if values.get(own):
            said.append(f"goal {values[own]:.0f} TFLOP/s")
        if values.get("goal_seconds"):
            said.append(f"goal {values['goal_seconds'] * 1e3:.2f} ms")
        if values.get("goal_times_floor"):
            said.append(f"goal {values['goal_times_floor']:.1f} x floor")
        if not any(text.startswith("goal") for text in said):
            said.append("no goal")
    return f" ({', '.join(said)})" if said else ""


class WrongResultError(Exception):
    """A result is further from the float64 one than its precision explains."""


OWN, WRONG = [False], [[""]]


def wrong_result(what: str) -> None:
    """A peer that is wrong gets no number; arcore's own gets one, marked red: the time of a kernel is worth knowing."""
    if not OWN[0]:
        raise WrongResultError(what)
    WRONG[0].append(what)
    print(f"wrong result: {what}", flush=True)
