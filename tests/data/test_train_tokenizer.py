"""The command that trains a tokenizer: one of one's own, from a file to a run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mamba_jax.config import TokenizerConfig
from mamba_jax.data import prepare, train_tokenizer
from mamba_jax.data.shards import TokenDataset
from mamba_jax.data.tokenizer import make_tokenizer
from mamba_jax.errors import InputError

TEXT = "the theory of the thing, é 日本 42\n\n\tand the other thing\r\n"


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    records = [{"text": TEXT * 9, "title": f"<|endoftext|> {i}"} for i in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path / "a.jsonl"


def run(path: Path, output: str, *flags: str) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        target = path.parent / output
        patch.setattr(sys, "argv", ["train_tokenizer", "--files", str(path), "--output", str(target), *flags])
        train_tokenizer.main()
    return target


def test_it_fits_the_text_and_is_lossless(lines: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run(lines, "tokenizer.json", "--vocab-size", "280")
    told = capsys.readouterr().out
    assert told.startswith(f"{path}: 280 tokens from {20 * 9 * len(TEXT.encode()):,} bytes of text, ")
    assert told.endswith("a model for it has model.vocab_size 280\n")
    config = TokenizerConfig(kind="hf_json", path=str(path))
    tokenizer = make_tokenizer(config)
    assert (tokenizer.vocab_size, tokenizer.end_of_document, tokenizer.lossy) == (280, 0, None)
    for text in (TEXT, "words that it has never seen: ÄÖ \U0001f600", "<|endoftext|>"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert 0 not in ids
    assert len(tokenizer.encode(TEXT)) < 0.7 * len(TEXT.encode())


def test_it_is_deterministic_and_takes_part_of_the_text(lines: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--vocab-size", "2000", "--template", "{title} {text}"]
    first, again = (run(lines, name, *flags).read_bytes() for name in ("a.json", "b.json"))
    assert "this text gives no more than 3" in capsys.readouterr().err
    assert first == again
    few = run(lines, "c.json", "--vocab-size", "2000", "--max-bytes", "10").read_bytes()
    assert few != first
    assert not (lines.parent / ".a.json").exists()


def test_the_prepare_command_takes_it(lines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = run(lines, "tokenizer.json", "--vocab-size", "280")
    flags = ["--files", str(lines), "--tokenizer", str(path), "--output", str(lines.parent / "shards")]
    monkeypatch.setattr(sys, "argv", ["prepare", *flags])
    prepare.main()
    dataset = TokenDataset(lines.parent / "shards")
    assert (dataset.num_documents, dataset.index.vocab_size) == (20, 280)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--vocab-size", "256"], "--vocab-size must be at least 257, the 256 bytes and '<|endoftext|>', got 256"),
        (["--max-bytes", "0"], "--max-bytes must be positive, got 0"),
        (["--text-field", "body"], "a.jsonl line 1 has no field 'body', but 'text', 'title'"),
        (["--text", "folder"], "give exactly one of --text FOLDER, --files PATH, --tfds NAME and --hf NAME"),
        (["--end-of-document", ""], "--end-of-document must not be empty"),
        (["--output", "SAME"], "exists already: choose another folder or remove it"),
        (["--output", "SAME/below.json"], "cannot write to "),
    ],
)
def test_mistakes_get_one_line(
    lines: Path, capsys: pytest.CaptureFixture[str], flags: list[str], expected: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(lines, "out.json", *(flag.replace("SAME", str(lines)) for flag in flags))
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert expected in error
    assert error.count("\n") == 1
    assert [path.name for path in lines.parent.iterdir()] == ["a.jsonl"]


def test_text_that_does_not_come_back_is_told(lines: Path, tmp_path: Path) -> None:
    path = run(lines, "tokenizer.json", "--vocab-size", "280")
    description = json.loads(path.read_text())
    path.write_text(json.dumps({**description, "normalizer": {"type": "Lowercase"}}))
    with pytest.raises(InputError, match="loses text: 'The thing' does not come back from its ids"):
        train_tokenizer.check_tokenizer(path, ["the", "The thing"], end_of_document="<|endoftext|>")


@pytest.mark.slow
def test_two_commands_lead_from_a_file_to_a_model(lines: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    run(lines, "tokenizer.json", "--vocab-size", "300")
    small = "--model.d-model 16 --model.num-layers 1 --data.seq-len 32 --data.global-batch 8 --train.num-steps 2"
    paths = ["--data.train.path", str(lines), "--data.validation.path", str(lines)]
    command = [sys.executable, root / "train.py", root / "configs" / "own" / "text.py", *paths, *small.split()]
    result = subprocess.run(list(map(str, command)), cwd=lines.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "bits per byte on held-out text" in result.stdout
    assert f"{lines}: held out is the end of the file, its last 5 %" in result.stderr
    stored = json.loads((lines.parent / "runs" / "own_text" / "config.json").read_text())
    assert stored["data"]["train"]["kind"] == "files"
    assert stored["data"]["validation"]["part"] == "validation"
