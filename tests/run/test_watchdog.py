"""A process that hangs ends itself with stacks in its log; one that gets on does not."""

import signal
import subprocess
import sys
import time

import pytest

from mamba_jax.run.watchdog import EXIT_HUNG, Watchdog

PROGRAM = """
import ctypes, time
from mamba_jax.run.watchdog import Watchdog

def stuck():
    {hang}

with Watchdog() as watchdog:
    watchdog.arm(60.0, "compiling")
    watchdog.arm(0.5, "step 7")
    stuck()
"""


@pytest.mark.parametrize(
    ("hang", "status", "message"),
    [
        ("time.sleep(60)", EXIT_HUNG, "watchdog: no progress for 0.5 s while step 7"),
        # A PyDLL call keeps the interpreter lock, so no Python thread runs: subprocess names the signal of the timer.
        ("ctypes.PyDLL(None).sleep(60)", -signal.SIGALRM, ""),
    ],
    ids=["interpreter free", "interpreter locked"],
)
def test_hanging_process_ends(hang: str, status: int, message: str) -> None:
    start = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(hang=hang)], capture_output=True, text=True, timeout=60, check=False
    )
    assert time.monotonic() - start < 0.5 + 10
    assert ended.returncode == status
    assert EXIT_HUNG == 128 + signal.SIGALRM == 142
    assert "in stuck" in ended.stderr
    assert message in ended.stderr


def test_output_so_far_is_kept() -> None:
    hang = "print('a line without a flush'); time.sleep(60)"
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(hang=hang)], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == EXIT_HUNG
    assert ended.stdout == "a line without a flush\n"


def test_end_of_the_process_has_a_deadline() -> None:
    program = """
import atexit, time
from mamba_jax.run.watchdog import Watchdog, end_within
atexit.register(time.sleep, 60)
with Watchdog() as watchdog:
    watchdog.arm(60.0, "step")
end_within(0.5)
"""
    start = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=False)
    assert time.monotonic() - start < 0.5 + 10
    assert ended.returncode == -signal.SIGALRM
    assert b"most recent call first" in ended.stderr


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Messages of watchdogs that would have ended this process."""
    messages: set[str] = set()
    monkeypatch.setattr("mamba_jax.run.watchdog._exit_with_stacks", messages.add)
    return messages


def test_progress_keeps_it_quiet(ends: set[str]) -> None:
    with Watchdog() as watchdog:
        for _ in range(10):
            watchdog.arm(0.4, "step")
            time.sleep(0.1)
        assert not ends
        watchdog.arm(60.0, "a long save")
        watchdog.arm(0.1, "a short step")
        time.sleep(0.5)
    assert ends == {"watchdog: no progress for 0.1 s while a short step"}


def test_timer_of_others_goes_on() -> None:
    before = signal.getsignal(signal.SIGALRM)
    other = signal.setitimer(signal.ITIMER_REAL, 500)
    try:
        with Watchdog() as watchdog:
            watchdog.arm(60.0, "step")
            assert 60 < signal.getitimer(signal.ITIMER_REAL)[0] < 70
        assert 490 < signal.getitimer(signal.ITIMER_REAL)[0] <= 500
        assert signal.getsignal(signal.SIGALRM) == before
    finally:
        signal.setitimer(signal.ITIMER_REAL, *other)
