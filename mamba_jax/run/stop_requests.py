"""Requests to save and stop: SIGTERM from a scheduler, Ctrl-C from a person, SIGHUP from a terminal that is gone."""

import os
import signal
import threading
from types import TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

# What a shell reports for a process that SIGTERM ended. XPK restarts on 127 to 255.
EXIT_PREEMPTED = 128 + signal.SIGTERM


class StopRequests:
    """Notices SIGTERM, Ctrl-C and SIGHUP while the block runs, in all processes at the same point.

    One process: signal handlers. Several: JAX's preemption service takes SIGTERM, tells the other processes, and
    agrees with them on the first call of `requested` that none has made yet; the others are handed to it as SIGTERM. A
    second Ctrl-C interrupts at once; a second SIGTERM changes nothing, because schedulers send it more than once.
    Outside the main thread of a single process no signal is noticed, and SIGHUP not under `nohup`.
    """

    def __init__(self) -> None:
        """Looks at the number of processes; `jax.distributed` must have been initialised."""
        self._is_one_of_several = jax.process_count() > 1
        self._received: int | None = None
        self._is_agreed = False
        self._calls = 0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequests":
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT] if self._is_one_of_several else [signal.SIGINT, signal.SIGTERM]
            if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
                numbers.append(signal.SIGHUP)
            self._previous = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # None stands for a handler that was not set from Python and that Python cannot set again.
            signal.signal(number, handler or signal.SIG_DFL)

    @property
    def signal(self) -> int | None:
        """Number of the signal behind the request: SIGTERM if another process got it; None if there is none."""
        return self._received or (signal.SIGTERM if self._is_agreed else None)

    def requested(self) -> bool:
        """Whether to save and stop; once True it stays so.

        Every process must call this equally often, between the same pieces of work: the n-th calls of all processes
        return the same. The request may come out a few calls after the signal.
        """
        if not self._is_one_of_several:
            return self._received is not None
        if not self._is_agreed:
            self._calls += 1
            self._is_agreed = multihost_utils.reached_preemption_sync_point(self._calls)
        return self._is_agreed

    def _receive(self, number: int, frame: object) -> None:
        del frame
        self._received = self._received or number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._is_one_of_several and number != signal.SIGTERM:
            os.kill(os.getpid(), signal.SIGTERM)
