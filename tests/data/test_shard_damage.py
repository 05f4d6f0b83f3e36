"""Every kind of damage to a folder of shards gets one line that names the file."""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from array_record.python import array_record_module

from mamba_jax.data.shard_index import BLOCK_TOKENS, INDEX_JSON, DamagedShards, write_index
from mamba_jax.data.shards import TokenDataset
from mamba_jax.data.tokenizer import ByteTokenizer
from mamba_jax.errors import InputError
from tests.data.test_shards import flip_bit, write


def edit_index(**changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "index.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def edit_tokens(first: int) -> Callable[[Path], None]:
    """Moves tokens between the entries of two shards, so that the sum is as before."""

    def damage(folder: Path) -> None:
        a, b, *rest = json.loads((folder / "index.json").read_text())["shards"]
        total = a["tokens"] + b["tokens"]
        a.update(tokens=first, records=-(-first // BLOCK_TOKENS))
        b.update(tokens=total - first, records=-(-(total - first) // BLOCK_TOKENS))
        edit_index(shards=[a, b, *rest])(folder)

    return damage


def edit_shard(**changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        shards = json.loads((folder / "index.json").read_text())["shards"]
        edit_index(shards=[{**shards[0], **changes}, *shards[1:]])(folder)

    return damage


def write_text(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "index.json").write_text(text)


def replace_index(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "index.json").unlink()
        make(folder / "index.json")

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
        (lambda folder: (folder / "index.json").write_text(""), "index.json is not an index of token shards"),
        (
            lambda folder: (folder / "index.json").write_text('{"version": 1'),
            "index.json is not an index of token shards",
        ),
        (remove_key, "index.json is not an index of token shards: dtype: Field required"),
        (edit_index(version=4), "index.json is not an index of token shards: version: Input should be 1, 2 or 3"),
        (edit_index(version=3), "it was changed after it was written"),
        (edit_index(version=1), "version 1 has no content, checksum and digests"),
        (edit_index(colour="red"), "colour: Unexpected keyword argument"),
        (edit_index(tokens=5), "index.json contradicts itself: its shards do not add up"),
        (edit_index(block_tokens=1000), "cannot hold 32768 tokens in 8 records of 1000"),
        (edit_index(block_tokens=0), "cannot hold 32768 tokens in 8 records of 0"),
        (edit_index(shards=[]), "index.json contradicts itself: its shards do not add up"),
        (edit_index(dtype="float32"), "index.json is not an index of token shards: dtype: Input should be 'uint16'"),
        (edit_index(vocab_size=70_000), "uint16 cannot hold 70000 ids, so large ones have wrapped"),
        (edit_index(vocab_size=256), "the end-of-document id 256 is outside the vocabulary of 256 ids"),
        (edit_index(end_of_document=-1), "end_of_document: Input should be greater than or equal to 0"),
        (edit_index(end_of_document=100), "it was changed after it was written"),
        (edit_index(vocab_size=300), "it was changed after it was written"),
        (edit_index(num_bytes=0), "0 bytes of text cannot be 87010 tokens of 5 documents"),
        (edit_index(num_bytes=1), "1 bytes of text cannot be 87010 tokens of 5 documents"),
        (edit_index(documents=6, num_bytes=87004), "it was changed after it was written"),
        (edit_index(documents=-3), "documents: Input should be greater than or equal to 0"),
        (edit_index(documents=10**6), "87010 tokens cannot be 1000000 documents"),
        (edit_index(content="0" * 64), "it was changed after it was written"),
        (edit_index(content=None), "it was changed after it was written"),
        (edit_index(checksum="A" * 64), "checksum: String should match pattern"),
        (edit_index(tokens=2**64), "tokens: Input should be less than or equal to 9007199254740992"),
        (edit_index(tokens=1.0), "tokens: Input should be a valid integer"),
        (edit_shard(file="../outside.array_record"), "plain file name, not '../outside.array_record'"),
        (edit_shard(file="/outside.array_record"), "plain file name, not '/outside.array_record'"),
        (edit_shard(file=".."), "plain file name, not '..'"),
        (edit_shard(file="a" * 5000), "plain file name, not 'aaa.* ... a+'"),
        (edit_shard(file="a\nb"), r"plain file name, not 'a\\nb'"),
        (edit_shard(file="tokens-00001.array_record"), "it names a shard twice"),
        (edit_shard(sha256="0" * 64), "it was changed after it was written"),
        (edit_shard(digests=None), "it was changed after it was written"),
        (edit_shard(records=2**64), "records: Input should be less than or equal to"),
        (
            edit_shard(records=2**40, tokens=2**52),
            "cannot hold 4503599627370496 tokens in 1099511627776 records of 4096",
        ),
        (edit_tokens(0), "cannot hold 0 tokens in 0 records of 4096"),
        (edit_tokens(-BLOCK_TOKENS), "records: Input should be greater than or equal to 0"),
        (write_text("[" * 100_000), "index.json is not an index of token shards: Invalid JSON: recursion limit"),
        (write_text('{"tokens": ' + "9" * 10_000), "index.json is not an index of token shards: Invalid JSON"),
        (write_text("\0" * 100), "index.json is not an index of token shards: Invalid JSON"),
        (replace_index(Path.mkdir), "cannot read .*index.json: Is a directory"),
        (replace_index(os.mkfifo), "index.json is not a regular file"),
        (replace_index(lambda path: path.symlink_to("/dev/zero")), "index.json is not a regular file"),
        (
            replace_index(lambda path: path.symlink_to(path)),
            "cannot read .*index.json: Too many levels of symbolic links",
        ),
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
    flip_bit(tmp_path / "s" / "tokens-00000.array_record")
    dataset = TokenDataset(tmp_path / "s")
    with pytest.raises(InputError, match=r"tokens-00000\.array_record is damaged: .*hash mismatch") as raised:
        dataset.read(np.array([0]), length=dataset.num_tokens)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("shards", [(0, 1), (0, 2), (1, 2)])
def test_swapped_shards_of_equal_size_are_found_on_reading(
    tmp_path: Path, documents: list[np.ndarray], shards: tuple[int, int]
) -> None:
    write(tmp_path / "s", [documents[-1]], shard_tokens=2 * BLOCK_TOKENS)
    a, b = (tmp_path / "s" / f"tokens-{shard:05}.array_record" for shard in shards)
    assert a.stat().st_size == b.stat().st_size
    a.rename(tmp_path / "a")
    b.rename(a)
    (tmp_path / "a").rename(b)
    dataset = TokenDataset(tmp_path / "s")
    for shard in shards:
        with pytest.raises(DamagedShards, match=f"tokens-{shard:05}.array_record is not the file that its index names"):
            dataset.read(np.array([2 * BLOCK_TOKENS * shard + 5]), length=2)


def rewrite(path: Path, records: list[bytes]) -> None:
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,zstd:3")
    for record in records:
        writer.write(record)
    writer.close()


def test_an_edited_block_is_found_though_the_file_is_sound(tmp_path: Path, documents: list[np.ndarray]) -> None:
    write(tmp_path / "s", documents[3:4])
    path = tmp_path / "s" / "tokens-00000.array_record"
    index = TokenDataset(tmp_path / "s").index
    reader = array_record_module.ArrayRecordReader(str(path), "readahead_buffer_size:0")
    first, second, *rest = (reader.read([i])[0] for i in range(reader.num_records()))
    rewrite(path, [first, b"\1\0" + second[2:], *rest])
    shard = dataclasses.replace(index.shards[0], size=path.stat().st_size)
    write_index(tmp_path / "s", dataclasses.replace(index, shards=(shard,)))
    dataset = TokenDataset(tmp_path / "s")
    np.testing.assert_array_equal(dataset.read(np.array([0]), length=4096)[0], documents[3][:4096])
    with pytest.raises(DamagedShards, match=r"record 1 is not the one that was written"):
        dataset.read(np.array([4095]), length=2)
    with pytest.raises(DamagedShards, match=r"is not the file that its index names"):
        dataset.check()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sha256": "0" * 64}, "is not the file that its index names"),
        ({"content": "0" * 64}, "holds another token stream"),
    ],
)
def test_check_compares_what_reading_cannot(
    tmp_path: Path, documents: list[np.ndarray], changes: dict[str, object], expected: str
) -> None:
    """An index that a foreign writer made consistent."""
    write(tmp_path / "s", documents[1:2], shard_tokens=BLOCK_TOKENS)
    dataset = TokenDataset(tmp_path / "s")
    dataset.check()
    index = json.loads((tmp_path / "s" / "index.json").read_text())
    changed = {key: value for key, value in changes.items() if key in index}
    index["shards"][0] |= {key: value for key, value in changes.items() if key not in index}
    write_index(tmp_path / "s", INDEX_JSON.validate_json(json.dumps(index | changed)))
    with pytest.raises(DamagedShards, match=expected):
        TokenDataset(tmp_path / "s").check()


def test_storage_that_cannot_be_read_now_is_no_damage(
    tmp_path: Path, documents: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "s", documents)
    (tmp_path / "s" / "index.json").chmod(0o600)

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    dataset = TokenDataset(tmp_path / "s")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fail)
        with pytest.raises(InputError, match=r"cannot read shard .*: Stale file handle") as raised:
            dataset.read(np.array([0]), length=2)
        assert not isinstance(raised.value, DamagedShards)
    assert dataset.read(np.array([0]), length=2)[0, 1] == 256
    for name in ("stat", "is_file"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, name, fail)
            with pytest.raises(InputError, match=r"cannot read shard .*: Stale file handle") as raised:
                TokenDataset(tmp_path / "s")
            assert not isinstance(raised.value, DamagedShards)


def test_identity_is_that_of_the_ids(tmp_path: Path, documents: list[np.ndarray]) -> None:
    write(tmp_path / "a", documents)
    write(tmp_path / "b", documents, shard_tokens=BLOCK_TOKENS)
    ids = np.concatenate([np.append(ids, 256) for ids in documents]).astype("<u2")
    digests = [hashlib.sha256(ids[i : i + BLOCK_TOKENS]).digest()[:16] for i in range(0, len(ids), BLOCK_TOKENS)]
    identity = TokenDataset(tmp_path / "a").identity
    assert identity == {
        "documents": 5,
        "tokens": len(ids),
        "num_bytes": len(ids) - 5,
        "tokenizer": ByteTokenizer.fingerprint,
        "content": hashlib.sha256(b"".join(digests)).hexdigest(),
    }
    assert json.loads(json.dumps(identity)) == identity == TokenDataset(tmp_path / "b").identity
    documents[2][1] ^= 1
    write(tmp_path / "c", documents)
    assert TokenDataset(tmp_path / "c").identity == {**identity, "content": TokenDataset(tmp_path / "c").index.content}
    assert TokenDataset(tmp_path / "c").index.content != identity["content"]


def make_version_1(folder: Path) -> None:
    """Turns the index into one of version 1, for the files as they are."""
    index = json.loads((folder / "index.json").read_text())
    for shard in index["shards"]:
        data = (folder / shard["file"]).read_bytes()
        shard.update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
        del shard["digests"]
    del index["content"], index["checksum"]
    (folder / "index.json").write_text(json.dumps({**index, "version": 1}))


def test_version_1_is_read_and_its_files_are_compared(
    tmp_path: Path, documents: list[np.ndarray], stream: np.ndarray
) -> None:
    write(tmp_path / "s", documents, shard_tokens=BLOCK_TOKENS)
    current = TokenDataset(tmp_path / "s").identity
    make_version_1(tmp_path / "s")
    dataset = TokenDataset(tmp_path / "s")
    np.testing.assert_array_equal(dataset.read(np.array([0]), length=len(stream))[0], stream)
    dataset.check()
    files = "".join(shard.sha256 for shard in dataset.index.shards)
    assert dataset.identity == {**current, "content": hashlib.sha256(files.encode()).hexdigest()}
    a, b = (tmp_path / "s" / f"tokens-0000{i}.array_record" for i in (1, 2))
    b.write_bytes(a.read_bytes())
    with pytest.raises(DamagedShards, match=r"tokens-00002\.array_record is not the file that its index names"):
        TokenDataset(tmp_path / "s").read(np.array([2 * BLOCK_TOKENS]), length=1)


def foreign_shards(folder: Path, records: list[bytes]) -> TokenDataset:
    """Two blocks of tokens of version 1 that another writer has made, with the right size and sha256 of the file."""
    write(folder, [np.zeros(2 * BLOCK_TOKENS - 1, dtype=np.int32)])
    rewrite(folder / "tokens-00000.array_record", records)
    make_version_1(folder)
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
