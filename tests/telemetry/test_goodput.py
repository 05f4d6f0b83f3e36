"""Every second of a run is in one bucket, whatever ended its processes."""

from typing import Any

import pytest

from mamba_jax.telemetry.goodput import Goodput, summarize


class Clock:
    """Time that passes when it is told to; halves are exact, so sums are compared exactly."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_seconds_add_up() -> None:
    clock = Clock()
    goodput = Goodput(clock=clock)
    clock.now += 1.0
    with goodput.measure("step"):
        clock.now += 2.0
        with goodput.measure("checkpoint"):
            clock.now += 4.0
        clock.now += 8.0
        assert goodput.seconds == {"other": 1.0, "step": 10.0, "checkpoint": 4.0}
    clock.now += 16.0
    with goodput.measure("step"):
        clock.now += 32.0
    assert goodput.seconds == {"other": 17.0, "step": 42.0, "checkpoint": 4.0}
    assert sum(goodput.seconds.values()) == clock.now - 100.0


def test_a_block_that_raises_ends_its_bucket() -> None:
    clock = Clock()
    goodput = Goodput(clock=clock)

    def fail() -> None:
        with goodput.measure("evaluation"):
            clock.now += 2.0
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    clock.now += 1.0
    assert goodput.seconds == {"other": 1.0, "evaluation": 2.0}


def _start(time: float, step: int) -> dict[str, Any]:
    return {"time": time, "event": "start", "step": step}


def _goodput(time: float, at: int, **seconds: float) -> dict[str, Any]:
    return {"time": time, "event": "goodput", "step": at, "seconds": seconds}


def test_clean_run() -> None:
    """The process was there 5 s before it wrote its first event: 0 to 100 s."""
    summary = summarize(
        [
            _start(5.0, 0),
            {"time": 15.0, "event": "compiled", "seconds": 10.0},
            _goodput(50.0, 40, init=5.0, compile=10.0, step=33.0, other=2.0),
            _goodput(100.0, 80, init=5.0, compile=10.0, step=80.0, other=5.0),
            {"time": 100.0, "event": "finished", "step": 80},
        ]
    )
    assert summary.seconds == {"init": 5.0, "compile": 10.0, "step": 80.0, "other": 5.0}
    assert (summary.wall_seconds, summary.goodput, summary.starts) == (100.0, 0.8, 1)


def test_killed_and_resumed() -> None:
    """Killed after 100 s at step 90, restarted 20 s later from step 60.

    Steps took 80 s, 40 of them up to step 50 and 40 for the 40 after it: 10 steps of these count, 30 are done again.
    """
    summary = summarize(
        [
            _start(0.0, 0),
            _goodput(50.0, 50, init=10.0, step=40.0),
            _goodput(90.0, 90, init=10.0, step=80.0),
            {"time": 100.0, "event": "checkpoint", "step": 90},
            _start(125.0, 60),
            _goodput(200.0, 120, init=10.0, step=70.0),
        ]
    )
    assert summary.seconds == {"init": 20.0, "step": 50.0 + 70.0, "lost": 30.0, "other": 10.0, "down": 20.0}
    assert summary.wall_seconds == 200.0
    assert summary.goodput == pytest.approx(120 / 200)
    assert summary.starts == 2


def test_preempted_and_resumed() -> None:
    """It saved before it went, so nothing is done again."""
    summary = summarize(
        [
            _start(0.0, 0),
            _goodput(50.0, 40, step=50.0),
            {"time": 50.0, "event": "preempted", "step": 40},
            _start(80.0, 40),
            _goodput(130.0, 80, step=50.0),
            {"time": 130.0, "event": "finished", "step": 80},
        ]
    )
    assert summary.seconds == {"step": 100.0, "down": 30.0}
    assert summary.goodput == pytest.approx(100 / 130)


def test_a_later_start_can_go_back_further() -> None:
    """The third start finds the newest checkpoints damaged: steps 40 to 60 of the first and all of the second go."""
    summary = summarize(
        [
            _start(0.0, 0),
            _goodput(60.0, 60, step=60.0),
            _start(60.0, 60),
            _goodput(80.0, 80, step=20.0),
            {"time": 85.0, "event": "quarantined", "step": 80},
            {"time": 90.0, "event": "quarantined", "step": 60},
            _start(90.0, 40),
            _goodput(130.0, 80, init=10.0, step=40.0),
        ]
    )
    assert summary.seconds == {"step": 80.0, "lost": 40.0, "init": 10.0}
    assert summary.wall_seconds == 130.0


def test_killed_before_it_said_anything() -> None:
    summary = summarize([_start(0.0, 0), _start(30.0, 0), _goodput(60.0, 30, step=30.0)])
    assert summary.seconds == {"down": 30.0, "step": 30.0}
    assert summary.goodput == 0.5


def test_no_start() -> None:
    summary = summarize([{"time": 1.0, "event": "finished", "step": 3}])
    assert (summary.seconds, summary.goodput, summary.starts) == ({}, None, 0)
