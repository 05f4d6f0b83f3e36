"""The prepare command: from text to shards in one call, and one line for every mistake."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

from mamba_jax.config import TextFolderSource
from mamba_jax.data import prepare
from mamba_jax.data.shards import TokenDataset
from mamba_jax.data.sources import text_folder
from tests.data.test_tokenizer import train_bpe


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text").mkdir()
    for name in "abc":
        (tmp_path / "text" / f"{name}.txt").write_text(f"the thing {name} of the theory\n" * 40)
    return tmp_path / "text"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare", *arguments])
    prepare.main()


def test_bytes(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "--text", str(text), "--output", str(tmp_path / "out"))
    num_bytes = sum(path.stat().st_size for path in text.iterdir())
    dataset = TokenDataset(tmp_path / "out")
    assert (dataset.num_documents, dataset.num_bytes, dataset.num_tokens) == (3, num_bytes, num_bytes + 3)
    captured = capsys.readouterr()
    assert f"3 documents, {num_bytes:,} bytes of text, {num_bytes + 3:,} tokens" in captured.out
    assert f"{num_bytes} bytes" in captured.err


@pytest.mark.parametrize("piece_bytes", [64, 2**20])
def test_bpe_of_pieces_equals_bpe_of_documents(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    """Lines end outside of every token of this tokenizer, so pieces must not change a single id."""
    monkeypatch.setattr(text_folder, "PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(prepare, "_BATCH_BYTES", 100)
    config = train_bpe(tmp_path / "bpe.json")
    run(monkeypatch, "--text", str(text), "--output", str(tmp_path / "out"), "--tokenizer", str(config.path))
    dataset = TokenDataset(tmp_path / "out")
    tokenizer = prepare.make_tokenizer(config)
    expected = []
    for path in sorted(text.iterdir()):
        expected += [*tokenizer.encode(path.read_text()).tolist(), tokenizer.end_of_document]
    stream = dataset.read(np.array([0]), length=dataset.num_tokens)[0]
    assert stream.tolist() == expected
    assert dataset.num_tokens < dataset.num_bytes


@pytest.mark.parametrize(
    ("pre_tokenizer", "normalizer"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=True), None),
        (pre_tokenizers.Metaspace(prepend_scheme="always"), None),
        (pre_tokenizers.Metaspace(prepend_scheme="first"), normalizers.NFKC()),
        (
            pre_tokenizers.Split("▁", behavior="merged_with_next"),
            normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        ),
    ],
)
def test_a_tokenizer_that_adds_a_space_adds_one_a_document(
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pre_tokenizer: pre_tokenizers.PreTokenizer,
    normalizer: normalizers.Normalizer | None,
) -> None:
    monkeypatch.setattr(text_folder, "PIECE_BYTES", 100)
    (text / "d.txt").write_text("\n\n".join("  the thing of the theory and the other thing" for _ in range(40)))
    (text / "e.txt").write_text("the thing of the theory and the other thing\r\n" * 40)
    pieces = list(TextFolderSource(path=str(text)).open().pieces())
    assert sum(piece.continues for piece in pieces) > 50
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.train_from_iterator(["  the theory of the thing\n\n and the \r\nother thing"] * 9, trainer)
    tokenizer.save(str(tmp_path / "prefix.json"))
    flags = {"text": text, "output": tmp_path / "out", "tokenizer": tmp_path / "prefix.json"}
    run(monkeypatch, *[f"--{name}={path}" for name, path in flags.items()])
    dataset = TokenDataset(tmp_path / "out")
    paths = sorted(text.iterdir())
    expected = []
    for path in paths:
        expected += [*tokenizer.encode(path.read_bytes().decode()).ids, 0]
    assert dataset.read(np.array([0]), length=dataset.num_tokens)[0].tolist() == expected
    assert dataset.num_bytes == sum(path.stat().st_size for path in paths)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--text", "TEXT"], "missing --output"),
        (["--output", "OUT"], "give exactly one of --text FOLDER, --files PATH, --tfds NAME and --hf NAME"),
        (
            ["--output", "OUT", "--text", "TEXT", "--tfds", "lm1b"],
            "give exactly one of --text FOLDER, --files PATH, --tfds NAME and --hf NAME",
        ),
        (["--output", "OUT", "--tfds", "lm1b"], "--tfds NAME needs --split"),
        (
            ["--output", "OUT", "--text", "TEXT", "--split", "train"],
            "--split cannot be given with --text FOLDER: leave it out",
        ),
        (["--output", "OUT", "--text", "TEXT", "--patern", "*"], "did you mean --pattern"),
        (["--output", "TEXT", "--text", "TEXT"], "exists already"),
        (
            ["--output", "OUT", "--text", "TEXT", "--shard-tokens", "0"],
            "must be positive and at most 4294967296, got 0",
        ),
        (
            ["--output", "OUT", "--text", "TEXT", "--shard-tokens", str(2**70)],
            "at most 4294967296, got 118059162071741",
        ),
        (["--output", "OUT", "--text", "TEXT", "--validation-fraction", "2"], "must lie in [0, 1]"),
        (["--output", "OUT", "--text", "TEXT/a.txt"], "no text folder"),
        (["--output", "TEXT/a.txt/OUT", "--text", "TEXT"], "cannot create token shards"),
        (["--output", "OUT", "--text", "TEXT", "--tokenizer", "TEXT/a.txt"], "is not a tokenizer"),
    ],
)
def test_mistakes_get_one_line_and_exit_status_2(
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    expected: str,
) -> None:
    before = sorted(tmp_path.rglob("*"))
    arguments = [a.replace("TEXT", str(text)).replace("OUT", str(tmp_path / "out")) for a in arguments]
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("error: ")
    assert expected in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_killed_command_leaves_no_folder_that_looks_complete(text: Path, tmp_path: Path) -> None:
    program = (
        "import os, sys; from mamba_jax.data import prepare\n"
        "prepare.ShardWriter.finish = lambda self: (self._flush(last=True), os._exit(9))\n"
        f"sys.argv = ['prepare', '--text', {str(text)!r}, '--output', {str(tmp_path / 'out')!r}]\n"
        "prepare.main()\n"
    )
    assert subprocess.run([sys.executable, "-c", program], stderr=subprocess.DEVNULL).returncode == 9
    assert not (tmp_path / "out").exists()
    (partial,) = tmp_path.glob(".out.*.partial")
    assert not (partial / "index.json").exists()


def test_index_describes_every_file(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, "--text", str(text), "--output", str(tmp_path / "out"))
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert {shard["file"] for shard in index["shards"]} == {
        path.name for path in (tmp_path / "out").iterdir() if path.name != "index.json"
    }
    for shard in index["shards"]:
        data = (tmp_path / "out" / shard["file"]).read_bytes()
        assert (shard["size"], shard["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        dataset = TokenDataset(tmp_path / "out")
        ids = dataset.read(np.array([0]), length=dataset.num_tokens)[0].astype("<u2")
        # One block, so one digest.
        assert len(ids) < 4096
        assert shard["digests"] == hashlib.sha256(hashlib.sha256(ids).digest()[:16]).hexdigest()


@pytest.mark.parametrize("terminal", [True, False])
def test_progress(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("TTY_COMPATIBLE", "1" if terminal else "0")
    monkeypatch.setattr(prepare, "_PLAIN_SECONDS", 0.0)
    run(monkeypatch, "--text", str(text), "--output", str(tmp_path / "out"))
    shown = capsys.readouterr().err
    assert "tokenising" in shown
    assert ("\x1b[" in shown) == terminal
    assert ("100% of" in shown) != terminal
