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
    """Context manager that turns SIGTERM, Ctrl-C and SIGHUP into a request to save and stop.

    A single process uses signal handlers. Several processes must all stop at the same step, so there JAX's preemption
    service receives SIGTERM, tells the other processes, and agrees with them on the first call of `requested` that none
    has made yet; Ctrl-C and SIGHUP are passed on to the service as SIGTERM. A second Ctrl-C interrupts at once. A
    second SIGTERM changes nothing, because schedulers send it more than once. Under `nohup` SIGHUP stays ignored.
    Outside the main thread Python cannot set handlers: a single process then notices no signal.
    """

    def __init__(self) -> None:
        """Sets no handler yet; call it after `jax.distributed` has been initialised."""
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
        """Number of the signal that caused the request, SIGTERM if another process got it; None without a request."""
        return self._received or (signal.SIGTERM if self._is_agreed else None)

    def requested(self) -> bool:
        """Whether to save and stop; once True, it stays True.

        Every process must call this equally often and between the same pieces of work, because the n-th calls of all
        processes return the same value. It may become True a few calls after the signal arrived.
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
