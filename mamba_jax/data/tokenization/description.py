"""The content of a `tokenizer.json`, as the `tokenizers` library reads it."""

from collections.abc import Mapping, Sequence
from typing import Any

Part = dict[str, Any]


def description(
    *, special: Mapping[str, int], normalizer: Part | None, pre_tokenizer: Part | None, decoder: Part, model: Part
) -> Part:
    """The whole file.

    Args:
        special: number of each token that no text makes.
        normalizer: what changes a text first.
        pre_tokenizer: what then cuts it into words.
        decoder: what makes a text of tokens.
        model: what makes tokens of words.
    """
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": content, **flags} for content, number in special.items()],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def bpe(
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    *,
    unknown: str | None,
    byte_fallback: bool,
    ignore_merges: bool,
) -> Part:
    """A byte pair encoding.

    Args:
        vocab: number of each token.
        merges: pairs of tokens that make another one, those to try first in front.
        unknown: the token of text that no token makes, one for all of it in a row; None where there is no such text.
        byte_fallback: such text becomes tokens of its bytes.
        ignore_merges: a word that is a token is that token, whatever merges would make of it.
    """
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": unknown is not None,
        "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges,
        "vocab": dict(vocab),
        "merges": [list(pair) for pair in merges],
    }


def split_at(pattern: str) -> Part:
    """Sets what a regular expression matches apart from all around it."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
