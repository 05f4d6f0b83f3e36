"""A token stream survives the disk, and a write that fails leaves nothing behind."""

import errno
import inspect
import os
import resource
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mamba_jax.data.shard_index import BLOCK_TOKENS, DamagedShards
from mamba_jax.data.shard_writer import ShardWriter
from mamba_jax.data.shards import TokenDataset
from mamba_jax.data.tokenizer import ByteTokenizer
from mamba_jax.errors import InputError


def write(folder: Path, documents: Iterable[np.ndarray], **options: Any) -> None:
    with ShardWriter(folder, ByteTokenizer().vocabulary, **options) as writer:
        for ids in documents:
            writer.add(ids, num_bytes=len(ids), ends_document=True)
        writer.finish()


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[30_000] ^= 4
    path.write_bytes(data)


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


def test_a_name_that_no_folder_can_have(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot create token shards in .*\\x00.*: embedded null byte"):
        write(tmp_path / "a\0b" / "s", [])
    with pytest.raises(InputError, match=r"cannot read .*\\x00.*: embedded null byte"):
        TokenDataset(tmp_path / "a\0b")


def test_a_folder_whose_name_is_no_utf8(tmp_path: Path, documents: list[np.ndarray]) -> None:
    folder = tmp_path / os.fsdecode(b"\xff\n")
    write(folder, documents)
    TokenDataset(folder).check()
    flip_bit(folder / "tokens-00000.array_record")
    with pytest.raises(DamagedShards, match=r"\\udcff /tokens-00000\.array_record is damaged: "):
        TokenDataset(folder).read(np.array([0]), length=80_000)


def test_pieces_of_a_document_join(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "s", ByteTokenizer().vocabulary) as writer:
        writer.add(np.array([1, 2], np.int32), num_bytes=2, ends_document=False)
        writer.add(np.array([3], np.int32), num_bytes=1, ends_document=True)
        index = writer.finish()
    assert (index.documents, index.tokens, index.num_bytes) == (1, 4, 3)
    np.testing.assert_array_equal(TokenDataset(tmp_path / "s").read(np.array([0]), length=4), [[1, 2, 3, 256]])


@pytest.mark.parametrize(("vocab_size", "dtype"), [(257, "uint16"), (2**16, "uint16"), (2**16 + 1, "uint32")])
def test_dtype_holds_the_largest_id(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    tokenizer = ByteTokenizer()
    tokenizer.vocab_size = vocab_size
    with ShardWriter(tmp_path / "s", tokenizer.vocabulary) as writer:
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
        with ShardWriter(tmp_path / "s", ByteTokenizer().vocabulary) as writer:
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


@pytest.mark.parametrize("name", [".", "..", "new/..", "link", "file"])
def test_no_output_is_started_where_it_could_not_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to("nowhere")
    Path("file").write_text("years of work")
    with pytest.raises(InputError, match="exists already"):
        ShardWriter(Path(name), ByteTokenizer().vocabulary)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


@pytest.mark.parametrize("error", [errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_folders_that_cannot_be_made_get_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(InputError, match=f"cannot create token shards in .*: {os.strerror(error)}"):
        write(tmp_path / "new" / "s", [])


def test_nothing_is_overwritten(tmp_path: Path, documents: list[np.ndarray]) -> None:
    write(tmp_path / "s", documents)
    before = {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()}
    with pytest.raises(InputError, match="exists already"):
        write(tmp_path / "s", documents[:1])
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()}


def test_a_slower_writer_yields(tmp_path: Path, documents: list[np.ndarray]) -> None:
    with ShardWriter(tmp_path / "s", ByteTokenizer().vocabulary) as slow:
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
