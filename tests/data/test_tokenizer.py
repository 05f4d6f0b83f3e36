"""Text survives the round trip, ids stay in range, and no text can forge a document's end."""

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from mamba_jax.config import TokenizerConfig
from mamba_jax.data.tokenizer import Tokenizer, make_tokenizer
from mamba_jax.errors import InputError

TEXTS = ["", "plain", "naïve Füße, 漢字, 🐍\r\n\t\0", "<|endoftext|> is only text", "a" * 5000]
END = "<|endoftext|>"


def train_bpe(path: Path, *, vocab_size: int = 300, **overrides: object) -> TokenizerConfig:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the theory of the thing and the other thing"] * 9, trainer)
    path.write_text(json.dumps({**json.loads(tokenizer.to_str()), **overrides}))
    return TokenizerConfig(kind="hf_json", path=str(path))


@pytest.fixture(params=["byte", "hf_json"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    config = TokenizerConfig() if request.param == "byte" else train_bpe(tmp_path / "bpe.json")
    return make_tokenizer(config)


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert tokenizer.end_of_document not in ids
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_json_has_the_same_ids_and_texts(tokenizer: Tokenizer) -> None:
    theirs = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    assert theirs.token_to_id(END) == tokenizer.end_of_document
    assert theirs.get_vocab_size() == tokenizer.vocab_size
    theirs.encode_special_tokens = True
    for text in [*TEXTS, *map(chr, range(512))]:
        assert theirs.encode(text).ids == tokenizer.encode(text).tolist()
    # Bytes that start, continue and break UTF-8 sequences.
    draws = np.random.default_rng(0).choice([0x41, 0x80, 0x9F, 0xBF, 0xC2, 0xE0, 0xED, 0xF0, 0xF4, 0xF5], (400, 6))
    for ids in draws:
        assert theirs.decode([*ids.tolist(), tokenizer.end_of_document]) == tokenizer.decode(ids)


def test_json_adds_no_markers(tmp_path: Path) -> None:
    marked = tokenizers.Tokenizer.from_file(train_bpe(tmp_path / "marked.json").path)
    marked.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    marked.save(str(tmp_path / "marked.json"))
    ours = make_tokenizer(TokenizerConfig(kind="hf_json", path=str(tmp_path / "marked.json")))
    assert marked.encode("a thing").ids[0] == ours.end_of_document
    assert tokenizers.Tokenizer.from_str(ours.to_json()).encode("a thing").ids == ours.encode("a thing").tolist()


def test_batch_equals_single(tokenizer: Tokenizer) -> None:
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_decode_leaves_document_ends_out_and_replaces_invalid_utf8(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("é!")
    document = [*ids.tolist(), tokenizer.end_of_document]
    assert tokenizer.decode(document + document) == "é!é!"
    assert tokenizer.decode(ids[1:]) == "\ufffd!"


@pytest.mark.parametrize("bad", [-1, 10_000])
def test_ids_outside_the_vocabulary_are_refused(tokenizer: Tokenizer, bad: int) -> None:
    with pytest.raises(InputError, match=f"token id {bad} is outside the vocabulary of {tokenizer.vocab_size}"):
        tokenizer.decode([65, bad])


def test_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="lone surrogate at character 2"):
        tokenizer.encode("ab\ud800")


@pytest.mark.parametrize("ids", [[65.0], [65.5], np.array([np.nan]), [True]])
def test_what_is_no_id_is_not_decoded(tokenizer: Tokenizer, ids: object) -> None:
    with pytest.raises(InputError, match="token ids must be whole numbers"):
        inspect.unwrap(Tokenizer.decode)(tokenizer, ids)
    assert tokenizer.decode([]) == ""


def test_prompts(tokenizer: Tokenizer) -> None:
    for prompt in TEXTS:
        tokenizer.check_prompt(prompt)
    with pytest.raises(InputError, match="lone surrogate at character 0"):
        tokenizer.check_prompt("\udcff")


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (models.WordLevel({"a": 0, "b": 1}, unk_token="?"), "text that the tokenizer cannot encode: .*; use one that"),
        (models.BPE({"a": 0, "b": 1}, []), "no id for anything in the prompt '漢': choose another prompt"),
    ],
)
def test_characters_outside_the_vocabulary(tmp_path: Path, model: models.Model, expected: str) -> None:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(tmp_path / "small.json"))
    with pytest.raises(InputError, match=expected) as raised:
        make_tokenizer(TokenizerConfig(kind="hf_json", path=str(tmp_path / "small.json"))).check_prompt("漢")
    assert "\n" not in str(raised.value)


def test_byte_vocabulary() -> None:
    tokenizer = make_tokenizer(TokenizerConfig())
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (257, 256)
    assert tokenizer.encode("é").tolist() == [0xC3, 0xA9]


def test_bpe_merges(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(train_bpe(tmp_path / "bpe.json"))
    assert len(tokenizer.encode("the thing")) < len("the thing")
    assert tokenizer.vocab_size > 257


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path: Path) -> None:
    plain = make_tokenizer(train_bpe(tmp_path / "plain.json"))
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": END,
    }
    cut = make_tokenizer(train_bpe(tmp_path / "cut.json", truncation=truncation, padding=padding))
    np.testing.assert_array_equal(cut.encode("xyz " * 20), plain.encode("xyz " * 20))


def test_fingerprint_tells_tokenizers_apart(tmp_path: Path) -> None:
    configs = [
        TokenizerConfig(),
        train_bpe(tmp_path / "small.json", vocab_size=260),
        train_bpe(tmp_path / "large.json"),
    ]
    fingerprints = [make_tokenizer(config).fingerprint for config in configs]
    assert len(set(fingerprints)) == 3
    assert fingerprints == [make_tokenizer(config).fingerprint for config in configs]


@pytest.mark.parametrize(
    ("content", "end", "expected"),
    [
        (None, END, "cannot read tokenizer .*No such file"),
        ("{}", END, "is not a tokenizer"),
        ("not json", END, "is not a tokenizer"),
        ("bpe", "a", "plain text can spell 'a'; choose an end_of_document that is marked"),
        ("bpe", "</doc>", "has no token '</doc>': set tokenizer.end_of_document"),
    ],
)
def test_bad_files_get_one_line(tmp_path: Path, content: str | None, end: str, expected: str) -> None:
    path = tmp_path / "tokenizer.json"
    if content == "bpe":
        train_bpe(path)
    elif content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=expected) as raised:
        make_tokenizer(TokenizerConfig(kind="hf_json", path=str(path), end_of_document=end))
    assert "\n" not in str(raised.value)
