"""The owner of a run: one job at a time trains in a folder.

The owner holds a POSIX record lock on `owner.lock`; NFS clients pass such locks on to their server. The system releases
the lock when the process ends, in whatever way. A process also loses the lock when it closes any descriptor of the
file, so nothing else may open `owner.lock`; who the owner is stands in a second file, `owner.json`. On a file system
without locks the owner rewrites `owner.json` every `_BEAT_SECONDS` instead, and an owner that has not done so for
`_STALE_SECONDS` counts as gone.
"""

import contextlib
import errno
import fcntl
import itertools
import json
import os
import socket
import threading
import time
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from mamba_jax.errors import InputError, reason
from mamba_jax.files import replacement
from mamba_jax.run.distributed import from_first

LOCK, OWNER = "owner.lock", "owner.json"

_POLL_SECONDS = 1.0
_BEAT_SECONDS = 5.0
# Twelve beats: shared storage that stalls for some seconds, or caches a file for as long, takes the folder from nobody.
_STALE_SECONDS = 60.0
_HELD = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)

# Files (device, inode) that this process has locked. A second lock of the same process would succeed, and closing its
# descriptor would release the first, so a second claim inside one process is refused by this set.
_own_locks: set[tuple[int, int] | None] = set()
_changing = threading.Lock()


@contextlib.contextmanager
def owned(run_dir: Path, *, wait: bool) -> Iterator[None]:
    """Makes this job the owner of a run directory while the block runs; the first process holds it for all processes.

    The folder is created if it is missing, and removed again if the block leaves it empty.

    Args:
        run_dir: the run directory.
        wait: if another job is the owner, wait until it is done instead of raising.

    Raises:
        InputError: another job is the owner and `wait` is False; or the folder cannot be created or written to.
    """
    claim = _Claim(run_dir)
    is_first = jax.process_index() == 0
    try:
        has_told = False
        while holder := from_first(claim.acquire):
            if not wait:
                raise InputError(
                    f"train.run_dir {run_dir} is being trained by {holder}: wait for it with --wait, end it, or choose "
                    "another folder"
                )
            if is_first and not has_told:
                has_told = True
                # Nobody may be there to read it, or nothing that can show it.
                with contextlib.suppress(OSError, ValueError):
                    print(f"waiting for {holder}, which trains in {run_dir}", flush=True)
            time.sleep(_POLL_SECONDS)
        yield
    finally:
        claim.release()


class _Claim:
    """The attempt of one process to own a folder: created folders, the lock, or the heartbeat that replaces it."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._created: list[Path] = []
        self._lock: int | None = None
        self._key: tuple[int, int] | None = None
        self._heartbeat: _Heartbeat | None = None

    def acquire(self) -> str:
        """Tries to become the owner; returns a description of the present owner, or an empty text on success.

        Raises:
            InputError: the folder cannot be created or written to.
        """
        try:
            while True:
                self._create_folder()
                holder = self._take()
                # If the last owner removed the file between opening and locking, the lock is on a file without a name
                # and keeps nobody away: try again.
                if holder or self._heartbeat is not None or self._key == _key(self._run_dir / LOCK):
                    return holder
                self._drop()
        except (OSError, ValueError) as error:
            raise InputError(
                f"cannot write train.run_dir {self._run_dir} ({reason(error)}): make room there or choose another "
                "folder"
            ) from None

    def release(self) -> None:
        """Ends the ownership, and removes lock files and folders that were created and are still empty."""
        with contextlib.suppress(OSError):
            if self._heartbeat is not None:
                self._heartbeat.stop()
            if self._lock is not None:
                (self._run_dir / OWNER).unlink(missing_ok=True)
                if {path.name for path in self._run_dir.iterdir()} == {LOCK}:
                    (self._run_dir / LOCK).unlink()
            for folder in reversed(self._created):
                folder.rmdir()
        self._drop()

    def _create_folder(self) -> None:
        missing = [self._run_dir, *self._run_dir.parents]
        for folder in reversed([path for path in missing if not path.exists()]):
            folder.mkdir(exist_ok=True)
            self._created.append(folder)

    def _take(self) -> str:
        """Tries once to lock the folder, or to own it by a heartbeat where locks do not work; returns as `acquire`."""
        path = self._run_dir / LOCK
        with _changing:
            if _key(path) in _own_locks:
                return "this very process"
            self._lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(self._lock)
                self._lock = None
                if error.errno in _HELD:
                    return _holder(self._run_dir / OWNER)
                if error.errno not in _NO_LOCKS:
                    raise
                path.unlink(missing_ok=True)
                self._heartbeat = self._heartbeat or _Heartbeat(self._run_dir / OWNER, reason(error))
                return self._heartbeat.start()
            status = os.fstat(self._lock)
            self._key = (status.st_dev, status.st_ino)
            _own_locks.add(self._key)
        _write(self._run_dir / OWNER, _self())
        return ""

    def _drop(self) -> None:
        if self._lock is not None:
            with _changing:
                os.close(self._lock)
                _own_locks.discard(self._key)
            self._lock = self._key = None


class _Heartbeat:
    """Ownership without locks: a file that the owner rewrites every few seconds from a thread."""

    def __init__(self, path: Path, why: str) -> None:
        self._path = path
        self._owner: dict[str, object] = {"mark": uuid.uuid4().hex}
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="owner", daemon=True)
        warnings.warn(
            f"{path.parent} is on a file system without locks ({why}); {path.name} says who trains there, and a run "
            f"that was killed keeps its folder for {_STALE_SECONDS:g} s",
            stacklevel=2,
        )

    def start(self) -> str:
        """Watches the present owner; takes over if it shows no sign of life. Returns the owner, or an empty text."""
        found, deadline = _read(self._path), time.monotonic() + _STALE_SECONDS
        while found and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            if (now := _read(self._path)) and now != found:
                return _holder(self._path)
            found = now
        self._owner |= _self()
        _write(self._path, self._owner)
        # Of several that take over at the same time the last one stays.
        time.sleep(2 * _POLL_SECONDS)
        if not self._is_mine():
            return _holder(self._path)
        self._thread.start()
        return ""

    def stop(self) -> None:
        self._is_over.set()
        if self._thread.is_alive():
            self._thread.join()
            if self._is_mine():
                self._path.unlink()

    def _beat(self) -> None:
        for beats in itertools.count(1):
            # If another job has taken this one for gone and replaced the file, the folder belongs to that job.
            if self._is_over.wait(_BEAT_SECONDS) or not self._is_mine(unreadable=True):
                return
            with contextlib.suppress(OSError):
                _write(self._path, self._owner | {"beats": beats})

    def _is_mine(self, *, unreadable: bool = False) -> bool:
        owner = _read(self._path)
        return owner.get("mark") == self._owner["mark"] if owner else unreadable


def _key(path: Path) -> tuple[int, int] | None:
    """Device and inode, which identify a file whatever its name; None if there is no such file."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _self() -> dict[str, object]:
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    return {"host": socket.gethostname(), "process": os.getpid(), "since": since}


def _write(path: Path, owner: dict[str, object]) -> None:
    with replacement(path) as temporary:
        temporary.write_text(json.dumps(owner) + "\n")


def _read(path: Path) -> dict[str, Any]:
    """The content of `owner.json`; empty if the file is missing or cannot be read."""
    try:
        owner = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _holder(path: Path) -> str:
    owner = _read(path)
    return f"process {owner.get('process', '?')} on {owner.get('host', '?')} since {owner.get('since', '?')}"
