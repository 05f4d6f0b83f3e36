"""Shards do not depend on how many processes made them, nor on how often they were killed meanwhile."""

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mamba_jax.config import FilesSource
from mamba_jax.data import prepare, shard_progress
from mamba_jax.data.documents import DocumentReader
from mamba_jax.data.shard_writer import ShardWriter
from mamba_jax.data.shards import TokenDataset
from mamba_jax.data.tokenization import stream
from mamba_jax.data.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer, make_tokenizer
from mamba_jax.errors import InputError
from tests.data.small_tokenizers import saved
from tests.data.test_tokenizer import train_bpe

WORDS = "the thing of the theory and the other thing, é\n"


@pytest.fixture
def lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Documents of many lengths, in many batches and shards."""
    monkeypatch.setattr(prepare, "_BATCH_BYTES", 10_000)
    monkeypatch.setattr(stream, "_ALONE_BYTES", 20_000)
    lengths = np.random.default_rng(3).integers(1, 4000, 150).tolist()
    texts = ((WORDS * 90)[i % 40 : i % 40 + length] for i, length in enumerate(lengths))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return tmp_path / "a.jsonl"


def opened(path: Path, **fields: Any) -> DocumentReader:
    return FilesSource(path=str(path), **fields).open()


def write(path: Path, tokenizer: Tokenizer, folder: Path, **options: Any) -> None:
    prepare.write_shards(opened(path), tokenizer, folder, shard_tokens=2 * 4096, **options)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def tokenizer(tmp_path: Path) -> JsonTokenizer:
    made = make_tokenizer(train_bpe(tmp_path / "bpe.json"))
    assert isinstance(made, JsonTokenizer)
    return made


def test_processes_write_what_one_writes(lines: Path, tokenizer: JsonTokenizer, tmp_path: Path) -> None:
    write(lines, tokenizer, tmp_path / "one", workers=1)
    write(lines, tokenizer, tmp_path / "three", workers=3)
    assert content(tmp_path / "three") == content(tmp_path / "one")
    dataset = TokenDataset(tmp_path / "one")
    assert len(dataset.index.shards) > 5
    expected: list[int] = []
    for line in lines.read_text().splitlines():
        expected += [*tokenizer.encode(json.loads(line)["text"]).tolist(), tokenizer.end_of_document]
    assert dataset.read(np.array([0]), length=dataset.num_tokens)[0].tolist() == expected


@pytest.mark.parametrize("kind", ["llama", "byte_level_prefix"])
def test_a_pickled_tokenizer_gives_the_same_ids(tmp_path: Path, kind: str) -> None:
    tokenizer = saved(kind, tmp_path)
    texts = ["the <|endoftext|> of the state", "state\nof", " é"]
    first = tokenizer.encode_batch(texts, continues=[False, True, False])
    copied = pickle.loads(pickle.dumps(tokenizer))
    again = copied.encode_batch(texts, continues=[False, True, False])
    assert [ids.tolist() for ids in first] == [ids.tolist() for ids in again]
    assert copied.vocabulary == tokenizer.vocabulary


def test_a_process_that_is_killed_is_told(
    lines: Path, tokenizer: JsonTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = subprocess.Popen

    def killed(*args: Any, **options: Any) -> Any:
        process = start(*args, **options)
        process.kill()
        return process

    monkeypatch.setattr(subprocess, "Popen", killed)
    with pytest.raises(InputError, match=r"a process that tokenises ended with status -9: .*use fewer --workers"):
        write(lines, tokenizer, tmp_path / "out", workers=2)
    assert not (tmp_path / "out").exists()


def test_a_process_that_cannot_start_is_told(
    lines: Path, tokenizer: JsonTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: Any, **options: Any) -> Any:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(subprocess, "Popen", refused)
    with pytest.raises(
        InputError, match=r"cannot start 2 processes that tokenise \(Resource temporarily unavailable\)"
    ):
        write(lines, tokenizer, tmp_path / "out", workers=2)


def test_a_text_without_ids_is_told_by_the_process_that_finds_it(lines: Path, tmp_path: Path) -> None:
    with lines.open("a") as file:
        file.write(json.dumps({"text": "the x<unk>"}) + "\n")
    tokenizer = saved("word_level", tmp_path)
    tokenizer._is_special[:] = True
    with pytest.raises(InputError, match="text spells the special token"):
        write(lines, tokenizer, tmp_path / "out", workers=2)


class Killed(Exception):
    """The process ends here."""


@pytest.mark.parametrize("at", [1, 6])
def test_a_writer_goes_on_behind_the_last_finished_shard(
    lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], at: int
) -> None:
    """Bytes: a batch of 10,000 ids ends one shard of 8,192 or two."""
    tokenizer = ByteTokenizer()
    write(lines, tokenizer, tmp_path / "whole")
    finish_shard, count = ShardWriter._keep, 0

    def keep(writer: ShardWriter) -> None:
        nonlocal count
        finish_shard(writer)
        count += 1
        if count == at:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "_keep", keep)
        with pytest.raises(Killed):
            write(lines, tokenizer, tmp_path / "out")
    (partial,) = tmp_path.glob(".out.*.partial")
    (partial / f"tokens-{at:05}.array_record").write_bytes(b"begun and not finished")
    capsys.readouterr()
    encoded = 0
    encode = stream.encode_pieces

    def counting(tokenizer: Tokenizer, pieces: Any) -> Any:
        nonlocal encoded
        encoded += sum(piece.num_bytes for piece in pieces)
        return encode(tokenizer, pieces)

    monkeypatch.setattr(stream, "encode_pieces", counting)
    write(lines, tokenizer, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert f"going on behind {at} finished shards ({at * 8192:,} tokens)" in capsys.readouterr().err
    total = TokenDataset(tmp_path / "whole").num_bytes
    assert encoded < total - at * 8192 + 20_000
    assert not list(tmp_path.glob(".out.*"))


def interrupted(lines: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Writes one shard and stops; returns the unfinished folder."""
    keep = ShardWriter._keep

    def stop(writer: ShardWriter) -> None:
        keep(writer)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "_keep", stop)
        with pytest.raises(Killed):
            write(lines, ByteTokenizer(), folder)
    (partial,) = folder.parent.glob(f".{folder.name}.*.partial")
    return partial


