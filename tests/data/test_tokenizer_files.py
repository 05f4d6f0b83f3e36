"""Models of SentencePiece and vocabularies of tiktoken give the ids that those libraries give.

`tests/golden/tokenizers/ids.json` holds ids that sentencepiece 0.2.3 and tiktoken 0.14.0 computed. The models were
trained by `sentencepiece.SentencePieceTrainer` on State-of-the-Union addresses: `bpe_bytes` and `unigram_bytes` with
bytes for unknown characters, all spaces kept; `unigram_rules` with rules of normalisation, extra spaces removed, and
the symbols <turn>, a line break and two spaces; `bpe_plain` without a space in front, and with such symbols.
`small.tiktoken` was trained by `tiktoken._educational.bpe_train`, with some tokens added that not all patterns let a
text have.
"""

import base64
import contextlib
import json
import pickle
import re
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from mamba_jax.config import ModelConfig, TokenizerConfig
from mamba_jax.data.prepare_flags import PrepareArguments
from mamba_jax.data.tokenization.merges import merges_of
from mamba_jax.data.tokenization.tiktoken import ENCODINGS
from mamba_jax.data.tokenizer import JsonTokenizer, make_tokenizer
from mamba_jax.errors import InputError
from mamba_jax.export import companions

FOLDER = Path(__file__).resolve().parents[1] / "golden" / "tokenizers"
GOLDEN = json.loads((FOLDER / "ids.json").read_text())
MODELS = ("bpe_bytes", "unigram_bytes", "unigram_rules", "bpe_plain")
PATTERNS = ("gpt2", "cl100k_base", "o200k_base")
LOSSLESS = ("bpe_bytes", "unigram_bytes", *PATTERNS)


def config_of(name: str) -> TokenizerConfig:
    if name in MODELS:
        return TokenizerConfig(kind="sentencepiece", path=str(FOLDER / f"{name}.model"), end_of_document="</s>")
    pattern = ENCODINGS[name].pattern
    return TokenizerConfig(kind="tiktoken", path=str(FOLDER / "small.tiktoken"), encoding=pattern)


def as_read(name: str, text: str) -> str:
    """To SentencePiece this character is a space."""
    return text.replace("▁", " ") if name in MODELS else text


@pytest.mark.parametrize("name", [*MODELS, *PATTERNS])
def test_ids_are_those_of_the_other_library(name: str) -> None:
    tokenizer = make_tokenizer(config_of(name))
    for text, ids in zip(GOLDEN["texts"], GOLDEN["ids"][name], strict=True):
        assert tokenizer.encode(text).tolist() == ids, text
        if name in LOSSLESS:
            assert tokenizer.decode(ids) == as_read(name, text)
    assert len({tuple(map(tuple, GOLDEN["ids"][name])) for name in PATTERNS}) == 3, "the patterns cut alike"
    again = pickle.loads(pickle.dumps(tokenizer))
    assert [ids.tolist() for ids in again.encode_batch(GOLDEN["texts"])] == GOLDEN["ids"][name]


@pytest.mark.parametrize("name", LOSSLESS)
def test_a_document_in_pieces_and_text_that_grows_come_out_as_one(name: str) -> None:
    tokenizer = make_tokenizer(config_of(name))
    assert tokenizer.lossy is None
    token_bytes = tokenizer.token_bytes
    assert token_bytes is not None
    for text in filter(None, GOLDEN["texts"]):
        lines = re.split(r"(?<=\w)(?= \w)", text)
        pieces = tokenizer.encode_batch(lines, continues=[place > 0 for place in range(len(lines))])
        ids = np.concatenate(pieces).tolist()
        assert ids == tokenizer.encode(text).tolist()
        parts = [token_bytes(token, before) for token, before in zip(ids, [None, *ids], strict=False)]
        assert b"".join(parts).decode() == as_read(name, text)


def test_special_tokens_and_the_end_of_a_document_are_no_text() -> None:
    for name in (*MODELS, *PATTERNS):
        tokenizer = make_tokenizer(config_of(name))
        end = "</s>" if name in MODELS else "<|endoftext|>"
        assert tokenizer.end_of_document not in tokenizer.encode(f"{end} x{end}{end} <s>").tolist()
        assert tokenizer.encode_markup(end, continues=True).tolist() == [tokenizer.end_of_document]
        assert end in tokenizer.special_texts
        sizes = {"bpe_bytes": 700, "unigram_bytes": 700, "unigram_rules": 400, "bpe_plain": 500}
        assert tokenizer.vocab_size == sizes.get(name, 610)
        assert tokenizer.end_of_document == (2 if name in MODELS else 609)


