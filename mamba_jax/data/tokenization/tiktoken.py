"""Reads a vocabulary of tiktoken, and says the same as a file of the `tokenizers` library."""

import base64
import binascii
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from mamba_jax.data.tokenization.description import bpe, description, split_at
from mamba_jax.data.tokenization.merges import merges_of
from mamba_jax.data.tokenization.token_bytes import byte_characters
from mamba_jax.errors import InputError, short

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_FILL_IN = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Encoding:
    """A published encoding: the pattern that cuts words, how many tokens its file has, and its special tokens."""

    pattern: str
    size: int
    special: Mapping[str, int]


# Source: tiktoken 0.14, `tiktoken_ext/openai_public.py`; patterns in the form without possessive quantifiers, which
# matches the same.
ENCODINGS = {
    "gpt2": _Encoding(pattern=_GPT2, size=50256, special={"<|endoftext|>": 50256}),
    "r50k_base": _Encoding(pattern=_GPT2, size=50256, special={"<|endoftext|>": 50256}),
    "p50k_base": _Encoding(pattern=_GPT2, size=50280, special={"<|endoftext|>": 50256}),
    "p50k_edit": _Encoding(
        pattern=_GPT2,
        size=50280,
        special={"<|endoftext|>": 50256} | {token: 50281 + place for place, token in enumerate(_FILL_IN)},
    ),
    "cl100k_base": _Encoding(
        pattern=_CL100K,
        size=100256,
        special={"<|endoftext|>": 100257, "<|endofprompt|>": 100276}
        | {token: 100258 + place for place, token in enumerate(_FILL_IN)},
    ),
    "o200k_base": _Encoding(pattern=_O200K, size=199998, special={"<|endoftext|>": 199999, "<|endofprompt|>": 200018}),
}


def tiktoken_description(data: bytes, path: str, *, encoding: str, end_of_document: str) -> dict[str, Any]:
    """The content of a `tokenizer.json` with the same ids as a vocabulary of tiktoken.

    Args:
        data: the bytes of the file: in each line a token in base64 and its number.
        path: the file, for messages.
        encoding: name of a published encoding, or the regular expression that cuts a text into words, in the syntax of
            Oniguruma.
        end_of_document: the special token behind the others where `encoding` is a regular expression.

    Raises:
        InputError: the file is none of these, lacks a byte, or is not that of the encoding.
    """
    ranks = _ranks(data, path)
    known = ENCODINGS.get(encoding)
    if known is None:
        if re.search(r"\{[0-9,]+\}\+", encoding):
            raise InputError(
                f"pattern {encoding!r} has a quantifier like {{1,3}}+, which repeats here: write it without +"
            )
        known = _Encoding(pattern=encoding, size=len(ranks), special={end_of_document: max(ranks.values()) + 1})
    if len(ranks) != known.size:
        raise InputError(
            f"{path!r} holds {len(ranks)} tokens and {encoding} has {known.size}: name the encoding of the file, "
            f"one of {', '.join(ENCODINGS)}, or give its pattern"
        )
    characters = {byte: character for character, byte in byte_characters().items()}

    def text(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    merges = merges_of(sorted(ranks, key=lambda token: ranks[token]), ranks)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    special = dict(sorted(known.special.items(), key=lambda item: item[1]))
    return description(
        special=special,
        normalizer=None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": [split_at(known.pattern), byte_level]},
        decoder=byte_level,
        model=bpe(
            {text(token): number for token, number in ranks.items()} | special,
            [(text(left), text(right)) for left, right in merges],
            unknown=None,
            byte_fallback=False,
            ignore_merges=True,
        ),
    )


def _ranks(data: bytes, path: str) -> dict[bytes, int]:
    """Number of each token of a file."""
    ranks: dict[bytes, int] = {}
    for place, line in enumerate(data.splitlines(), start=1):
        if not line:
            continue
        try:
            token, number = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(number)
        except (ValueError, binascii.Error):
            raise InputError(
                f"{path!r} is no vocabulary of tiktoken: line {place} is no token in base64 with its number but "
                f"{short(line.decode(errors='replace'))}"
            ) from None
    missing = next((byte for byte in range(256) if bytes([byte]) not in ranks), None)
    if missing is not None:
        raise InputError(f"{path!r} is no vocabulary of tiktoken: it has no token for the byte {missing}")
    if len(set(ranks.values())) < len(ranks) or min(ranks.values()) < 0:
        raise InputError(f"{path!r} is no vocabulary of tiktoken: two tokens have the same number, or one is negative")
    return ranks
