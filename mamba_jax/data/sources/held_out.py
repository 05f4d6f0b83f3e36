"""Which part of the text is held out: whole files by a hash of their names, or the end of each file."""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from mamba_jax.data.sources.text_pieces import PIECE_BYTES
from mamba_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part[T]:
    """The files of one part.

    Attributes:
        files: whole files, or the pieces of files.
        is_cut: whether the end of each file is held out, and not whole files.
    """

    files: list[T]
    is_cut: bool


def take_part[T](
    files: Mapping[str, T],
    part: Literal["all", "train", "validation"],
    fraction: float,
    *,
    cut: Callable[[T], tuple[T | None, T | None]],
    place: str,
) -> Part[T]:
    """The training or validation part: whole files, or a piece of every file if all files fall in the same part.

    A hash of its name decides about a file, so that adding files moves no other file between the parts.

    Args:
        files: by their names below their folder.
        part: which one; "all" takes everything.
        fraction: the expected share of files that are held out, or share of each file, in [0, 1].
        cut: cuts a file in a piece for training and one that is held out; None stands for an empty piece.
        place: where the files are, for messages.

    Raises:
        InputError: the part is empty.
    """
    if part == "all":
        return Part(files=list(files.values()), is_cut=False)
    wanted = part == "validation"
    held_out = {name: is_held_out(name, fraction) for name in files}
    is_cut = 0 < fraction < 1 and len(set(held_out.values())) == 1
    if is_cut:
        pieces = [cut(file)[wanted] for file in files.values()]
        found = [piece for piece in pieces if piece is not None]
    else:
        found = [file for name, file in files.items() if held_out[name] == wanted]
    if not found:
        raise InputError(
            f"none of the {len(files)} files in {place} falls in the {part!r} part at validation_fraction={fraction}: "
            "change the fraction"
        )
    return Part(files=found, is_cut=is_cut)


def is_held_out(name: str, fraction: float) -> bool:
    """Whether a file is held out by the hash of its name."""
    # `fsencode` gives the bytes of the name on disk, which need not be UTF-8.
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8]) / 2**64 < fraction


def text_cut(read: Callable[[int, int], bytes], size: int, fraction: float) -> int:
    """Position in bytes where the held-out end of a text begins, near `(1 - fraction) * size`.

    The cut is behind the nearest line break, else the nearest space, else at the next character. Neither side gets less
    than half of its share. For a file that is too short to be cut, the position is its size.

    Args:
        read: gives up to so many bytes (second argument) from a position on (first).
        size: length of the text in bytes.
        fraction: share that is held out, in (0, 1).
    """
    end = round(size * fraction)
    target = size - end
    reach = min(end // 2, target // 2, PIECE_BYTES)
    near = read(target - reach, 2 * reach + 4)
    for separator in (b"\n", b" "):
        before, behind = near.rfind(separator, 0, reach), near.find(separator, reach, 2 * reach)
        cuts = [target - reach + found + 1 for found in (before, behind) if found >= 0]
        if cuts:
            return min(cuts, key=lambda cut: abs(cut - target))
    behind = near[reach:]
    return target + next((i for i, byte in enumerate(behind) if byte & 0xC0 != 0x80), len(behind))


def line_cut(lengths: Iterable[int], size: int, fraction: float, *, start: int = 0) -> int:
    """Position in bytes where the held-out lines begin: the first line from `(1 - fraction) * size` on, else the last.

    Args:
        lengths: length of each line in bytes, with its line break, from the one at `start` on.
        size: length of the file in bytes.
        fraction: share that is held out, in (0, 1).
        start: where a line begins, at most one line behind the position that is looked for.

    Returns:
        The position; for a file of a single line, its size.
    """
    target, last = size - round(size * fraction), 0
    for length in lengths:
        if start >= target:
            return start
        last, start = start, start + length
    return last or size
