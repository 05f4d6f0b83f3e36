"""What a reader of records leaves out, and what it says of it: records without text, and copies of documents."""

import hashlib
from collections.abc import Iterable
from typing import Literal

from mamba_jax.errors import InputError

Deduplicate = Literal["none", "exact"]
# 16 bytes: among as many documents as there are, two with the same digest would take about 2**64 trials.
_DIGEST_BYTES = 16


class LeftOut:
    """Counts what is left out in one pass over the documents.

    Args:
        skip_bad: whether records without text are counted, or the first one ends the pass.
        deduplicate: "exact" finds documents that are equal to an earlier one.

    Attributes:
        finds_copies: whether `is_copy` is to be asked.
    """

    def __init__(self, *, skip_bad: bool, deduplicate: Deduplicate) -> None:
        self.finds_copies = deduplicate == "exact"
        self._skip_bad = skip_bad
        self.reset()

    def reset(self) -> None:
        """Begins a new pass."""
        self._copies = self._bad = 0
        self._first_bad = ""
        self._seen: set[bytes] = set()

    def take_bad(self, message: str) -> None:
        """Counts a record without text.

        Args:
            message: its place and what is wrong with it.

        Raises:
            InputError: such records are not to be passed over.
        """
        if not self._skip_bad:
            raise InputError(f"{message}; mend it, or pass such records over and have them counted by --skip-bad")
        self._bad += 1
        self._first_bad = self._first_bad or message

    def is_copy(self, blocks: Iterable[bytes]) -> bool:
        """Whether a document with these bytes has been seen; counts it if so."""
        digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        for block in blocks:
            digest.update(block)
        known = len(self._seen)
        self._seen.add(digest.digest())
        is_known = len(self._seen) == known
        self._copies += is_known
        return is_known

    def __str__(self) -> str:
        parts = []
        if self._bad:
            parts.append(f"{self._bad:,} bad records were passed over, the first: {self._first_bad}")
        if self._copies:
            parts.append(f"{self._copies:,} documents that are copies of another were left out")
        return "; ".join(parts)
