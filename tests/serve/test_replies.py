"""Tokens as texts, each at its place, for tokenizers of several kinds."""

import random
from pathlib import Path

import pytest

from mamba_jax.data.tokenizer import ByteTokenizer, Tokenizer
from mamba_jax.generation.text_engine import Continuation, TextRequest
from mamba_jax.generation.text_stream import TextStream
from mamba_jax.serve.replies import TokenLog
from tests.data.small_tokenizers import saved


def opened(kind: str, folder: Path) -> Tokenizer:
    return ByteTokenizer() if kind == "byte" else saved(kind, folder)


@pytest.mark.parametrize("kind", ["byte", "byte_level", "llama", "word_piece", "word_level"])
def test_every_token_stands_at_its_place(kind: str, tmp_path: Path) -> None:
    tokenizer, draw = opened(kind, tmp_path), random.Random(0)
    ids = [*tokenizer.encode("the état 漢字 \U0001f600 of the union").tolist(), tokenizer.end_of_document]
    ids += [draw.randrange(tokenizer.vocab_size) for _ in range(30)]
    stream = TextStream(tokenizer, "the state", tokenizer.encode("the state").tolist())
    text = stream.add(ids) + stream.finish()
    log = TokenLog(tokenizer, Continuation(tokenizer, TextRequest(prompt="the state", num_tokens=1)))
    parts = [log.add([token], [-1.0]) for token in ids]
    tokens, places = ([value for part in parts for value in part[name]] for name in ("tokens", "text_offset"))
    assert places == sorted(places)
    for token, shown, place in zip(ids, tokens, places, strict=True):
        if token == tokenizer.end_of_document:
            assert shown == ""
        elif not shown.startswith("bytes:"):
            assert text.startswith(shown, place)


def test_bytes_that_are_no_character_are_written_as_such() -> None:
    tokenizer = ByteTokenizer()
    log = TokenLog(tokenizer, Continuation(tokenizer, TextRequest(prompt="a", num_tokens=1)))
    # A character of two bytes, the first byte of another, a letter, a byte of no character, and the end.
    found = log.add([0xC3, 0xA9, 0xC3, 0x62, 0xFF, 0x63, 256], [-1.0] * 7)
    assert found["tokens"] == [r"bytes:\xc3", r"bytes:\xa9", r"bytes:\xc3", "b", r"bytes:\xff", "c", ""]
    assert found["text_offset"] == [0, 0, 1, 2, 3, 4, 5]
    assert found["top_logprobs"] is None
