"""Tells a damaged checkpoint from one that cannot be read at the moment, and from one that was removed meanwhile."""

import contextlib
import errno
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mamba_jax.errors import InputError

# TensorStore writes the error of a system call into its message, and begins others with the kind of problem.
_SYSTEM_ERROR = re.compile(r"os_error_code='(\d+)'")
_STATUS = re.compile(r"([A-Z]+(?:_[A-Z]+)*): ")
_DAMAGE_STATUSES = ("NOT_FOUND", "DATA_LOSS", "FAILED_PRECONDITION", "OUT_OF_RANGE")
_DAMAGE_ERRNOS = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
# What readers of JSON and of array metadata raise when the text is not what they wrote.
_PARSE_ERRORS = (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError, AssertionError)


class DamagedCheckpoint(InputError):
    """A checkpoint whose files do not hold what was saved, or not all of it."""


class CheckpointGone(InputError):
    """A checkpoint that was removed while it was read, as a run does with its oldest."""


@contextlib.contextmanager
def judged(folder: Path, part: str = "") -> Iterator[None]:
    """Turns whatever goes wrong while a checkpoint is read into one line that says what that means.

    Only what is on the list of damage is called so, and only once every file in the folder could be opened and read:
    a store that is in trouble says nothing about what is in it.

    Args:
        folder: of the step.
        part: what is read, for the message.

    Raises:
        CheckpointGone: the folder is not there any more.
        DamagedCheckpoint: text that cannot be parsed, a missing file, data that cannot be decoded.
        InputError: it cannot be read now.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        # The outer exceptions of Orbax print its options; the innermost names the array and the file.
        root: BaseException = error
        while inner := root.__cause__:
            root = inner
        reason = f"{part and part + ': '}{type(root).__name__}: {one_line(root)}"
        try:
            folder.lstat()
            if is_damage(root):
                check_files(folder)
        except FileNotFoundError:
            raise CheckpointGone(f"checkpoint {folder} was removed while it was read") from error
        except OSError as trouble:
            root, reason = trouble, one_line(trouble)
        if is_damage(root):
            raise DamagedCheckpoint(f"checkpoint {folder} is damaged ({reason})") from error
        raise InputError(f"checkpoint {folder} cannot be read now ({reason}): see to that and start again") from error


def is_damage(error: BaseException) -> bool:
    """Whether an error in reading can only come from what the files hold; any that is not known is none."""
    if isinstance(error, OSError):
        # Orbax raises some of these itself, without a number, where it finds no file.
        found = errno.ENOENT if error.errno is None and isinstance(error, FileNotFoundError) else error.errno
        return found in _DAMAGE_ERRNOS
    if codes := _SYSTEM_ERROR.findall(str(error)):
        return all(int(code) in _DAMAGE_ERRNOS for code in codes)
    status = _STATUS.match(str(error))
    return isinstance(error, _PARSE_ERRORS) and (status is None or status[1] in _DAMAGE_STATUSES)


def check_files(folder: Path) -> None:
    """Makes sure that the files of a checkpoint can be read: the first byte of each, without waiting for any.

    Raises:
        DamagedCheckpoint: something is neither file nor folder, such as a pipe that would block, or a link to nothing.
        OSError: the store has a problem.
    """
    for parent, _, names in os.walk(folder, onerror=_raise):
        for path in (Path(parent, name) for name in names):
            try:
                mode = path.stat().st_mode
            except OSError as error:
                if path.is_symlink() and error.errno in (errno.ENOENT, errno.ELOOP):
                    raise _odd(folder, path, "a link to nothing") from None
                raise
            if not stat.S_ISREG(mode):
                raise _odd(folder, path, "neither a file nor a folder")
            with path.open("rb", buffering=0) as file:
                file.read(1)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object out of a file.

    Raises:
        ValueError: it holds anything else.
    """
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks, and without the middle if it is long."""
    text = " ".join(str(error).split())
    # What was done stands at the start, with long paths after it; why it failed, such as a full disk, at the end.
    return text if len(text) <= 400 else f"{text[:200]} ... {text[-195:]}"


def _odd(folder: Path, path: Path, what: str) -> DamagedCheckpoint:
    return DamagedCheckpoint(f"checkpoint {folder} is damaged ({path.relative_to(folder)} is {what})")


def _raise(error: OSError) -> None:
    raise error
