"""The folder of a run's checkpoints: which steps are in it, what is removed from it and what is moved aside."""

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
# Left over by a save that did not finish, and on its way out.
_LEFTOVER = re.compile(r"\d+\.(orbax-checkpoint-tmp.*|removed)")
# Damaged, in a folder of their own or, where that is on another disk, beside the others.
_DAMAGED_STEP = re.compile(r"\d+(-\d+)?")
_ASIDE = re.compile(r"\d+\.damaged(-\d+)?")
# Linux takes paths of 4096 bytes, and what Orbax adds below a run's folder is at most some 140 of them.
_LONGEST = 4096 - 256


class LiteralPath(PosixGPath):
    """A path that is not a pattern: Orbax finds some of its own files by globbing, where it joins path and pattern."""

    def glob(self, pattern: str) -> Any:
        """Yields what matches the pattern below this folder, whatever characters the folder's own name has."""
        return (self._new(path) for path in Path(self).glob(pattern))


def check_path(run_dir: str | Path) -> None:
    """Makes sure that checkpoints can be kept below a path, which need not exist.

    Raises:
        InputError: it has characters that Orbax or TensorStore take for something else, or is too long.
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
    """Step of the newest complete checkpoint of a run, in whatever state; None if there is none.

    Raises:
        InputError: the folder cannot be read, or is a link to nothing.
    """
    return max(steps_in(Path(run_dir) / FOLDER), default=None)


def steps_in(folder: Path) -> list[int]:
    """Steps that have a folder, ascending; whatever has another name than a step gets is passed over.

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
        raise InputError(
            f"{folder}{target} cannot be read now ({error.strerror}): see to that and start again"
        ) from error


def quarantined(run_dir: str | Path) -> list[Path]:
    """Damaged checkpoints of a run that were moved aside."""
    damaged, folder = Path(run_dir) / _DAMAGED, Path(run_dir) / FOLDER
    places = ((damaged, _DAMAGED_STEP), (folder, _ASIDE))
    return sorted(
        path for place, names in places if place.is_dir() for path in place.iterdir() if names.fullmatch(path.name)
    )


def quarantine(run_dir: Path, step: int) -> None:
    """Moves a checkpoint to the folder `damaged`, or lets it lose its name where that is on another disk.

    Raises:
        OSError: it stays where it is.
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
    """Removes what saves that did not finish have left, as far as the store lets it.

    Args:
        folder: of the checkpoints.
        patience: seconds to go on for. Where one array could not be written, threads of Orbax may still be writing
            others.
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
    """Removes all but the newest checkpoints of a run; what is not surely its own stays.

    A folder loses its name first, so that no one who reads it takes half of it for a damaged checkpoint.

    Returns:
        Why the store did not let it remove one; None if nothing was left to remove.
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
    """The path, or one with a number behind its name if there is something already."""
    taken, candidate = 0, path
    while os.path.lexists(candidate):
        taken += 1
        candidate = path.with_name(f"{path.name}-{taken}")
    return candidate
