"""Reads files of unknown origin in bounded time and memory, and writes folders that appear only when complete."""

import contextlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from mamba_jax.errors import InputError, reason

# The largest index of a published model takes a few MiB; parsed JSON takes up to fifty times its text.
_JSON_BYTES = 16 * 2**20
# What tells readers that a folder is complete.
_LAST = ("config.json", "stablehlo.json")
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


def require_file(path: Path) -> None:
    """Makes sure that `path` is a file or a link to one; opening anything else may wait for ever.

    Raises:
        InputError: it is missing, a link to nothing, or something else.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            raise InputError(f"{path} is a link to {os.readlink(path)}, which does not exist") from None
        raise InputError(f"no file {path}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path} ({reason(error)})") from None
    if not stat.S_ISREG(mode):
        raise InputError(f"{path} is {_KINDS.get(stat.S_IFMT(mode), 'a device')}, expected a file")


def read_file(path: Path, *, limit: int | None = None) -> bytes:
    """The content of a file.

    Args:
        path: the file.
        limit: largest size in bytes that is accepted; None accepts any.

    Raises:
        InputError: it is not a file, cannot be read or is larger.
    """
    require_file(path)
    try:
        size = path.stat().st_size
        if limit is not None and size > limit:
            raise InputError(f"{path} has {size} bytes, expected at most {limit}")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path} ({reason(error)})") from None


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object of at most 16 MiB.

    Raises:
        InputError: the file is missing or holds something else.
    """
    text = read_file(path, limit=_JSON_BYTES)
    try:
        content = json.loads(text)
    except RecursionError:
        raise InputError(f"{path} is not JSON that can be read: it is nested too deeply") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content


def require_new_folder(path: str | Path) -> None:
    """Raises an InputError if something is there already that writing the folder would destroy."""
    path = Path(path)
    try:
        path.lstat()
        if not path.exists():
            raise InputError(f"{path} is a link to {os.readlink(path)}, which does not exist: choose another folder")
        if not path.is_dir() or any(path.iterdir()):
            raise InputError(f"{path} exists and is not an empty folder: choose another or remove it")
    except InputError:
        raise
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write {path} ({reason(error)}): choose another folder") from None


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Context manager that yields a folder to write to; its files appear in `path` if the block ends without an error.

    If `path` does not exist, the folder is renamed to it. If `path` is an empty folder, it may be a mount point, the
    working directory or a link, which cannot be replaced by renaming. Then the files are moved into it, configs
    last, so that no reader takes an incomplete folder for a model.

    Args:
        path: the folder; it must not exist, or be empty.

    Raises:
        InputError: there is something at `path`, or it cannot be written; nothing is left behind.
    """
    require_new_folder(path)
    is_there = path.is_dir()
    staging = (path if is_there else path.parent) / f".export-{uuid.uuid4().hex}"
    try:
        staging.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        yield staging
        if is_there:
            _move_files(staging, path)
        else:
            require_new_folder(path)
            staging.rename(path)
    except OSError as error:
        raise InputError(f"cannot write {path} ({reason(error)}): make room there or choose another folder") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes arrays as a safetensors file that whoever may read other new files may read too.

    Raises:
        OSError: it cannot be written.
    """
    contiguous = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    try:
        safetensors.numpy.save_file(contiguous, path, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        raise OSError(str(error)) from error
    # The library keeps others from reading what it writes.
    path.chmod(mode)


def _move_files(source: Path, target: Path) -> None:
    """Moves all files into the folder `target`, configs last; after a failure none of them is left there."""
    moved: list[Path] = []
    try:
        for file in sorted(source.iterdir(), key=lambda file: file.name in _LAST):
            moved.append(target / file.name)
            file.rename(moved[-1])
    except BaseException:
        for file in moved:
            file.unlink(missing_ok=True)
        raise
