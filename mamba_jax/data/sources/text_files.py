"""Finds all files below a folder that match a glob, or says in one line which of them cannot be read."""

import fnmatch
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from mamba_jax.errors import InputError


def find_files(root: Path, pattern: str) -> list[str]:
    """Names of the matching files, relative to `root` and sorted.

    Patterns are those of `Path.glob`: `*` matches anything within a name, `**` any number of folders, and hidden names
    are not special. In contrast to `Path.glob`, links to folders are followed, and a match that cannot be read is an
    error. Each folder is searched once, by its real name if that lies below `root`, so loops of links end and no text
    is found twice.

    Args:
        root: an existing folder.
        pattern: relative glob.

    Raises:
        InputError: the pattern is not a relative glob; a folder cannot be read; a link on the way leads nowhere; what
            matches is a pipe, a socket or a device.
    """
    parts = _parts(pattern)
    files: set[str] = set()
    searched: set[tuple[int, int, int]] = set()
    folders, links = [(root, 0)], []
    while folders or links:
        folder, position = folders.pop() if folders else links.pop(0)
        found = _stat(folder)
        state = (found.st_dev, found.st_ino, position)
        if state in searched:
            continue
        searched.add(state)
        if parts[position] == "**" and position + 1 < len(parts):
            folders.append((folder, position + 1))
        for entry in _entries(folder):
            into = position if parts[position] == "**" else position + 1
            if parts[position] != "**" and not fnmatch.fnmatchcase(entry.name, parts[position]):
                continue
            if _is_folder(entry):
                if into < len(parts):
                    (links if entry.is_symlink() else folders).append((Path(entry.path), into))
            elif into == len(parts):
                _require_file(entry)
                files.add(Path(entry.path).relative_to(root).as_posix())
    return sorted(files)


def _parts(pattern: str) -> list[str]:
    parts = list(PurePosixPath(pattern).parts)
    if not parts or parts[0].startswith("/") or ".." in parts or any("**" in part and part != "**" for part in parts):
        raise InputError(
            f"text folder pattern {pattern!r} is not a relative glob: name files below the folder, such as **/*.txt"
        )
    # Several ** in a row mean the same as one, but would multiply the number of ways to match.
    return [part for i, part in enumerate(parts) if part != "**" or i == 0 or parts[i - 1] != "**"]


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"cannot read folder {folder}: {error.strerror}") from None


def _stat(path: Path | os.DirEntry[str]) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        name = os.fspath(path)
        what = f"{name} is a link that leads nowhere" if os.path.islink(path) else f"cannot read {name}"
        raise InputError(f"{what}: {error.strerror}; mend it, or exclude it by the pattern") from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    if entry.is_symlink():
        # Raises for a link to nothing: it may have been a whole folder of text.
        _stat(entry)
    return entry.is_dir()


def _require_file(entry: os.DirEntry[str]) -> None:
    if not entry.is_file():
        raise InputError(f"{entry.path} is a pipe, a socket or a device: remove it, or exclude it by the pattern")
    if not os.access(entry.path, os.R_OK):
        raise InputError(f"cannot read {entry.path}: Permission denied; mend it, or exclude it by the pattern")
