"""Finds out whether a tokenizer loses text, that is, gives different texts the same ids."""

import functools
import unicodedata
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jaxtyping import Int

from mamba_jax.errors import InputError


def find_loss(encode_batch: Callable[[Sequence[str]], list[Int[np.ndarray, " T"]]]) -> str | None:
    """Encodes many different short texts and looks for two with the same ids.

    This finds unknown characters, dropped bytes, lower-casing, stripped accents, collapsed spaces and compatibility
    forms, whatever part of the tokenizer causes them. Canonically equivalent texts (Unicode's NFC) count as the same.

    Args:
        encode_batch: gives the token ids of each of several texts.

    Returns:
        One sentence with an example; None if all ids differ.
    """
    seen: dict[bytes, str] = {}
    for text, ids in _with_ids(encode_batch):
        other = seen.setdefault(ids.tobytes(), text)
        if other != text:
            return (
                f"the tokenizer loses text ({other[1:-1]!r} and {text[1:-1]!r} within a word get the same ids): "
                "bits per byte count bytes that its ids do not hold"
            )
    return None


def _with_ids(
    encode_batch: Callable[[Sequence[str]], list[Int[np.ndarray, " T"]]],
) -> Iterable[tuple[str, Int[np.ndarray, " T"]]]:
    """Every text of `_probes` with its token ids, but for texts that the tokenizer refuses."""
    texts = _probes()
    try:
        yield from zip(texts, encode_batch(texts), strict=True)
        return
    except InputError:
        pass
    # Text that the tokenizer refuses with an error is not lost silently: only the other texts are compared.
    for text in texts:
        try:
            yield text, encode_batch([text])[0]
        except InputError:
            continue


@functools.cache
def _probes() -> tuple[str, ...]:
    """Texts "x" + middle + "x" whose middles hold every byte that UTF-8 uses and every common white space, or nothing.

    Ordinary characters come first, so that the pair that `find_loss` reports is an ordinary one if there is such a
    pair. The texts are in NFC because `find_loss` does not count canonically equivalent texts with the same ids as a
    loss.
    """
    ascii_visible = map(chr, range(0x21, 0x7F))
    spaces = (" ", "  ", "\n", "\n\n", "\t", "\r\n", "")
    two_bytes = map(chr, range(0xA0, 0x800))
    lead_bytes = map(chr, (0x800, *range(0x1000, 0x10000, 0x1000), 0x10000, *range(0x40000, 0x110000, 0x40000)))
    control = map(chr, (*range(0x20), *range(0x7F, 0xA0)))
    middles = (*ascii_visible, *spaces, *two_bytes, *lead_bytes, *control)
    return tuple(dict.fromkeys(unicodedata.normalize("NFC", f"x{middle}x") for middle in middles))
