"""Text survives the round trip, ids stay in range, and no text can forge a document's end."""

import errno
import inspect
import json
import os
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from mamba_jax.config import TokenizerConfig
from mamba_jax.data import prepare
from mamba_jax.data.tokenization import file as tokenizer_file
from mamba_jax.data.tokenizer import JsonTokenizer, Tokenizer, make_tokenizer
from mamba_jax.errors import InputError
from tests.data.small_tokenizers import END, LOSSLESS, LOSSY, opened, saved, small

TEXTS = ["", "plain", "naïve Füße, 漢字, 🐍\r\n\t\0", "<|endoftext|> is only text", "a" * 5000]


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
    marked = tokenizers.Tokenizer.from_file(str(train_bpe(tmp_path / "marked.json").path))
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
        ("bpe", "\udcff", r"has no token '\\udcff'"),
        ("", END, "is not a tokenizer"),
        ("[1]", END, "it holds no JSON object"),
        ('{"version": "1.0"}', END, "it holds no model"),
        ('{"model":' * 100_000, END, "is not a tokenizer.*recursion"),
    ],
    ids=range(10),
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


def test_what_is_no_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_file, "_MAX_BYTES", 2000)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nothing")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(2001)
    for path, message in [
        (tmp_path, "is not a regular file"),
        (tmp_path / "pipe", "is not a regular file"),
        (Path("/dev/zero"), "is not a regular file"),
        (tmp_path / "dangling", os.strerror(errno.ENOENT)),
        (tmp_path / "tokenizer\udcff.json", r"tokenizer\\udcff.json'.*No such file"),
        (tmp_path / "nul\0", "embedded null byte"),
        (tmp_path / "huge", "larger than 2,000 bytes"),
    ]:
        with pytest.raises(InputError, match=message) as raised:
            JsonTokenizer(str(path), end_of_document=END)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "part", "change", "message"),
    [
        ("byte_level", "model", {"dropout": 0.1}, "dropout 0.1, so that one text gets other ids each time: set"),
        ("byte_level", "model", {"merges": [["t", "zz"]]}, "is not a tokenizer.*`zz` out of vocabulary"),
        # The library panics on this one, and ends the process on the next.
        ("byte_level", "model", {"continuing_subword_prefix": "#" * 9}, "is not a tokenizer.*out of range"),
        ("unigram", "normalizer", {"type": "Precompiled", "precompiled_charsmap": "/////w=="}, "charsmap is cut short"),
        ("word_level", "model", {"vocab": {END: 0, "<unk>": 2**32 - 1}}, "'<unk>' the id 4294967295; ids end at"),
        ("word_level", "model", {"vocab": {END: 0, "<unk>": 7, "a": 7}}, "the same id 7: renumber"),
        # Text that has no id would end a document.
        (
            "unigram",
            "model",
            {"unk_id": 3},
            r"plain text can spell '<\|endoftext\|>'; choose .*: '</s>', '<s>', '<unk>'",
        ),
        ("word_level", "model", {"unk_token": END}, "plain text can spell"),
        ("unigram", "added_tokens", [], "plain text can spell .* which has none yet: add one"),
    ],
    ids=range(9),
)
def test_bad_parts_of_a_file_get_one_line(tmp_path: Path, kind: str, part: str, change, message: str) -> None:
    parts = json.loads(small(kind))
    parts[part] = {**(parts[part] or {}), **change} if isinstance(change, dict) else change
    with pytest.raises(InputError, match=message) as raised:
        opened(parts, tmp_path)
    assert "\n" not in str(raised.value)


def test_what_makes_the_library_panic_gets_one_line(tmp_path: Path) -> None:
    # The pattern tries every way to cut a run of letters.
    endless = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    tokenizer = opened({**json.loads(small("byte_level")), "pre_tokenizer": endless}, tmp_path)
    with pytest.raises(
        InputError, match=r"text that the tokenizer cannot encode: .*retry-limit.*use one that"
    ) as raised:
        tokenizer.encode("a" * 60 + "!")
    assert "\n" not in str(raised.value)


def test_gaps_in_the_numbering_are_known_and_have_no_text(tmp_path: Path) -> None:
    parts = json.loads(small("word_level"))
    parts["model"]["vocab"] |= {"far": 20}
    tokenizer = opened(parts, tmp_path)
    assert tokenizer.vocab_size == 21
    assert np.flatnonzero(~tokenizer.known).tolist() == [16, 17, 18, 19]
    assert tokenizer.decode([20, 17, 20]) == "far far"


