"""Signals that ask a single process to stop; tests/multiprocess has the same for several."""

import signal
import threading
from collections.abc import Iterator

import pytest

from mamba_jax.run.stop_requests import EXIT_PREEMPTED, StopRequests

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def hangup_is_noticed() -> Iterator[None]:
    """Also where the tests themselves were started under `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", NUMBERS)
def test_signal_is_a_request(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in NUMBERS]
    with StopRequests() as stop:
        assert not stop.requested()
        assert stop.signal is None
        signal.raise_signal(number)
        assert stop.requested()
        assert stop.requested()
        assert stop.signal == number
    assert [signal.getsignal(each) for each in NUMBERS] == before


def test_second_interrupt_does_not_wait() -> None:
    with StopRequests() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_repeated_sigterm_does_not_break_off_the_save() -> None:
    with StopRequests() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested()
        assert stop.signal == signal.SIGTERM


def test_first_signal_names_the_cause() -> None:
    with StopRequests() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal == signal.SIGINT


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequests() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_thread_leaves_signals_alone() -> None:
    before = [signal.getsignal(each) for each in NUMBERS]
    seen: list[object] = []

    def work() -> None:
        with StopRequests() as stop:
            seen.append([signal.getsignal(each) for each in NUMBERS])
            seen.append(stop.requested())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before, False]


def test_exit_status_is_that_of_sigterm() -> None:
    assert EXIT_PREEMPTED == 128 + signal.SIGTERM == 143