def test_the_fingerprint_tells_files_and_patterns_apart() -> None:
    found = [make_tokenizer(config_of(name)).fingerprint for name in (*MODELS, *PATTERNS)]
    assert len(set(found)) == len(found)
    assert make_tokenizer(config_of("gpt2")).fingerprint == found[4]


@pytest.mark.parametrize("name", [*MODELS, "o200k_base"])
def test_exported_files_give_the_same_ids(name: str, tmp_path: Path) -> None:
    config = config_of(name)
    tokenizer = make_tokenizer(config)
    model = ModelConfig(vocab_size=tokenizer.vocab_size, d_model=8, num_layers=1)
    for file, content in companions.written(config, model, layout="hf").items():
        (tmp_path / file).write_bytes(content)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.encode_special_tokens = True
    spelled = re.compile("<unk>|<s>|</s>|<0x|<pad2>")
    for text, ids in zip(GOLDEN["texts"], GOLDEN["ids"][name], strict=True):
        if not spelled.search(text):
            assert theirs.encode(text).ids == ids
    read = companions.tokenizer_beside(tmp_path)
    assert read is not None
    assert read.kind == "hf_json"
    assert make_tokenizer(read).end_of_document == tokenizer.end_of_document


def test_a_runs_folder_may_hold_the_file(tmp_path: Path) -> None:
    own = TokenizerConfig(kind="sentencepiece", path="gone/bpe_bytes.model", end_of_document="</s>")
    assert companions.tokenizer_of_run(tmp_path, own) == own
    with pytest.raises(InputError, match=r"the tokenizer is missing .*: put it .* as bpe_bytes\.model"):
        companions.open_tokenizer(own)
    (tmp_path / "bpe_bytes.model").write_bytes((FOLDER / "bpe_bytes.model").read_bytes())
    found = companions.tokenizer_of_run(tmp_path, own)
    assert companions.open_tokenizer(found).end_of_document == 2
    (tmp_path / "tokenizer.json").write_text("{}")
    assert companions.tokenizer_of_run(tmp_path, own).kind == "hf_json"
    assert companions.tokenizer_of_run(tmp_path, TokenizerConfig()) == TokenizerConfig()


def test_published_encodings_have_their_special_tokens(tmp_path: Path) -> None:
    """A vocabulary of the size of GPT-2's: all bytes, and pairs of them."""
    tokens = [bytes([a]) for a in range(256)] + [bytes([a, b]) for a in range(256) for b in range(256)]
    path = tmp_path / "vocab.tiktoken"
    lines = (base64.b64encode(token) + b" %d\n" % number for number, token in enumerate(tokens[:50256]))
    path.write_bytes(b"".join(lines))
    tokenizer = make_tokenizer(TokenizerConfig(kind="tiktoken", path=str(path), encoding="gpt2"))
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (50257, 50256)
    assert ENCODINGS["cl100k_base"].special["<|fim_suffix|>"] == 100260
    assert ENCODINGS["p50k_edit"].special["<|fim_suffix|>"] == 50283
    with pytest.raises(InputError, match=r"has no token 'END': set tokenizer\.end_of_document .*: '</s>', '<s>'"):
        JsonTokenizer(str(FOLDER / "bpe_bytes.model"), end_of_document="END", kind="sentencepiece")


def test_every_pair_that_makes_a_token_is_a_merge() -> None:
    known = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5}
    pairs = merges_of(["bc", "ab", "abc"], known)
    assert pairs == [("b", "c"), ("a", "b"), ("a", "bc"), ("ab", "c")]


