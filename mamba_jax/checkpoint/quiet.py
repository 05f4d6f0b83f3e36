"""Silences Orbax, so that the user sees a failure once, as our one-line message, and not as pages of tracebacks."""

import functools
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

_ORBAX = f"{os.sep}orbax{os.sep}"
# TensorStore runs outside Python, so that its errors carry no frames; these words are in its messages.
_TENSORSTORE = ("tensorstore_spec", "OCDBT", "os_error_code")


@functools.cache
def quiet() -> None:
    """Drops, from now on, the log records and tracebacks of Orbax and of the threads that it starts.

    Orbax logs every option that it derives. If one array fails, it also logs and raises an error in a thread for each
    of the other arrays, whose reads then find their event loop closed. The first error still reaches the caller.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_not_of_orbax)
    sys.unraisablehook = functools.partial(_pass_on, sys.unraisablehook)
    warnings.filterwarnings("ignore", "coroutine '.*' was never awaited", RuntimeWarning)


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    return _ORBAX not in record.pathname and not _comes_from_orbax(error)


def _pass_on(before: Callable[[Any], object], unraisable: Any) -> None:
    closed = unraisable.object is None and "Event loop is closed" in str(unraisable.exc_value)
    if not closed and not _comes_from_orbax(unraisable.exc_value):
        before(unraisable)


def _comes_from_orbax(error: BaseException | None) -> bool:
    if error is None:
        return False
    frames = traceback.walk_tb(error.__traceback__)
    return any(word in str(error) for word in _TENSORSTORE) or any(
        _ORBAX in frame.f_code.co_filename for frame, _ in frames
    )
