"""A token stream survives the disk, and every kind of damage gets one line that names the file."""

import dataclasses
import inspect
import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from array_record.python import array_record_module

from mamba_jax.data.shard_writer import ShardWriter
from mamba_jax.data.shards import BLOCK_TOKENS, TokenDataset
from mamba_jax.data.tokenizer import ByteTokenizer
from mamba_jax.errors import InputError


def write(folder: Path, documents: Iterable[np.ndarray], **options: int) -> None:
    with ShardWriter(folder, ByteTokenizer(), **options) as writer:
        for ids in documents:
            writer.add(ids, num_bytes=len(ids), ends_document=True)
        writer.finish()


@pytest.fixture
def documents() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, size=size, dtype=np.int32) for size in (1, 5000, 3, 12_000, 70_001)]


@pytest.fixture
def stream(documents: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.append(ids, 256) for ids in documents])


@pytest.mark.parametrize("shard_tokens", [1, 3 * BLOCK_TOKENS, 2**20])
def test_any_window_reads_back(
    tmp_path: Path, documents: list[np.ndarray], stream: np.ndarray, shard_tokens: int
) -> None:
    write(tmp_path / "s", documents, shard_tokens=shard_tokens)
    dataset = TokenDataset(tmp_path / "s")
    assert dataset.num_tokens == len(stream)
    assert dataset.num_bytes == len(stream) - len(documents)
    assert dataset.num_documents == len(documents)
    for length in (1, 2, BLOCK_TOKENS, BLOCK_TOKENS + 1, len(stream)):
        starts = np.linspace(0, len(stream) - length, num=7, dtype=np.int64)
        expected = np.stack([stream[start : start + length] for start in starts])
        np.testing.assert_array_equal(dataset.read(starts, length=length), expected)
    assert len(dataset.index.shards) == -(-len(stream) // (max(1, shard_tokens // BLOCK_TOKENS) * BLOCK_TOKENS))


def test_pieces_of_a_document_join(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "s", ByteTokenizer()) as writer:
        writer.add(np.array([1, 2], np.int32), num_bytes=2, ends_document=False)
        writer.add(np.array([3], np.int32), num_bytes=1, ends_document=True)
        index = writer.finish()
    assert (index.documents, index.tokens, index.num_bytes) == (1, 4, 3)
    np.testing.assert_array_equal(TokenDataset(tmp_path / "s").read(np.array([0]), length=4), [[1, 2, 3, 256]])


@pytest.mark.parametrize(("vocab_size", "dtype"), [(257, "uint16"), (2**16, "uint16"), (2**16 + 1, "uint32")])
def test_dtype_holds_the_largest_id(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    tokenizer = ByteTokenizer()
    tokenizer.vocab_size = vocab_size
    with ShardWriter(tmp_path / "s", tokenizer) as writer:
        writer.add(np.array([vocab_size - 1], np.int32), num_bytes=1, ends_document=True)
        writer.finish()
    dataset = TokenDataset(tmp_path / "s")
    assert dataset.index.dtype == dtype
    assert dataset.read(np.array([0]), length=1)[0, 0] == vocab_size - 1


@pytest.mark.parametrize("bad", [-1, 257, 65_536 + 5])
def test_ids_outside_the_vocabulary_are_not_written(tmp_path: Path, bad: int) -> None:
    with pytest.raises(InputError, match=f"token 2 of the stream is {bad}, outside the vocabulary of 257"):
        write(tmp_path / "s", [np.array([7, 8, bad], np.int32)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([1.0, 2.0], "token ids must be whole numbers, got float64"),
        ([1.0, np.nan], "token ids must be whole numbers, got float64"),
        (np.array([1.5], np.float32), "token ids must be whole numbers, got float32"),
        ([True, False], "token ids must be whole numbers, got bool"),
        (np.array([3, 2**64 - 1], np.uint64), "token 1 of the stream is -1, outside the vocabulary of 257"),
        (np.array([3, 2**32 + 5], np.int64), "token 1 of the stream is 4294967301, outside the vocabulary of 257"),
    ],
)
def test_what_is_no_id_is_not_written(tmp_path: Path, ids: object, expected: str) -> None:
    """Without a check, a cast would make ids of all of them. The annotation is more strict, but only in tests."""

    def write_ids() -> None:
        with ShardWriter(tmp_path / "s", ByteTokenizer()) as writer:
            inspect.unwrap(ShardWriter.add)(writer, np.asarray(ids), num_bytes=2, ends_document=True)
            writer.finish()

    with pytest.raises(InputError) as raised:
        write_ids()
    assert str(raised.value).startswith(expected)
    assert list(tmp_path.iterdir()) == []


def test_failure_leaves_nothing_behind(tmp_path: Path, documents: list[np.ndarray]) -> None:
    def fail_half_way() -> Iterator[np.ndarray]:
        yield from documents * 20
        assert any(tmp_path.rglob("*.array_record"))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "s", fail_half_way(), shard_tokens=BLOCK_TOKENS)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    ids = np.random.default_rng(0).integers(0, 256, size=2**20, dtype=np.int32)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, limit[1]))
        with pytest.raises(InputError, match=r"cannot write shard tokens-00000\.array_record of .*File too large"):
            write(tmp_path / "s", [ids] * 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path: Path, documents: list[np.ndarray]) -> None:
    write(tmp_path / "s", documents)
    before = {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()}
    with pytest.raises(InputError, match="exists already"):
        write(tmp_path / "s", documents[:1])
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()}