def edited(name: str, **fields: Any) -> bytes:
    """A model with other fields of its trainer or normalizer, or other types of its pieces."""
    from mamba_jax.data.tokenization import sentencepiece

    model = sentencepiece._message_class().FromString((FOLDER / f"{name}.model").read_bytes())
    for field, value in fields.items():
        if field == "symbol":
            model.pieces[3].piece = value
        elif field == "charsmap_of":
            other = sentencepiece._message_class().FromString((FOLDER / f"{value}.model").read_bytes())
            model.normalizer.charsmap = other.normalizer.charsmap
        elif field == "types":
            for place, kind in value.items():
                model.pieces[place].type = kind
        else:
            setattr(model.trainer if hasattr(model.trainer, field) else model.normalizer, field, value)
    return model.SerializeToString()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no SentencePiece model: it has 0 pieces, 0 of them for unknown text"),
        (b'{"model": {}}', "is no SentencePiece model: "),
        (edited("bpe_bytes", types={0: 1}), "is no SentencePiece model: it has 700 pieces, 0 of them for unknown text"),
        (
            edited("bpe_bytes", model_type=3),
            "is a SentencePiece model of words or characters; only unigram and bpe are",
        ),
        (edited("bpe_bytes", whitespace_as_suffix=True), "has treat_whitespace_as_suffix, which is not read"),
        (edited("bpe_bytes", types={500: 5}), "has unused pieces (a restricted vocabulary), which are not read"),
        (
            edited("bpe_plain", symbol="\t", charsmap_of="unigram_rules"),
            "its normalizer changes the user-defined symbol '\\t', which is not read",
        ),
        (edited("unigram_rules", charsmap=b"\xff\xff\xff\x00a"), "its precompiled_charsmap is cut short"),
    ],
)
def test_models_that_cannot_be_read_exactly_are_refused_in_one_line(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "a.model").write_bytes(content)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        JsonTokenizer(str(tmp_path / "a.model"), end_of_document="</s>", kind="sentencepiece")
    assert "\n" not in str(caught.value)


SMALL = (FOLDER / "small.tiktoken").read_bytes()


@pytest.mark.parametrize(
    ("content", "pattern", "message"),
    [
        (b"", ".", "is no vocabulary of tiktoken: it has no token for the byte 0"),
        (b'{"a": 1}\n', ".", "line 1 is no token in base64 with its number but '{\"a\": 1}'"),
        (SMALL + b"YQ== x\n", ".", "line 610 is no token in base64 with its number but 'YQ== x'"),
        (SMALL + b"Y 610\n", ".", "line 610 is no token in base64"),
        (SMALL + base64.b64encode(b"new token") + b" 3\n", ".", "two tokens have the same number, or one is negative"),
        (SMALL, r"\p{N}{1,3}+", "has a quantifier like {1,3}+, which repeats here: write it without +"),
        (SMALL, "(", "is not a tokenizer of the `tokenizers` library: "),
        (SMALL, "gpt2", "holds 609 tokens and gpt2 has 50256: name the encoding of the file, one of gpt2, r50k_base,"),
    ],
)
def test_vocabularies_that_are_none_are_refused_in_one_line(
    tmp_path: Path, content: bytes, pattern: str, message: str
) -> None:
    (tmp_path / "a.tiktoken").write_bytes(content)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        JsonTokenizer(str(tmp_path / "a.tiktoken"), end_of_document="<|end|>", kind="tiktoken", encoding=pattern)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", MODELS)
def test_damaged_models_are_refused_or_read(name: str, tmp_path: Path) -> None:
    """Nothing but an `InputError` comes of bytes that were changed or cut off."""
    data, rng = (FOLDER / f"{name}.model").read_bytes(), np.random.default_rng(0)
    for _ in range(60):
        changed = bytearray(data)
        for place in rng.integers(0, len(data), rng.integers(1, 5)):
            changed[place] = rng.integers(256)
        (tmp_path / "a.model").write_bytes(changed[: rng.integers(1, len(data))] if rng.random() < 0.3 else changed)
        with contextlib.suppress(InputError):
            JsonTokenizer(str(tmp_path / "a.model"), end_of_document="</s>", kind="sentencepiece").encode("the state")


def test_kinds_and_their_files_go_together() -> None:
    for fields, message in (
        ({"kind": "sentencepiece"}, "kind='sentencepiece', path=None; 'sentencepiece' needs a path"),
        ({"kind": "tiktoken", "path": "a"}, "kind='tiktoken', encoding=None; 'tiktoken' needs an encoding's name"),
        (
            {"kind": "hf_json", "path": "a", "encoding": "gpt2"},
            "encoding='gpt2'; 'tiktoken' needs an encoding's name",
        ),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            TokenizerConfig(**typing.cast(dict[str, Any], fields))
    kinds = {None: "byte", "a.json": "hf_json", "tokenizer.model": "sentencepiece", "a.b.tiktoken": "tiktoken"}
    for path, kind in kinds.items():
        pattern = "gpt2" if kind == "tiktoken" else None
        assert PrepareArguments(output="o", tokenizer=path, encoding=pattern).tokenizer_config.kind == kind


def test_a_file_of_another_kind_says_which_kinds_there_are(tmp_path: Path) -> None:
    for name in ("bpe_bytes.model", "small.tiktoken"):
        with pytest.raises(InputError, match=r"not a tokenizer of .*\(tokenizer\.kind says what a file is: hf_json,"):
            JsonTokenizer(str(FOLDER / name), end_of_document="</s>")