@pytest.mark.parametrize("kind", [*LOSSLESS, *LOSSY])
def test_no_text_spells_a_special_token(tmp_path: Path, kind: str) -> None:
    """Unigram models and models of words know the special tokens as words."""
    tokenizer = saved(kind, tmp_path)
    special = [
        token["id"]
        for token in json.loads(tokenizer.to_json())["added_tokens"]
        if "unk" not in token["content"].lower()
    ]
    assert len(special) == 3
    for text in (END, f"the 漢 </s> of {END}{END}", "<s></s>"):
        ids = tokenizer.encode(text)
        assert not np.isin(ids, special).any()
        if kind == "llama":
            assert tokenizer.decode(ids) == text


def test_a_special_token_of_one_character_is_refused_in_text(tmp_path: Path) -> None:
    parts = json.loads(small("unigram").replace("</s>", r"\u001e"))
    with pytest.raises(InputError, match=r"spells the special token '\\x1e' by the one character '\\x1e': remove it"):
        opened(parts, tmp_path).encode("the \x1e")


@pytest.mark.parametrize(
    "lines",
    [["the state\n", "of the union\n", "and\n"], ["the", " state", " of\n", "union"], ["the\n", "the </s>\n", "the"]],
)
@pytest.mark.parametrize("kind", ["byte", *LOSSLESS, *LOSSY])
def test_pieces_of_a_document_have_its_ids(tmp_path: Path, kind: str, lines: list[str]) -> None:
    tokenizer = make_tokenizer(TokenizerConfig()) if kind == "byte" else saved(kind, tmp_path)
    ids = tokenizer.encode_batch(lines, continues=[False, *[True] * (len(lines) - 1)])
    assert np.concatenate(ids).tolist() == tokenizer.encode("".join(lines)).tolist()
    if lines[1].startswith("of"):
        adds_a_space = kind in ("byte_level_prefix", "metaspace_always", "metaspace_first", "llama", "unigram")
        assert (tokenizer.encode(lines[1]).tolist() != ids[1].tolist()) == adds_a_space


def test_only_tokenizers_whose_ids_hold_the_text_are_not_lossy(tmp_path: Path) -> None:
    assert make_tokenizer(TokenizerConfig()).lossy is None
    for kind in LOSSLESS:
        assert saved(kind, tmp_path).lossy is None
    for kind in LOSSY:
        assert "get the same ids): bits per byte count bytes" in str(saved(kind, tmp_path).lossy)


@pytest.mark.parametrize(
    ("part", "change", "example"),
    [
        ("normalizer", {"type": "Lowercase"}, "'A' and 'a'"),
        ("normalizer", {"type": "NFKC"}, r"' ' and '\xa0'"),
        ("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "StripAccents"}]}, "'A' and 'À'"),
        ("normalizer", {"type": "Replace", "pattern": {"Regex": " +"}, "content": " "}, "' ' and '  '"),
        (
            "pre_tokenizer",
            {"type": "Split", "pattern": {"String": "\n"}, "behavior": "Removed", "invert": False},
            "'\\n'",
        ),
        # Composed and decomposed characters are one text: the published GPT-NeoX tokenizer composes them.
        ("normalizer", {"type": "NFC"}, None),
        ("normalizer", {"type": "NFD"}, None),
        # Text that is refused is not lost.
        ("model", {"type": "Unigram", "unk_id": None, "vocab": [["x", -1.0], ["y", -1.0]]}, None),
    ],
)
def test_losses_are_found_with_an_example(tmp_path: Path, part: str, change, example: str | None) -> None:
    parts = json.loads(small("byte_level"))
    parts |= {"normalizer": None, part: change}
    if part == "pre_tokenizer":
        parts[part] = {"type": "Sequence", "pretokenizers": [change, json.loads(small("byte_level"))[part]]}
    lossy = opened(parts, tmp_path).lossy
    assert lossy is None if example is None else example in str(lossy)


def test_preparing_shards_warns_of_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("The state of the union\n")
    for kind in ("word_piece", "byte_level"):
        saved(kind, tmp_path)
        flags = ["--text", str(tmp_path / "text"), "--output", str(tmp_path / kind)]
        monkeypatch.setattr("sys.argv", ["prepare", *flags, "--tokenizer", str(tmp_path / "tokenizer.json")])
        prepare.main()
        assert ("warning: the tokenizer loses text ('!' and" in capsys.readouterr().err) == (kind == "word_piece")


def test_missing_bytes_are_a_loss(tmp_path: Path) -> None:
    parts = json.loads(small("byte_level"))
    tokens = parts["model"]["vocab"]
    # The letters that the byte level shows for 0xF3 and 0xF4, which start the last characters of Unicode.
    parts["model"]["vocab"] = {token: index for token, index in tokens.items() if token not in "óô"}
    assert "get the same ids" in str(opened(parts, tmp_path).lossy)
