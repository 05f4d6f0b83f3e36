"""Writing a file so that it has its old content or the new one, and never a part."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacement(path: Path, *, mark: str = "") -> Iterator[Path]:
    """Gives a path to write to, beside `path`, which takes its place when the block ends without an error.

    By then the disk has the content, so that a loss of power leaves the old file or the new one too.

    Args:
        path: of the file; of a link, the file that it leads to is replaced.
        mark: tells apart writers of the same file; whoever is killed leaves what they have written under this name.

    Raises:
        OSError: it cannot take the place; `path` is as it was, as after any error in the block.
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
