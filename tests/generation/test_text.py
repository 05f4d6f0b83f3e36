"""The text that is shown is the prompt and what the model added, whatever the tokenizer does to spaces."""

import inspect
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax.data.tokenizer import ByteTokenizer, Tokenizer
from mamba_jax.generation import text
from tests.data.small_tokenizers import LOSSLESS, LOSSY, opened, saved, small


def written(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer, prompt: str, added: list[int] | np.ndarray) -> str:
    """What is shown for a prompt if the model adds these ids."""

    def generate(*_, allowed: np.ndarray, **__) -> jax.Array:
        np.testing.assert_array_equal(allowed, tokenizer.known)
        return jnp.asarray([added], jnp.int32)

    monkeypatch.setattr(text, "generate", generate)
    # The model is not looked at before `generate`, which is not the real one.
    return inspect.unwrap(text.complete)(None, None, tokenizer, prompt, num_tokens=len(added), key=jax.random.key(0))


@pytest.mark.parametrize("kind", ["byte", *LOSSLESS, *LOSSY])
def test_the_space_behind_the_prompt_is_kept(monkeypatch, tmp_path: Path, kind: str) -> None:
    tokenizer = ByteTokenizer() if kind == "byte" else saved(kind, tmp_path)
    # Words of a text whose tokens do not span spaces, but for those of sentencepiece-like BPE.
    whole, prompt = "the state of the union", "the state"
    ids, head = tokenizer.encode(whole), tokenizer.encode(prompt)
    if kind == "llama":
        head = ids[:2]
        prompt = tokenizer.decode(head)
        monkeypatch.setattr(tokenizer, "encode", lambda _: head)
    np.testing.assert_array_equal(ids[: len(head)], head)
    assert written(monkeypatch, tokenizer, prompt, ids[len(head) :]) == whole


@pytest.mark.parametrize(
    ("kind", "prompt", "more", "expected"),
    [
        # The tokenizer drops the space or the line break; it must not come twice.
        ("word_piece", "the state ", "the state of", "the state of"),
        ("t5", "the state\n", "the state of", "the state\nof"),
        # What the prompt lost is shown as it was given.
        ("word_piece", "The STATE", "the state of", "The STATE of"),
        ("t5", "THE \uff33TATE", "the state of", "THE \uff33TATE of"),
        ("word_level", "the 漢", "the 漢 of", "the 漢 of"),
        # A word goes on without a space.
        ("word_piece", "the uni", "the uni##on", "the union"),
    ],
)
def test_prompts_that_the_tokenizer_changes(
    monkeypatch, tmp_path: Path, kind: str, prompt: str, more: str, expected: str
) -> None:
    tokenizer = saved(kind, tmp_path)
    added = tokenizer.encode(more)[len(tokenizer.encode(prompt)) :]
    if "##" in more:
        vocabulary = json.loads(tokenizer.to_json())["model"]["vocab"]
        added = [vocabulary["##o"], vocabulary["##n"]]
    assert written(monkeypatch, tokenizer, prompt, added) == expected


def test_bytes_that_end_no_character_leave_the_prompt_alone(monkeypatch, tmp_path: Path) -> None:
    tokenizer = saved("llama", tmp_path)
    vocabulary = json.loads(tokenizer.to_json())["model"]["vocab"]
    lead, word = vocabulary["<0xE6>"], vocabulary["▁the"]
    # Byte fallback decodes neighbouring bytes together: the last character of the prompt would be lost with them.
    for prompt in ("of é", "é", "of\n"):
        assert written(monkeypatch, tokenizer, prompt, [lead]) == f"{prompt}\ufffd"
        assert written(monkeypatch, tokenizer, prompt, [lead, word]) == f"{prompt}\ufffd the"
        assert written(monkeypatch, tokenizer, prompt, [word, lead]) == f"{prompt} the\ufffd"
    assert written(monkeypatch, ByteTokenizer(), "é", [0xE6, 0x61]) == "é\ufffda"


@pytest.mark.parametrize("kind", ["byte_level", "metaspace_always", "llama", "unigram", "word_piece"])
def test_a_document_from_its_start(monkeypatch, tmp_path: Path, kind: str) -> None:
    tokenizer = saved(kind, tmp_path)
    ids = tokenizer.encode("the state")
    assert written(monkeypatch, tokenizer, "", ids) == "the state"
    ended = [*ids, tokenizer.end_of_document, *ids]
    assert written(monkeypatch, tokenizer, "", ended) == "the state"
    assert written(monkeypatch, tokenizer, "of", [tokenizer.end_of_document]) == "of"


def test_ids_without_a_token_are_not_asked_for(monkeypatch, tmp_path: Path) -> None:
    parts = json.loads(small("word_level"))
    parts["model"]["vocab"] |= {"far": 20}
    tokenizer = opened(parts, tmp_path)
    assert not tokenizer.known[17]
    assert written(monkeypatch, tokenizer, "the", [20, 17, 20]) == "the far far"