def test_damaged_shards_are_made_anew(
    lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(lines, ByteTokenizer(), tmp_path / "whole")
    partial = interrupted(lines, tmp_path / "out", monkeypatch)
    shard = partial / "tokens-00000.array_record"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    write(lines, ByteTokenizer(), tmp_path / "out")
    assert "the unfinished shards are damaged, and all are made anew: " in capsys.readouterr().err
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_other_text_begins_anew(lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = interrupted(lines, tmp_path / "out", monkeypatch)
    with lines.open("a") as file:
        file.write(json.dumps({"text": "more"}) + "\n")
    write(lines, ByteTokenizer(), tmp_path / "whole")
    write(lines, ByteTokenizer(), tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    # It may be somebody else's, until it is a day old.
    assert partial.exists()


def test_two_writers_do_not_meet(lines: Path, tmp_path: Path) -> None:
    """The second finds the folder of the first locked, and works in another one."""
    key = "k" * 64
    tokenizer = ByteTokenizer()
    with ShardWriter(tmp_path / "out", tokenizer.vocabulary, key=key) as first:
        with ShardWriter(tmp_path / "out", tokenizer.vocabulary, key=key) as second:
            places = first._place.path, second._place.path
            assert places[0] != places[1]
            for writer in (first, second):
                writer.extend(np.arange(9), num_bytes=9, documents=1)
            second.finish()
        with pytest.raises(InputError, match="exists already"):
            first.finish()
    assert not any(place.exists() for place in places)
    assert set(content(tmp_path / "out")) == {"index.json", "tokens-00000.array_record"}


def test_what_another_machine_gave_up_is_taken_over(
    lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("socket.gethostname", lambda: "other.machine")
        partial = interrupted(lines, tmp_path / "out", monkeypatch)
    assert ".other_machine.partial" in partial.name
    write(lines, ByteTokenizer(), tmp_path / "first")
    with ShardWriter(tmp_path / "out", ByteTokenizer().vocabulary, key=partial.name.split(".")[2] * 4) as writer:
        assert writer.note == ""
    assert partial.exists()
    long_ago = time.time() - shard_progress._ABANDONED_SECONDS - 1
    for path in [*partial.iterdir(), partial]:
        os.utime(path, (long_ago, long_ago))
    capsys.readouterr()
    write(lines, ByteTokenizer(), tmp_path / "out")
    assert "going on behind 1 finished shards" in capsys.readouterr().err
    assert content(tmp_path / "out") == content(tmp_path / "first")
    assert not partial.exists()


def test_a_killed_command_goes_on(lines: Path, tmp_path: Path, tokenizer: JsonTokenizer) -> None:
    """The command itself, killed with -9 while processes work for it."""
    write(lines, tokenizer, tmp_path / "whole", workers=1)
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, sys\n"
        "from mamba_jax.data import prepare\n"
        "from mamba_jax.data.tokenization import stream\n"
        "prepare._BATCH_BYTES, stream._ALONE_BYTES = 10_000, 0\n"
        "last, keep, kept = int(sys.argv.pop()), prepare.ShardWriter._keep, []\n"
        "def keep_and_end(writer):\n"
        "    keep(writer)\n"
        "    kept.append(writer)\n"
        "    if len(kept) == last:\n"
        "        os.kill(os.getpid(), 9)\n"
        "prepare.ShardWriter._keep = keep_and_end\n"
        "prepare.main()\n"
    )
    flags = ["--files", lines, "--output", tmp_path / "out", "--tokenizer", tmp_path / "bpe.json"]
    command = [sys.executable, script, *flags, "--shard-tokens", "8192", "--workers", "2"]
    results = [subprocess.run([*map(str, command), last], capture_output=True, text=True) for last in ("2", "0")]
    assert [result.returncode for result in results] == [-signal.SIGKILL, 0], results[1].stderr
    assert "going on behind 2 finished shards" in results[1].stderr
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def run(path: Path, *flags: str) -> None:
    """The command, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prepare", "--files", str(path), "--output", str(path.parent / "out"), *flags])
        prepare.main()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--workers", "0"], "--workers must be positive, got 0"),
        (["--text-field", "body"], "a.jsonl line 1 has no field 'body', but 'text'"),
        (["--pattern", "*.txt"], "--pattern cannot be given with --files PATH: leave it out"),
    ],
)
def test_mistakes_get_one_line(
    lines: Path, capsys: pytest.CaptureFixture[str], flags: list[str], expected: str
) -> None:
    with pytest.raises(SystemExit):
        run(lines, *flags)
    assert expected in capsys.readouterr().err.splitlines()[-1]
    assert not (lines.parent / "out").exists()


def test_what_is_left_out_is_told(lines: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with lines.open("a") as file:
        file.write("{}\n" + '{"text": "again"}\n' * 2)
    run(lines, "--part", "validation", "--skip-bad", "--deduplicate", "exact")
    shown = capsys.readouterr()
    assert f"{lines}: held out is the end of the file, its last 5 %" in shown.err
    assert f"1 bad records were passed over, the first: {lines} line 151 has no field 'text'" in shown.err
    assert "1 documents that are copies of another were left out" in shown.err
    assert "MB/s" in shown.out
