"""The unfinished folder of a writer of shards, and what stands in it, so that another one goes on after a kill."""

import contextlib
import dataclasses
import fcntl
import glob
import json
import os
import re
import shutil
import socket
import time
import uuid
from pathlib import Path
from typing import Any, Literal

import pydantic

from mamba_jax.data.shard_index import ShardEntry
from mamba_jax.files import replacement

PROGRESS_NAME, LOCK_NAME = "progress.json", "lock"
# An unfinished folder that nobody has touched for a day was left by a writer that was killed.
_STALE_SECONDS = 24 * 3600
# One that another machine began is taken over when nothing has been written to it for so long: a live writer adds to
# its open shard every few seconds, and shared storage may show that a minute late.
_ABANDONED_SECONDS = 600


@dataclasses.dataclass(frozen=True, kw_only=True)
class Totals:
    """What has been added to a stream.

    Attributes:
        parts: number of parts.
        documents: documents that have ended.
        num_bytes: UTF-8 length of the text.
        tokens: number of ids, end-of-document tokens included.
    """

    parts: int = 0
    documents: int = 0
    num_bytes: int = 0
    tokens: int = 0

    def plus(self, *, documents: int, num_bytes: int, tokens: int) -> "Totals":
        """The totals after one more part."""
        return Totals(
            parts=self.parts + 1,
            documents=self.documents + documents,
            num_bytes=self.num_bytes + num_bytes,
            tokens=self.tokens + tokens,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """The content of `progress.json`.

    Attributes:
        version: version of the format.
        shards: the finished files.
        before: totals before the part of the stream in which the last of them ends.
    """

    version: Literal[1] = 1
    shards: tuple[ShardEntry, ...] = ()
    before: Totals = Totals()


_PROGRESS_JSON = pydantic.TypeAdapter(Progress)


class Workplace:
    """A hidden folder beside the folder to be written, for one writer at a time.

    Its name holds a key of the stream, so that a later writer of the same stream finds it, and the name of the machine,
    because locks may not reach other machines. Where another writer is at work in it, or locks are not to be had, the
    name is a random one, and nobody will go on with that folder.

    Args:
        folder: the folder to be written; its parent exists.
        key: identifies the stream; None never goes on with anything.

    Attributes:
        path: the hidden folder.
        is_kept: whether a later writer can go on here.

    Raises:
        OSError: the folder cannot be created.
    """

    def __init__(self, folder: Path, key: str | None) -> None:
        self._lock: int | None = None
        _remove_stale(folder, key)
        if key is not None:
            host = re.sub("[^A-Za-z0-9-]", "_", socket.gethostname())[:40]
            self.path = folder.parent / f".{folder.name}.{key[:16]}.{host}.partial"
            _take_over(folder, key, self.path)
            self._lock = _locked(self.path)
        if self._lock is None:
            self.path = folder.parent / f".{folder.name}.{uuid.uuid4().hex}.partial"
            self.path.mkdir()
        self.is_kept = self._lock is not None

    def progress(self) -> Progress:
        """What an earlier writer has finished here; nothing if it has left nothing that can be read."""
        try:
            return _PROGRESS_JSON.validate_json((self.path / PROGRESS_NAME).read_bytes())
        except (OSError, pydantic.ValidationError):
            return Progress()

    def keep(self, progress: Progress) -> None:
        """Stores what is finished, if a later writer can go on here; the files are flushed to disk first.

        Raises:
            OSError: that cannot be written.
        """
        if not self.is_kept:
            return
        with (self.path / progress.shards[-1].file).open("rb") as file:
            os.fsync(file.fileno())
        with replacement(self.path / PROGRESS_NAME) as temporary:
            content: dict[str, Any] = _PROGRESS_JSON.dump_python(progress, mode="json")
            temporary.write_text(json.dumps(content))

    def rename(self, folder: Path) -> None:
        """Gives the complete folder its name; an OSError says that this is not possible."""
        os.rename(self.path, folder)
        for name in (PROGRESS_NAME, f".{PROGRESS_NAME}", LOCK_NAME):
            with contextlib.suppress(OSError):
                (folder / name).unlink(missing_ok=True)

    def leave(self, *, keep: bool) -> None:
        """Ends the work here, and removes the folder unless it is kept for a later writer."""
        if not (keep and self.is_kept):
            shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _locked(path: Path) -> int | None:
    """Creates a folder, if needed, and locks it; returns the descriptor, or None if that is not possible."""
    while True:
        path.mkdir(exist_ok=True)
        try:
            lock = os.open(path / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            # Whoever worked here has just given the folder its name.
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), os.stat(path / LOCK_NAME)):
                return lock
        except FileNotFoundError:
            pass
        except OSError:
            os.close(lock)
            return None
        os.close(lock)


def _take_over(folder: Path, key: str, own: Path) -> None:
    """Renames an unfinished folder of the same stream that another machine has given up, if there is none here."""
    if own.exists():
        return
    for other in folder.parent.glob(f".{glob.escape(folder.name)}.{key[:16]}.*.partial"):
        # Another machine may take it over, too.
        with contextlib.suppress(OSError):
            if _idle_seconds(other) > _ABANDONED_SECONDS:
                os.rename(other, own)
                return


def _idle_seconds(folder: Path) -> float:
    """Time since anything in an unfinished folder was written."""
    return time.time() - max(path.stat().st_mtime for path in [folder, *folder.iterdir()])


def _remove_stale(folder: Path, key: str | None) -> None:
    """Removes unfinished folders that nobody works in: without a change in the last day, and of another stream."""
    for partial in folder.parent.glob(f".{glob.escape(folder.name)}.*.partial"):
        if key is not None and partial.name.startswith(f".{folder.name}.{key[:16]}."):
            continue
        # Another process may be removing it, too.
        with contextlib.suppress(OSError):
            if _idle_seconds(partial) > _STALE_SECONDS:
                shutil.rmtree(partial, ignore_errors=True)
