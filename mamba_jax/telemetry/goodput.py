"""Accounts for the time of a run: which share was spent in steps that count, within one start and over all starts."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

OTHER = "other"


class Goodput:
    """A stopwatch with named buckets: every second since its construction is counted in exactly one of them."""

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter) -> None:
        """Starts the accounting.

        Args:
            clock: returns a time in seconds that never goes back.
        """
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._open = [OTHER]
        self._since = clock()

    @contextlib.contextmanager
    def measure(self, bucket: str) -> Iterator[None]:
        """Context manager that counts the time of its block in `bucket`; an inner block pauses the outer one.

        Use it from one thread only.
        """
        self._settle()
        self._open.append(bucket)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each bucket so far; they add up to the time since construction."""
        self._settle()
        return dict(self._seconds)

    def _settle(self) -> None:
        now = self._clock()
        bucket = self._open[-1]
        self._seconds[bucket] = self._seconds.get(bucket, 0.0) + now - self._since
        self._since = now


@dataclasses.dataclass(frozen=True, kw_only=True)
class GoodputSummary:
    """Where the time of a run went, over all its starts.

    Attributes:
        seconds: seconds by bucket; they add up to `wall_seconds`. "step" is time in steps that count, "lost" in steps
            that a later start repeated, "down" the time between the last event of a start and the next start, "other"
            time that no `measure` block covers.
        wall_seconds: time from the first start to the last event of the last start.
        goodput: `seconds["step"] / wall_seconds`, 0 to 1; None if no time has passed.
        starts: number of times the run was started.
    """

    seconds: dict[str, float]
    wall_seconds: float
    goodput: float | None
    starts: int


def summarize(events: Sequence[Mapping[str, Any]]) -> GoodputSummary:
    """Adds up the "start" and "goodput" events of a run.

    Of a start that was killed, only the time up to its last event is known; the rest counts as "down". Steps between
    two "goodput" events are assumed to be equally long.

    Args:
        events: the result of `read_events`; events before the first "start" are ignored.
    """
    starts = _starts(events)
    seconds: dict[str, float] = {}
    for index, start in enumerate(starts):
        kept_until = min((float(later.first_step) for later in starts[index + 1 :]), default=math.inf)
        lost = start.step_seconds - start.step_seconds_until(kept_until)
        counted = sum(start.seconds.values())
        parts = {
            **start.seconds,
            "step": start.step_seconds - lost,
            "lost": lost,
            OTHER: start.seconds.get(OTHER, 0.0) + max(0.0, start.end - start.begin - counted),
        }
        if index > 0:
            parts["down"] = max(0.0, start.begin - starts[index - 1].end)
        for bucket, value in parts.items():
            seconds[bucket] = seconds.get(bucket, 0.0) + value
    seconds = {bucket: value for bucket, value in seconds.items() if value > 0}
    wall = math.fsum(seconds.values())
    return GoodputSummary(
        seconds=seconds,
        wall_seconds=wall,
        goodput=seconds.get("step", 0.0) / wall if wall > 0 else None,
        starts=len(starts),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Start:
    """One start of the run: its first and last time in the log, and the seconds by bucket that it reported last."""

    first_step: int
    begin: float
    end: float
    seconds: dict[str, float]
    reports: tuple[tuple[int, float], ...]
    """(step, seconds spent in steps until then), ascending."""

    @property
    def step_seconds(self) -> float:
        return self.seconds.get("step", 0.0)

    def step_seconds_until(self, step: float) -> float:
        """Seconds spent in the steps up to `step`, interpolated between reports."""
        before = (self.first_step, 0.0)
        for report in self.reports:
            if report[0] >= step:
                share = (step - before[0]) / max(1, report[0] - before[0])
                return before[1] + max(0.0, share) * (report[1] - before[1])
            before = report
        return self.step_seconds


def _starts(events: Sequence[Mapping[str, Any]]) -> list[_Start]:
    """Splits events at each "start"; a start ends at its last event, but not after the next one begins."""
    groups: list[list[Mapping[str, Any]]] = []
    for event in events:
        if event["event"] == "start":
            groups.append([])
        if groups:
            groups[-1].append(event)
    starts = [_read_start(group) for group in groups]
    limits = [after.begin for after in starts[1:]] + [math.inf]
    return [dataclasses.replace(start, end=min(start.end, limit)) for start, limit in zip(starts, limits, strict=False)]


def _read_start(group: Sequence[Mapping[str, Any]]) -> _Start:
    """Sums up one start from its events, which are a "start" and all that follow up to the next one."""
    reports = [event for event in group if event["event"] == "goodput"]
    seconds = reports[-1]["seconds"] if reports else {}
    begin = group[0]["time"]
    if reports:
        # The stopwatch starts before the first event is written; its total in the last report says how long before.
        begin = min(begin, reports[-1]["time"] - sum(seconds.values()))
    return _Start(
        first_step=group[0].get("step", 0),
        begin=begin,
        # A "quarantined" event belongs to the next start: it comes from restoring, before that start's "start" event.
        end=max(event["time"] for event in group if event["event"] != "quarantined"),
        seconds=seconds,
        reports=tuple((event["step"], event["seconds"].get("step", 0.0)) for event in reports),
    )
