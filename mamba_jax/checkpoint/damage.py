"""Classifies errors of reading a checkpoint: it is damaged, was removed meanwhile, or cannot be read right now."""

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

# TensorStore's messages contain the number of the operating system's error if there was one; the other messages begin
# with a status such as "NOT_FOUND: ".
_SYSTEM_ERROR = re.compile(r"os_error_code='(\d+)'")
_STATUS = re.compile(r"([A-Z]+(?:_[A-Z]+)*): ")
_DAMAGE_STATUSES = ("NOT_FOUND", "DATA_LOSS", "FAILED_PRECONDITION", "OUT_OF_RANGE")
_DAMAGE_ERRNOS = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
# What readers of JSON and of array metadata raise when the text is not what they wrote.
_PARSE_ERRORS = (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError, AssertionError)


class DamagedCheckpoint(InputError):
    """A checkpoint whose files do not hold what was saved, or not all of it."""


class CheckpointGone(InputError):
    """A checkpoint that was removed while it was read, as a run removes its oldest ones."""


@contextlib.contextmanager
def judged(folder: Path, part: str = "") -> Iterator[None]:
    """Context manager: turns any error of reading a checkpoint into one of three errors with a message of one line.

    A checkpoint is called damaged only if the error is a known sign of damage (`is_damage`) and every file in the
    folder can be opened and read: errors of failing storage say nothing about the content.

    Args:
        folder: the checkpoint's folder, named by its step.
        part: what is being read, for the message.

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
        raise InputError(f"checkpoint {folder} cannot be read now ({reason}): fix this and start again") from error


def is_damage(error: BaseException) -> bool:
    """Whether an error of reading can only come from the content of the files; False for errors that are not known."""
    if isinstance(error, OSError):
        # Orbax raises some of these itself, without a number, where it finds no file.
        found = errno.ENOENT if error.errno is None and isinstance(error, FileNotFoundError) else error.errno
        return found in _DAMAGE_ERRNOS
    if codes := _SYSTEM_ERROR.findall(str(error)):
        return all(int(code) in _DAMAGE_ERRNOS for code in codes)
    status = _STATUS.match(str(error))
    return isinstance(error, _PARSE_ERRORS) and (status is None or status[1] in _DAMAGE_STATUSES)


def check_files(folder: Path) -> None:
    """Makes sure that the files of a checkpoint can be read, by reading the first byte of each.

    Pipes and devices are refused before they are opened, because reading them may block.

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
    """Reads a JSON object from a file.

    Raises:
        ValueError: the file holds anything else.
    """
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks, and without the middle if it is long."""
    text = " ".join(str(error).split())
    # Such messages begin with what was being done and end with the cause, such as a full disk; in between stand long
    # paths.
    return text if len(text) <= 400 else f"{text[:200]} ... {text[-195:]}"


def _odd(folder: Path, path: Path, what: str) -> DamagedCheckpoint:
    return DamagedCheckpoint(f"checkpoint {folder} is damaged ({path.relative_to(folder)} is {what})")


def _raise(error: OSError) -> None:
    raise error