def test_a_slower_writer_yields(tmp_path: Path, documents: list[np.ndarray]) -> None:
    with ShardWriter(tmp_path / "s", ByteTokenizer()) as slow:
        slow.add(documents[1], num_bytes=5000, ends_document=True)
        write(tmp_path / "s", documents)
        with pytest.raises(InputError, match="exists already"):
            slow.finish()
    assert TokenDataset(tmp_path / "s").num_documents == len(documents)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_folders_of_killed_writers_are_removed_after_a_day(tmp_path: Path, documents: list[np.ndarray]) -> None:
    for name, age in ((".s.old.partial", 2 * 86_400), (".s.young.partial", 3600), (".other.old.partial", 2 * 86_400)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokens-00000.array_record").write_bytes(b"x")
        for path in (tmp_path / name / "tokens-00000.array_record", tmp_path / name):
            os.utime(path, (time.time() - age,) * 2)
    write(tmp_path / "s", documents)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.old.partial", ".s.young.partial", "s"]


def edit_index(**changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "index.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def edit_tokens(first: int) -> Callable[[Path], None]:
    """Moves tokens between the entries of two shards, so that the sum is as before."""

    def damage(folder: Path) -> None:
        a, b = json.loads((folder / "index.json").read_text())["shards"][:2]
        total = a["tokens"] + b["tokens"]
        a.update(tokens=first, records=-(-first // BLOCK_TOKENS))
        b.update(tokens=total - first, records=-(-(total - first) // BLOCK_TOKENS))
        edit_index(shards=[a, b], tokens=total)(folder)

    return damage


def truncate(folder: Path) -> None:
    path = folder / "tokens-00000.array_record"
    path.write_bytes(path.read_bytes()[:-1])


def remove_key(folder: Path) -> None:
    path = folder / "index.json"
    index = json.loads(path.read_text())
    del index["dtype"]
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda folder: shutil.rmtree(folder), "cannot read .*index.json: No such file"),
        (lambda folder: (folder / "index.json").unlink(), "cannot read .*index.json: No such file"),
        (lambda folder: (folder / "index.json").write_text(""), "index.json is no index of token shards"),
        (lambda folder: (folder / "index.json").write_text('{"version": 1'), "index.json is no index of token shards"),
        (remove_key, "index.json is no index of token shards: dtype: Field required"),
        (edit_index(version=2), "index.json is no index of token shards: version: Input should be 1"),
        (edit_index(colour="red"), "colour: Unexpected keyword argument"),
        (edit_index(tokens=5), "index.json contradicts itself"),
        (edit_index(block_tokens=1000), "index.json contradicts itself"),
        (edit_index(shards=[]), "index.json contradicts itself"),
        (edit_index(dtype="float32"), "index.json is no index of token shards: dtype: Input should be 'uint16'"),
        (edit_index(vocab_size=70_000), "uint16 cannot hold 70000 ids, so large ones have wrapped"),
        (edit_index(vocab_size=256), "index.json contradicts itself"),
        (edit_index(end_of_document=-1), "index.json contradicts itself"),
        (edit_index(num_bytes=0), "index.json says that its text has 0 bytes"),
        (edit_tokens(0), "index.json contradicts itself"),
        (edit_tokens(-BLOCK_TOKENS), "index.json contradicts itself"),
        (lambda folder: (folder / "tokens-00001.array_record").unlink(), r"tokens-00001\.array_record is missing"),
        (truncate, r"tokens-00000\.array_record has \d+ bytes, its index says \d+"),
        (
            lambda folder: (folder / "tokens-00001.array_record").write_bytes(b""),
            r"tokens-00001\.array_record has 0 bytes",
        ),
    ],
)
def test_damage_is_found_on_opening(
    tmp_path: Path, documents: list[np.ndarray], damage: Callable[[Path], None], expected: str
) -> None:
    write(tmp_path / "s", documents, shard_tokens=8 * BLOCK_TOKENS)
    damage(tmp_path / "s")
    with pytest.raises(InputError, match=expected) as raised:
        TokenDataset(tmp_path / "s")
    assert "\n" not in str(raised.value)


def test_flipped_bit_is_found_on_reading(tmp_path: Path, documents: list[np.ndarray]) -> None:
    write(tmp_path / "s", documents)
    path = tmp_path / "s" / "tokens-00000.array_record"
    data = bytearray(path.read_bytes())
    data[30_000] ^= 4
    path.write_bytes(data)
    dataset = TokenDataset(tmp_path / "s")
    with pytest.raises(InputError, match=r"tokens-00000\.array_record is damaged: .*hash mismatch") as raised:
        dataset.read(np.array([0]), length=dataset.num_tokens)
    assert "\n" not in str(raised.value)


def foreign_shards(folder: Path, records: list[bytes]) -> TokenDataset:
    """Two blocks of tokens whose records another writer has replaced, with the right size of the file."""
    write(folder, [np.zeros(2 * BLOCK_TOKENS - 1, dtype=np.int32)])
    index = TokenDataset(folder).index
    path = folder / "tokens-00000.array_record"
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,zstd:3")
    for record in records:
        writer.write(record)
    writer.close()
    shard = dataclasses.replace(index.shards[0], size=path.stat().st_size)
    edit_index(shards=[dataclasses.asdict(shard)])(folder)
    return TokenDataset(folder)


@pytest.mark.parametrize("size", [0, 1, 2 * BLOCK_TOKENS - 1, 2 * BLOCK_TOKENS - 2, 2 * BLOCK_TOKENS + 2])
def test_records_of_another_length_are_found_on_reading(tmp_path: Path, size: int) -> None:
    dataset = foreign_shards(tmp_path / "s", [bytes(2 * BLOCK_TOKENS), bytes(size)])
    with pytest.raises(InputError, match=rf"record 1 holds {size} bytes, the index says 4096 tokens") as raised:
        dataset.read(np.array([5000]), length=3)
    assert "\n" not in str(raised.value)


def test_missing_records_are_found_on_reading(tmp_path: Path) -> None:
    dataset = foreign_shards(tmp_path / "s", [bytes(2 * BLOCK_TOKENS)])
    with pytest.raises(InputError, match=r"tokens-00000\.array_record is damaged") as raised:
        dataset.read(np.array([5000]), length=3)
    assert "\n" not in str(raised.value)


def test_foreign_ids_are_found_on_reading(tmp_path: Path) -> None:
    """A file of the right size with an id that the vocabulary lacks, as a foreign writer might leave."""
    ids = np.zeros(2 * BLOCK_TOKENS, dtype="<u2")
    ids[BLOCK_TOKENS + 7] = 300
    dataset = foreign_shards(tmp_path / "s", [block.tobytes() for block in ids.reshape(2, -1)])
    np.testing.assert_array_equal(dataset.read(np.array([5]), length=3), [[0, 0, 0]])
    with pytest.raises(InputError, match=r"tokens-00000\.array_record: token 4103 is 300, outside the vocabulary"):
        dataset.read(np.array([5000]), length=3)
