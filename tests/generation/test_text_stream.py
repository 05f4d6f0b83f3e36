"""Text that grows token by token is that of all tokens at once, and shown as early as it is certain."""

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

from mamba_jax.data.tokenizer import ByteTokenizer, Tokenizer
from mamba_jax.errors import InputError
from mamba_jax.generation.text_stream import TextStream
from tests.data.small_tokenizers import LOSSLESS, LOSSY, opened, saved, small

KINDS = ("byte", *LOSSLESS, *LOSSY)
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PROMPTS = ("", "the state", "the state ", "of é", "the union\n", "The STATE, 42")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {kind: ByteTokenizer() if kind == "byte" else saved(kind, folder) for kind in KINDS}


def streamed(tokenizer: Tokenizer, prompt: str, ids: list[int], draw: random.Random) -> list[str]:
    """The pieces of text when the ids are dealt out in groups of 0 to 4."""
    stream = TextStream(tokenizer, prompt, tokenizer.encode(prompt).tolist())
    pieces, start = [], 0
    while start < len(ids):
        end = start + draw.randrange(5)
        pieces.append(stream.add(ids[start:end]))
        start = end
    return [*pieces, stream.finish()]


def whole_bytes(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """The ids without byte tokens of byte fallback, of which the library replaces whole runs if one is wrong."""
    vocabulary = json.loads(tokenizer.to_json())["model"]["vocab"]
    single = {vocabulary[f"<0x{byte:02X}>"] for byte in range(256)}
    return [token for token in ids if token not in single]


@pytest.mark.parametrize("kind", KINDS)
def test_any_tokens_give_the_text_that_they_give_at_once(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer, draw = tokenizers[kind], random.Random(0)
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt).tolist()
        before = tokenizer.decode(ids)
        for _ in range(12):
            added = [draw.randrange(tokenizer.vocab_size) for _ in range(draw.randrange(30))]
            added += tokenizer.encode("the état 漢字 \U0001f600 of").tolist() * draw.randrange(2)
            if kind == "llama":
                added = whole_bytes(tokenizer, added)
            draw.shuffle(added)
            text = tokenizer.decode([*ids, *added])
            assert text.startswith(before)
            expected = text[len(before) :]
            # Tokenizers of words lost the space at the end of the prompt.
            if prompt.endswith((" ", "\n")) and tokenizer.encode(prompt.rstrip()).tolist() == ids:
                expected = expected.removeprefix(" ")
            assert "".join(streamed(tokenizer, prompt, added, draw)) == expected


@pytest.mark.parametrize("kind", ["byte", *LOSSLESS])
def test_whole_characters_come_with_their_last_byte(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode("the é 漢字\U0001f600 of\n42").tolist()
    text = tokenizer.decode(ids)
    stream = TextStream(tokenizer, "", [tokenizer.end_of_document])
    shown, ends = "", set()
    for end, token in enumerate(ids, start=1):
        shown += stream.add([token])
        begun = tokenizer.decode(ids[:end])
        assert text.startswith(shown)
        if text.startswith(begun):
            assert shown == begun
            ends.add(begun)
    assert shown == text
    assert stream.finish() == ""
    assert {text[: text.index(character) + 1] for character in "é漢字\U0001f600"} <= ends


def test_wrong_bytes_leave_whole_characters_of_their_run_alone(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["llama"]
    vocabulary = json.loads(tokenizer.to_json())["model"]["vocab"]

    def ids(data: bytes) -> list[int]:
        return [vocabulary[f"<0x{byte:02X}>"] for byte in data]

    stream = TextStream(tokenizer, "of é", tokenizer.encode("of é").tolist())
    added = [*ids("漢é".encode()), *ids(b"\xe6A\xff"), vocabulary["▁the"], *ids(b" \xe6\xbc")]
    shown = [stream.add([token]) for token in added]
    assert shown == ["", "", "漢", "", "é", "", "\ufffdA", "\ufffd", " the", " ", "", ""]
    assert stream.finish() == "\ufffd"
    # The space in front of a document is the tokenizer's own, as a byte, too.
    assert TextStream(tokenizer, "", []).add(ids(b" ")) == tokenizer.decode(ids(b" ")) == ""


def test_the_space_that_a_prompt_has_does_not_come_twice(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["word_piece"]
    stream = TextStream(tokenizer, "the state ", tokenizer.encode("the state ").tolist())
    more = tokenizer.encode("of the").tolist()
    assert [stream.add([]), *(stream.add([token]) for token in more)] == ["", "of", " the"]


@pytest.mark.parametrize(
    "decoder",
    [
        {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True},
        {
            "type": "Sequence",
            "decoders": [BYTE_LEVEL, {"type": "Strip", "content": " ", "start": 0, "stop": 1}],
        },
        {
            "type": "Sequence",
            "decoders": [{"type": "Fuse"}, {"type": "Replace", "pattern": {"String": "st"}, "content": ""}],
        },
    ],
    ids=["ctc", "strip", "replace"],
)
def test_text_that_may_change_far_back_comes_at_the_end(tmp_path: Path, decoder: dict[str, Any]) -> None:
    tokenizer = opened({**json.loads(small("byte_level")), "decoder": decoder}, tmp_path)
    assert tokenizer.token_bytes is None
    ids = tokenizer.encode("the state is strong ").tolist()
    for prompt, at in (("", 0), ("the", len(tokenizer.encode("the")))):
        *pieces, last = streamed(tokenizer, prompt, ids[at:], random.Random(1))
        assert set(pieces) == {""}
        assert tokenizer.decode(ids) == (tokenizer.decode(ids[:at]) if at else "") + last


def test_a_token_costs_the_same_however_long_the_text(tokenizers: dict[str, Tokenizer]) -> None:
    for kind in ("byte", "llama", "metaspace_always"):
        tokenizer = tokenizers[kind]
        # A lead byte over and over: text that is never whole.
        token = 0xE6 if kind == "byte" else json.loads(tokenizer.to_json())["model"]["vocab"]
        token = token if isinstance(token, int) else token.get("<0xE6>", token["▁the"])
        stream = TextStream(tokenizer, "", [])
        times = []
        for _ in range(8):
            start = time.process_time()
            for _ in range(200):
                stream.add([token])
            times.append(time.process_time() - start)
        # Decoding everything again would take 15 times as long at the end as at the beginning.
        assert min(times[4:]) < 4 * min(times[:4]), times


def test_ids_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(InputError, match="token id 257 is outside the vocabulary"):
        TextStream(ByteTokenizer(), "", []).add([65, 257])
