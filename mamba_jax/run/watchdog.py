"""Exits a process that makes no progress, so that a launcher can restart the job.

A host that is alive but stuck stops all others in their next collective operation, for ever and without an error.
"""

import faulthandler
import os
import signal
import sys
import threading
import time
from types import TracebackType

# That of a process which SIGALRM ends, as both ways out below are meant to look the same to a launcher; XPK restarts
# on 127 to 255.
EXIT_HUNG = 128 + signal.SIGALRM

# Seconds between the deadline and the timer of the operating system.
_GRACE = 5.0
_STDERR = 2


class Watchdog:
    """A deadline that has to be moved on again and again.

    When it passes, a thread writes the stacks of all threads to standard error and exits with `EXIT_HUNG`. It needs the
    interpreter lock for that. If a call into C never gives the lock back, a timer of the operating system does the same
    `_GRACE` seconds later, except that a process with id 1, as in a container without an init, is only told its stacks.
    The timer is `signal.ITIMER_REAL`: whatever else uses SIGALRM rests while the block runs.
    """

    def __init__(self) -> None:
        """Starts nothing yet."""
        self._changed = threading.Condition()
        self._deadline: float | None = None
        self._seconds = 0.0
        self._doing = ""
        self._is_closed = False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._other_timer = signal.getitimer(signal.ITIMER_REAL)
        faulthandler.register(signal.SIGALRM, file=_STDERR, all_threads=True, chain=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.unregister(signal.SIGALRM)
        signal.setitimer(signal.ITIMER_REAL, *self._other_timer)

    @property
    def doing(self) -> str:
        """What was to be over by the last deadline."""
        return self._doing

    def arm(self, seconds: float, doing: str) -> None:
        """Moves the deadline; costs some microseconds.

        Args:
            seconds: from now.
            doing: what must be over by then, for the message.
        """
        with self._changed:
            self._deadline = time.monotonic() + seconds
            self._seconds, self._doing = seconds, doing
            self._changed.notify()
        signal.setitimer(signal.ITIMER_REAL, seconds + _GRACE)

    def _watch(self) -> None:
        with self._changed:
            while not self._is_closed:
                left = None if self._deadline is None else self._deadline - time.monotonic()
                if left is not None and left <= 0:
                    _exit_with_stacks(f"watchdog: no progress for {self._seconds:g} s while {self._doing}")
                self._changed.wait(left)


def end_within(seconds: float) -> None:
    """Gives the rest of the process a deadline, which nothing takes away: call it when only its end is left.

    Args:
        seconds: from now; when they have passed, the operating system ends the process as a `Watchdog` would.
    """
    faulthandler.register(signal.SIGALRM, file=_STDERR, all_threads=True, chain=True)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _exit_with_stacks(message: str) -> None:
    """Ends the process from any thread: sys.exit would only end this one, and cleaning up would wait for the others."""
    # Past sys.stderr, whose lock the stuck thread may hold.
    os.write(_STDERR, f"{message}; stacks of all threads follow\n".encode())
    faulthandler.dump_traceback(file=_STDERR, all_threads=True)
    os.write(_STDERR, f"{message}; exit {EXIT_HUNG}\n".encode())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_HUNG)
