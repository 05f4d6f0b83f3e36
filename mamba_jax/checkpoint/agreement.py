"""What several processes decide together about one checkpoint."""

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
    """What a process found when it read its part; the highest of all processes counts.

    A process that cannot read outweighs one that found damage: nothing is moved while the store is in trouble.
    """

    FINE = 0
    DAMAGED = 1
    REFUSED = 2
    GONE = 3


class Outcome(enum.IntEnum):
    """How writing ended in a process; the highest of all processes counts.

    After a failure Orbax waits for the other processes; that it did so in vain says less than the failure.
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
    """Raises in every process what one of them raised; nothing inside may wait for another process."""
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
    """Value and message of the process whose value is highest, the lowest such process."""
    if jax.process_count() == 1:
        return value, message
    own = bytes([value]) + message.encode(errors="replace")[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0")
    everyone = multihost_utils.process_allgather(np.frombuffer(own, np.uint8))
    highest = everyone[np.argmax(everyone[:, 0])].tobytes()
    return highest[0], highest[1:].rstrip(b"\0").decode(errors="ignore")


def from_first(value: int) -> int:
    """The value of the first process: listings of shared storage may be of different age."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))
