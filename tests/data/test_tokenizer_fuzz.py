"""Whatever a tokenizer's file or a text holds: ids of the vocabulary that stand for it, or one line."""

import contextlib
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mamba_jax.data.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer
from mamba_jax.errors import InputError
from tests.data.small_tokenizers import END, LOSSLESS, LOSSY, opened, saved, small

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["the state of it", "a\nb", "Ωmega 漢字 🐍\0", f"{END}</s><unk>", " two  spaces ", ""]
# What a part of a file becomes: numbers beyond every range, other types, patterns that are none or match nothing.
VALUES = [
    None,
    True,
    0,
    -1,
    1,
    2**31,
    2**32 - 1,
    2**63,
    1e308,
    0.5,
    "",
    "a",
    "(",
    "\0",
    "▁",
    "AAAA",
    "/////w==",
    [],
    {},
]
TYPES = ["NFC", "Strip", "Prepend", "Metaspace", "ByteLevel", "Sequence", "Replace", "Unigram", "BPE", "Fuse", "CTC"]
LINES = st.lists(st.text("ab the.é漢", min_size=1).map(lambda line: f"x{line}x"), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def small_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    kinds: dict[str, Tokenizer] = {kind: saved(kind, folder) for kind in (*LOSSLESS, *LOSSY)}
    return kinds | {"byte": ByteTokenizer()}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(text=st.text() | st.text("<|endoftext|></s>the \n"))
def test_texts_keep_to_the_vocabulary_and_come_back(small_tokenizers: dict[str, Tokenizer], text: str) -> None:
    for kind, tokenizer in small_tokenizers.items():
        ids = tokenizer.encode(text)
        assert tokenizer.end_of_document not in ids, kind
        assert tokenizer.known[ids].all(), kind
        if tokenizer.lossy is None and "▁" not in text:
            # The space in front is all that may be added.
            assert tokenizer.decode(ids) in (text, f" {text}"), kind


@settings(max_examples=40, deadline=None, derandomize=True)
@given(lines=LINES)
def test_pieces_have_the_ids_of_the_whole(small_tokenizers: dict[str, Tokenizer], lines: list[str]) -> None:
    pieces = [f"{line}\n" for line in lines]
    flags = [index > 0 for index in range(len(pieces))]
    for kind, tokenizer in small_tokenizers.items():
        ids = np.concatenate(tokenizer.encode_batch(pieces, continues=flags))
        assert ids.tolist() == tokenizer.encode("".join(pieces)).tolist(), kind


@settings(max_examples=90, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(kind=st.sampled_from((*LOSSLESS, *LOSSY)), draw=st.randoms(use_true_random=False))
def test_a_changed_file_works_or_gets_one_line(tmp_path_factory, kind: str, draw: random.Random) -> None:
    check_changed(kind, draw, tmp_path_factory.getbasetemp())


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 12000, 3000))
def test_no_changed_file_ends_the_process(first: int) -> None:
    program = f"from tests.data.test_tokenizer_fuzz import check_seeds; check_seeds({first}, {first + 3000})"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def check_seeds(first: int, end: int) -> None:
    kinds = (*LOSSLESS, *LOSSY)
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(first, end):
            try:
                check_changed(kinds[seed % len(kinds)], random.Random(seed), Path(folder))
            except Exception as error:
                raise AssertionError(f"seed {seed}") from error


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    message = ""
    try:
        yield
    except InputError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 1000


def check_changed(kind: str, draw: random.Random, folder: Path) -> None:
    with one_line():
        check_use(opened(changed(small(kind), draw), folder))


def check_use(tokenizer: JsonTokenizer) -> None:
    assert tokenizer.known.shape == (tokenizer.vocab_size,)
    assert tokenizer.lossy is None or isinstance(tokenizer.lossy, str)
    for text in TEXTS:
        with one_line():
            for ids in tokenizer.encode_batch([text, text], continues=[False, True]):
                assert tokenizer.known[ids].all()
                assert tokenizer.end_of_document not in ids
                tokenizer.decode(ids)
    tokenizer.decode(range(tokenizer.vocab_size))


def changed(content: str, draw: random.Random) -> bytes:
    """The file with a byte changed, cut off, or with some of its values replaced, removed, repeated or exchanged."""
    data = bytearray(content.encode())
    match draw.randrange(8):
        case 0:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            return bytes(data)
        case 1:
            return bytes(data[: draw.randrange(len(data))])
    value = json.loads(content)
    for _ in range(draw.randrange(1, 4)):
        change(value, draw)
    return json.dumps(value).encode()


def change(value: Any, draw: random.Random) -> None:
    place = value
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw.choice(keys) if keys else None
        if key is None or not isinstance(place[key], dict | list) or not place[key] or draw.random() < 0.1:
            break
        place = place[key]
    if key is None:
        return
    match draw.randrange(5):
        case 0:
            del place[key]
        case 1 if isinstance(place, list):
            place.append(place[key])
        case 2 if isinstance(place, list):
            other = draw.choice(keys)
            place[key], place[other] = place[other], place[key]
        case 3:
            place[key] = draw.choice(TYPES)
        case _:
            place[key] = draw.choice(VALUES)
