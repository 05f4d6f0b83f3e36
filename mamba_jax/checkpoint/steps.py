"""The folder of a run's checkpoints: lists its steps, removes old and unfinished ones, moves damaged ones aside."""

import contextlib
import errno
import os
import re
import shutil
import time
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils.epath.gpath import PosixGPath

from mamba_jax.checkpoint import record as records
from mamba_jax.checkpoint.damage import one_line
from mamba_jax.errors import InputError

FOLDER, _DAMAGED = "checkpoints", "damaged"
_LARGEST = 2**31
# Names of folders that an unfinished save has left, and of old checkpoints that are being removed.
_LEFTOVER = re.compile(r"\d+\.(orbax-checkpoint-tmp.*|removed)")
# Names of damaged checkpoints: in the folder `damaged` of the run, or, if `checkpoints` is a link to another disk,
# beside the good ones.
_DAMAGED_STEP = re.compile(r"\d+(-\d+)?")
_ASIDE = re.compile(r"\d+\.damaged(-\d+)?")
# Linux takes paths of 4096 bytes, and what Orbax adds below a run's folder is at most some 140 of them.
_LONGEST = 4096 - 256


class LiteralPath(PosixGPath):
    """A path that is not a pattern: Orbax finds some of its own files by globbing, where it joins path and pattern."""

    def glob(self, pattern: str) -> Any:
        """Yields the paths below this folder that match; characters such as * in the folder's own name are literal."""
        return (self._new(path) for path in Path(self).glob(pattern))


def check_path(run_dir: str | Path) -> None:
    """Makes sure that Orbax and TensorStore can store checkpoints below a path, which need not exist.

    Raises:
        InputError: the path has characters that these libraries interpret in another way, or is too long.
    """
    path = os.path.abspath(run_dir)
    kinds = {unicodedata.category(character) for character in path}
    problem = None
    # Lone surrogates (Cs) are how Python decodes bytes that are not UTF-8.
    if "Cs" in kinds:
        problem = "has bytes that are not UTF-8"
    elif kinds & {"Cc", "Zl", "Zp"} or "\\" in path:
        problem = "has a line break, another control character or a backslash in it"
    # Some libraries make an address of a leading /gs/, /s3/, ..., and of gs:// anywhere, of which abspath leaves gs:/.
    elif re.match("/(gs|s3|az|hf)/", f"{path}/") or "gs:/" in f"{path}/":
        problem = "would be taken for an address of object storage"
    elif len(path.encode()) > _LONGEST:
        problem = f"is longer than {_LONGEST} bytes"
    if problem:
        raise InputError(f"the run directory {os.fspath(run_dir)!a} {problem}: choose another name")


def newest_step(run_dir: str | Path) -> int | None:
    """Step of the newest complete checkpoint of a run, even if it is damaged; None if there is none.

    Raises:
        InputError: the folder cannot be read, or is a link to nothing.
    """
    return max(steps_in(Path(run_dir) / FOLDER), default=None)


def steps_in(folder: Path) -> list[int]:
    """Steps that have a checkpoint folder, ascending; entries whose name is not a step are passed over.

    Raises:
        InputError: the folder cannot be read, or is a link to nothing.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(int(entry.name) for entry in entries if _is_step(entry.name) and entry.is_dir())
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not folder.is_symlink():
            return []
        target = f", a link to {os.readlink(folder)}," if folder.is_symlink() else ""
        raise InputError(f"{folder}{target} cannot be read now ({error.strerror}): fix this and start again") from error


def quarantined(run_dir: str | Path) -> list[Path]:
    """Folders of damaged checkpoints that were moved aside in a run directory, sorted."""
    damaged, folder = Path(run_dir) / _DAMAGED, Path(run_dir) / FOLDER
    places = ((damaged, _DAMAGED_STEP), (folder, _ASIDE))
    return sorted(
        path for place, names in places if place.is_dir() for path in place.iterdir() if names.fullmatch(path.name)
    )


def quarantine(run_dir: Path, step: int) -> None:
    """Moves a damaged checkpoint to the folder `damaged` of the run.

    If `checkpoints` is on another disk, the checkpoint stays there and is renamed, so that it no longer counts.

    Raises:
        OSError: it can neither be moved nor renamed, and stays as it is.
    """
    source, target = run_dir / FOLDER / str(step), run_dir / _DAMAGED / str(step)
    target.parent.mkdir(exist_ok=True)
    try:
        source.rename(_free(target))
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        source.rename(_free(source.with_name(f"{step}.{_DAMAGED}")))


def remove_leftovers(folder: Path, *, patience: float) -> None:
    """Removes what unfinished saves have left; errors are ignored.

    Args:
        folder: the folder of checkpoints.
        patience: seconds during which removing is repeated. After a failed save, threads of Orbax may still be writing
            the other arrays.
    """
    end = time.monotonic() + patience
    with contextlib.suppress(OSError):
        while leftovers := [path for path in folder.iterdir() if _LEFTOVER.fullmatch(path.name)]:
            for leftover in leftovers:
                shutil.rmtree(leftover, ignore_errors=True)
            if time.monotonic() > end:
                return
            time.sleep(0.05)


def remove_oldest(folder: Path, *, keep: int, identity: Mapping[str, Any] | None) -> str | None:
    """Removes all but the newest checkpoints of a run; folders that are not known to be its own stay.

    A folder is renamed before it is deleted, so that no reader takes a half-deleted folder for a damaged checkpoint.

    Args:
        folder: the folder of checkpoints.
        keep: number of checkpoints to keep.
        identity: identity of the run; a checkpoint with another one is not removed. None removes any.

    Returns:
        Why a checkpoint could not be removed, in one line; None if all went well.
    """
    try:
        for path in (folder / str(step) for step in steps_in(folder)[:-keep]):
            if not path.is_symlink() and _is_own(path, identity):
                shutil.rmtree(path.rename(path.with_name(f"{path.name}.removed")))
    except (InputError, OSError) as error:
        return one_line(error)
    return None


def _is_own(path: Path, identity: Mapping[str, Any] | None) -> bool:
    try:
        stored = records.read(path)
    except InputError:
        return False
    return stored.step == int(path.name) and identity in (None, stored.identity)


def _is_step(name: str) -> bool:
    return re.fullmatch("0|[1-9][0-9]{0,9}", name) is not None and int(name) < _LARGEST


def _free(path: Path) -> Path:
    """The path if nothing exists there, else the first of `path-1`, `path-2`, ... that is free."""
    taken, candidate = 0, path
    while os.path.lexists(candidate):
        taken += 1
        candidate = path.with_name(f"{path.name}-{taken}")
    return candidate
