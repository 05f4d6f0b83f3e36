"""Takes the files of a run back to the step of its checkpoint when it resumes, so that no step is recorded twice."""

import enum
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from mamba_jax.files import replacement
from mamba_jax.telemetry.records import append_whole

_DAMAGED = "damaged"


class Fate(enum.Enum):
    """What `rewind` does with a part of a file."""

    KEPT = enum.auto()
    DONE_AGAIN = enum.auto()
    DAMAGED = enum.auto()
    CUT_OFF = enum.auto()
    """The incomplete last line of a process that was killed: moved aside like damage, but without a warning."""


def rewind(path: Path, split: Callable[[bytes], Iterator[tuple[bytes, Fate]]]) -> None:
    """Removes the parts of a file that a resumed run writes again; the other parts stay byte for byte.

    Damaged parts are moved to the file of the same name in the folder `damaged` beside it. So are parts to be removed
    that stand before a part to be kept: files grow in the order of steps, so the step in such a part must be wrong. If
    something cannot be read or written, the file stays as it is, and a warning says so.

    Args:
        path: the file; it may be missing.
        split: cuts the content of the file into parts, in order, and says what to do with each.
    """
    try:
        if not path.is_file():
            return
        kept, again, damaged, has_damage = [], [], [], False
        for part, fate in split(path.read_bytes()):
            if fate is Fate.KEPT:
                kept.append(part)
                has_damage = has_damage or bool(again)
                damaged += again
                again = []
            elif fate is Fate.DONE_AGAIN:
                again.append(part)
            elif part.strip():
                damaged.append(part)
                has_damage = has_damage or fate is Fate.DAMAGED
        if not again and not damaged:
            return
        aside = path.parent / _DAMAGED / path.name
        if damaged:
            aside.parent.mkdir(exist_ok=True)
            append_whole(aside, damaged)
        with replacement(path) as temporary:
            temporary.write_bytes(b"".join(kept))
    except OSError as error:
        reason = error.strerror or error
        warnings.warn(f"cannot rewrite {path} ({reason}); it keeps records of steps done again", stacklevel=3)
        return
    if has_damage:
        warnings.warn(f"{path} was damaged; parts moved to {aside}: {len(damaged)}", stacklevel=3)
