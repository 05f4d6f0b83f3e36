"""Ends a text at strings that it must not contain, while it grows."""

import dataclasses
from collections.abc import Sequence

from mamba_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shown:
    """What may be shown after more text has come.

    Attributes:
        text: the new text that is no part of a stop string.
        stopped: whether a stop string is complete, so that nothing more is shown.
    """

    text: str
    stopped: bool


class StopStrings:
    """Passes a text on, piece by piece, up to the first stop string.

    The first is the one that is complete first; of several that end at the same character, the longest. Text is held
    back only while it may be the start of a stop string, so at most one character less than the longest of them. What
    is shown does not depend on how the text is cut into pieces.

    Args:
        strings: the stop strings; none pass all text on.

    Raises:
        InputError: a stop string of no characters.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        if "" in strings:
            raise InputError("a stop string has no characters, so that every text would end at once: leave it out")
        self._strings = tuple(strings)
        self._longest = max(map(len, self._strings), default=0)
        self._held = ""
        self._stopped = False

    def add(self, text: str) -> Shown:
        """Takes more text; after a stop, none of it is shown."""
        if self._stopped:
            return Shown(text="", stopped=True)
        text = self._held + text
        found = [(start + len(string), start) for string in self._strings if (start := text.find(string)) >= 0]
        if found:
            self._held, self._stopped = "", True
            return Shown(text=text[: min(found)[1]], stopped=True)
        kept = len(text) - self._may_begin(text)
        self._held = text[kept:]
        return Shown(text=text[:kept], stopped=False)

    def finish(self) -> str:
        """The text that was held back, when no more comes."""
        held, self._held = self._held, ""
        return held

    def _may_begin(self, text: str) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        lengths = range(min(len(text), self._longest - 1), 0, -1)
        ends = (length for length in lengths if any(string.startswith(text[-length:]) for string in self._strings))
        return next(ends, 0)
