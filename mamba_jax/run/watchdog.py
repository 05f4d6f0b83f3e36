"""Exits a process that makes no progress, so that a launcher can restart the job.

With several hosts, one that is alive but stuck makes all others wait in their next collective operation, forever and
without an error.
"""

import faulthandler
import os
import signal
import sys
import threading
import time
from types import TracebackType

# What a shell reports for a process that SIGALRM ended. The timer of the operating system ends it that way, and the
# thread uses the same code, so that a launcher sees one kind of exit; XPK restarts on 127 to 255.
EXIT_HUNG = 128 + signal.SIGALRM

# Seconds by which the timer of the operating system is later than the deadline: enough for the thread to write stacks.
_GRACE = 5.0
_STDERR = 2


class Watchdog:
    """Context manager that ends the process unless its deadline is moved again and again with `arm`.

    When the deadline passes, a thread writes the stacks of all threads to standard error and exits with `EXIT_HUNG`.
    The thread needs Python's interpreter lock. If a call into C never gives the lock back, a timer of the operating
    system does the same `_GRACE` seconds later. (A process with id 1, as in a container without an init, ignores the
    signal of that timer: then only the stacks are written.) The timer is `signal.ITIMER_REAL`, so other uses of SIGALRM
    are suspended while the block runs.
    """

    def __init__(self) -> None:
        """Sets no deadline; entering the block starts the thread, and `arm` the clock."""
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
        """What the process was doing when `arm` was last called."""
        return self._doing

    def arm(self, seconds: float, doing: str) -> None:
        """Moves the deadline; cheap enough to call at every step.

        Args:
            seconds: time from now until the deadline.
            doing: what must be finished by then, for the message.
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
    """Sets a final deadline for shutting down, which is never lifted; call it when the work is done.

    Args:
        seconds: time from now after which the operating system ends the process, as the timer of a `Watchdog` does.
    """
    faulthandler.register(signal.SIGALRM, file=_STDERR, all_threads=True, chain=True)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _exit_with_stacks(message: str) -> None:
    """Ends the process from any thread: sys.exit would end only the calling one, and cleanup waits for the rest."""
    # Writes to the descriptor, not to sys.stderr, because the stuck thread may hold the lock of sys.stderr.
    os.write(_STDERR, f"{message}; stacks of all threads follow\n".encode())
    faulthandler.dump_traceback(file=_STDERR, all_threads=True)
    os.write(_STDERR, f"{message}; exit {EXIT_HUNG}\n".encode())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_HUNG)
