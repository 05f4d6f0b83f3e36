"""Where the time of a run goes: accounting within a process, and over all processes that worked on the run."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

OTHER = "other"


class Goodput:
    """Gives every second since its construction to exactly one bucket."""

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter) -> None:
        """Starts the accounting.

        Args:
            clock: seconds, never going back.
        """
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._open = [OTHER]
        self._since = clock()

    @contextlib.contextmanager
    def measure(self, bucket: str) -> Iterator[None]:
        """Counts the time of the block for `bucket`; a block inside it pauses it. Not for several threads."""
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
        seconds: by bucket; they add up to `wall_seconds`. "step" holds steps that count, "lost" those that a later
            start did again, "down" the time from the last sign of a start to the next start, "other" what no block
            of the program measured.
        wall_seconds: from the first start to the last sign of the last one.
        goodput: `seconds["step"] / wall_seconds`, 0 to 1; None if no time has passed.
        starts: processes that worked on the run.
    """

    seconds: dict[str, float]
    wall_seconds: float
    goodput: float | None
    starts: int


def summarize(events: Sequence[Mapping[str, Any]]) -> GoodputSummary:
    """Adds up the "start" and "goodput" events of a run.

    A start that was killed is known up to its last event only; what came after it counts as "down". The steps of a
    start are taken as equally long between two of its "goodput" events.

    Args:
        events: as `read_events` gives them; those before the first "start" are passed over.
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
    """One process: when it was there, by the clock of the log, and what it last said of its time."""

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
    reports = [event for event in group if event["event"] == "goodput"]
    seconds = reports[-1]["seconds"] if reports else {}
    begin = group[0]["time"]
    if reports:
        # The accounting starts before the first event can be written; the report says by how much.
        begin = min(begin, reports[-1]["time"] - sum(seconds.values()))
    return _Start(
        first_step=group[0].get("step", 0),
        begin=begin,
        # A damaged checkpoint is found while the next start restores, before that start announces itself.
        end=max(event["time"] for event in group if event["event"] != "quarantined"),
        seconds=seconds,
        reports=tuple((event["step"], event["seconds"].get("step", 0.0)) for event in reports),
    )
