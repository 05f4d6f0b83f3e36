"""Lets several processes reach the same decision about a checkpoint, so that none continues while another stops."""

import contextlib
import enum
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from mamba_jax.checkpoint.damage import CheckpointGone, DamagedCheckpoint
from mamba_jax.errors import InputError

_MESSAGE_BYTES = 1000


class Finding(enum.IntEnum):
    """What a process found when it read its part of a checkpoint; all processes act on the highest value.

    REFUSED (it cannot be read now, or belongs to something else) is above DAMAGED: while the storage fails, nothing is
    moved away as damaged.
    """

    FINE = 0
    DAMAGED = 1
    REFUSED = 2
    GONE = 3


class Outcome(enum.IntEnum):
    """How writing a checkpoint ended in a process; all processes report the highest value.

    If one process fails, Orbax makes the others wait for it until a deadline. FAILED is above WAITED_IN_VAIN so that
    the message names the cause and not the wait.
    """

    DONE = 0
    WAITED_IN_VAIN = 1
    FAILED = 2


_ERRORS: dict[int, type[InputError]] = {
    Finding.DAMAGED: DamagedCheckpoint,
    Finding.REFUSED: InputError,
    Finding.GONE: CheckpointGone,
}


@contextlib.contextmanager
def same_for_all() -> Iterator[None]:
    """Context manager: if the block raises an `InputError` in one process, all processes raise it at the end.

    The processes exchange their results when the block ends, so nothing inside may wait for another process.
    """
    own, finding = None, Finding.FINE
    try:
        yield
    except InputError as error:
        own = error
        finding = next((kind for kind, cls in _ERRORS.items() if type(error) is cls), Finding.REFUSED)
    highest, message = highest_of_all(finding, str(own or ""))
    if highest != Finding.FINE:
        raise _ERRORS[highest](message) from own


def highest_of_all(value: int, message: str) -> tuple[int, str]:
    """The highest `value` of all processes, and the `message` of the lowest-numbered process that has it."""
    if jax.process_count() == 1:
        return value, message
    own = bytes([value]) + message.encode(errors="replace")[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0")
    everyone = multihost_utils.process_allgather(np.frombuffer(own, np.uint8))
    highest = everyone[np.argmax(everyone[:, 0])].tobytes()
    return highest[0], highest[1:].rstrip(b"\0").decode(errors="ignore")


def from_first(value: int) -> int:
    """The value that the first process passes, in all processes: each may see another state of shared storage."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))
