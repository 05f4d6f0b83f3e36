"""Byte pair merges of vocabularies that store only their tokens and how soon each is made."""

from collections.abc import Iterable, Mapping


def merges_of[T: (str, bytes)](tokens: Iterable[T], known: Mapping[T, int]) -> list[tuple[T, T]]:
    """The pairs that make each token, in the order in which a BPE of the `tokenizers` library is to try them.

    SentencePiece and tiktoken join any two neighbours whose union is a token, the soonest first, whatever its parts.

    Args:
        tokens: the tokens that are made by merges, the soonest first.
        known: number of each token, of these and of those that nothing makes; parts with lower numbers come first.
    """
    merges = []
    for token in tokens:
        cuts = [(token[:place], token[place:]) for place in range(1, len(token))]
        pairs = [(left, right) for left, right in cuts if left in known and right in known]
        merges += sorted(pairs, key=lambda pair: (known[pair[0]], known[pair[1]]))
    return merges
