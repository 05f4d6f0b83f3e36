"""Replaces files atomically: at any time a file has its old content or the new one."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacement(path: Path, *, mark: str = "") -> Iterator[Path]:
    """Context manager: yields a temporary path beside `path`, and renames it to `path` unless the block fails.

    The content is flushed to disk before it is renamed, so that even a power failure leaves the old file or the new.

    Args:
        path: the file to replace; if it is a link, the file that it leads to is replaced.
        mark: part of the temporary file's name, different for each of several simultaneous writers. A process that is
            killed leaves its temporary file.

    Raises:
        OSError: the file cannot be replaced; after this or any error in the block, `path` is as it was.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}{mark}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
