"""Programs say one clean line or go on, wherever their output leads; config files are run whatever they hold."""

import errno
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mamba_jax.cli import EnduringStream, enduring, one_line_errors, print_result
from mamba_jax.config_files import load_config
from mamba_jax.errors import InputError

ROOT = Path(__file__).parents[1]


class Failing(io.StringIO):
    """A stream that a full disk, a reader that went away or a terminal that hung up is behind."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number), text)

    def flush(self) -> None:
        raise OSError(self.number, os.strerror(self.number))


@pytest.fixture(autouse=True)
def standard_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """What programs put in their place ends with the test."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EBADF], ids=os.strerror)
def test_lost_output_raises_nothing(number: int) -> None:
    stream = enduring(Failing(number))
    assert enduring(stream) is stream
    print("text", file=stream, flush=True)
    assert isinstance(stream.failure, OSError)
    assert stream.failure.errno == number


def test_closed_streams_raise_nothing() -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (EnduringStream(closed), enduring(None)):
        print("text", file=stream, flush=True)


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("ascii", rb"\xe9\ufffd\udcff"),
        ("latin-1", b"\xe9" rb"\ufffd\udcff"),
        ("utf-8", "é\ufffd".encode() + rb"\udcff"),
    ],
)
def test_characters_that_an_encoding_lacks(encoding: str, expected: bytes) -> None:
    raw = io.BytesIO()
    wrapped = io.TextIOWrapper(raw, encoding=encoding)
    print("é\ufffd\udcff", file=EnduringStream(wrapped), flush=True, end="")
    assert raw.getvalue() == expected


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("one\ntwo\r\n\n\x0bthree\u2028", "one two three"),
        ("\x1b[31mred\x07 \x00", r"\x1b[31mred\x07 \x00"),
        ("a\udcffb \u202e \x9b1m", r"a\udcffb \u202e \x9b1m"),
        ("état 'x' ✓", "état 'x' ✓"),
    ],
)
def test_error_lines_are_clean(capsys: pytest.CaptureFixture[str], message: str, line: str) -> None:
    with pytest.raises(SystemExit) as stop, one_line_errors():
        raise InputError(message)
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {line}\n"


def test_long_lines_keep_both_ends() -> None:
    line = str(InputError("begin " + "x" * 10**6 + " end"))
    assert len(line) < 5000
    assert line.startswith("begin")
    assert line.endswith("end")


def test_results_that_cannot_be_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are what the program was called for; whoever closes a pipe has had enough of them."""
    monkeypatch.setattr("sys.stdout", enduring(Failing(errno.EPIPE)))
    print_result("text")
    monkeypatch.setattr("sys.stdout", enduring(Failing(errno.ENOSPC)))
    with pytest.raises(InputError, match=r"cannot write the result to standard output \(No space left"):
        print_result("text")


LOST_OUTPUT = """
import os, sys
closed = [int(number) for number in sys.argv[1].split()]
for number in closed:
    os.close(number)
sys.stdout = None if 1 in closed else sys.stdout
from mamba_jax.cli import one_line_errors
from mamba_jax.errors import InputError
with one_line_errors():
    with open(sys.argv[2], "w") as file:
        assert file.fileno() > 2
        for number in closed:
            os.write(number, b"what compilers and watchdogs say")
    print("text")
    print("text", file=sys.stderr)
    if len(sys.argv) > 3:
        raise InputError("wrong")
"""


@pytest.mark.parametrize("lost", ["1", "0 1 2", "pipe"])
def test_exit_status_without_output(tmp_path: Path, lost: str) -> None:
    """Nothing reaches the file that is opened first, which would get the number of a closed stream."""
    arguments = [tmp_path / "file", *(["wrong"] if lost == "0 1 2" else [])]
    command = [sys.executable, "-c", LOST_OUTPUT, lost.replace("pipe", ""), *map(str, arguments)]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=writer, check=False)
    os.close(writer)
    assert done.returncode == (2 if lost == "0 1 2" else 0)
    assert (tmp_path / "file").read_text() == ""


CONFIG = """
from __future__ import annotations
import dataclasses
from typing import ClassVar
from mamba_jax.config import *

@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    kind: ClassVar[str] = "size"
    width: int = {width}

@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnTrain(TrainConfig):
    extra: int = 3

def get_config():
    import sys
    assert __file__ == sys.modules[__name__].__file__
    print("preparing")
    return ExperimentConfig(
        name="own",
        model=ModelConfig(vocab_size=257, d_model=Size().width, num_layers=1),
        data=DataConfig(train=TextFolderSource(path="x"), seq_len=8, global_batch=2),
        optimizer=OptimizerConfig(peak_lr=1e-3),
        train=OwnTrain(num_steps=4, run_dir="run"),
    )
"""


def test_config_with_dataclasses_of_its_own(tmp_path: Path) -> None:
    """Their annotations are texts, which are looked up in the module; nothing is left of it, or beside the file."""
    path = tmp_path / "a b\n\udcff.py"
    modules = set(sys.modules)
    for width in (16, 32):
        path.write_text(CONFIG.format(width=width))
        assert load_config(str(path), ["--train.num-steps", "7"]).model.d_model == width
    assert "mamba_jax_run_config" not in set(sys.modules) - modules
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "defines no get_config()"),
        ("raise KeyboardInterrupt\n", "line 1: KeyboardInterrupt"),
        ("class Odd(BaseException): pass\nraise Odd('x')\n", "line 2: Odd: x"),
        ("class Odd(Exception):\n  def __str__(self): return 1 / 0\nraise Odd\n", "line 3: Odd: (it has no text)"),
        ("raise ValueError('\\x1b[31m\\udcff')\n", r"ValueError: \x1b[31m\udcff"),
        ("def get_config(n): return get_config(n)\nget_config(1)\n", "RecursionError"),
        ("x = " + "(" * 5000 + ")" * 5000 + "\n", "cannot be run"),
        ("x = " + "-" * 200_000 + "1\n", "cannot be run"),
        ("# coding: none-such\n", "SyntaxError"),
        ("import sys\nsys.exit(0)\n", "SystemExit: 0"),
        ("import sys\ndel sys.modules[__name__]\nraise OSError\n", "line 3: OSError"),
    ],
    ids=lambda text: text[:30],
)
def test_config_files_that_end_badly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, expected: str
) -> None:
    path = tmp_path / "broken\n\x1b.py"
    path.write_text(text)
    with pytest.raises(SystemExit) as stop, one_line_errors():
        load_config(str(path), [])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: config '")
    assert expected in error
    assert error.count("\n") == 1
    assert error.rstrip("\n").isprintable()
    assert "mamba_jax_run_config" not in sys.modules


@pytest.mark.parametrize(
    ("name", "make", "expected"),
    [
        ("folder.py", Path.mkdir, "no config file .*, but something else of this name"),
        ("pipe.py", os.mkfifo, "no config file .*, but something else of this name"),
        ("link.py", lambda path: path.symlink_to("nowhere"), "no config file"),
        ("config.pyc", Path.touch, r"must end in \.py"),
        ("config", Path.touch, r"must end in \.py"),
        ("x" * 300 + ".py", None, "cannot be read .File name too long"),
    ],
)
def test_config_files_that_are_none(
    tmp_path: Path, name: str, make: Callable[[Path], None] | None, expected: str
) -> None:
    if make is not None:
        make(tmp_path / name)
    with pytest.raises(InputError, match=expected):
        load_config(str(tmp_path / name), [])


@pytest.mark.parametrize("flag", ["", "\n", "--\udcff", "--name", "9" * 5000, "--train.num-steps=" + "9" * 5000])
def test_odd_flags_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str) -> None:
    path = tmp_path / "config.py"
    path.write_text(CONFIG.format(width=16))
    with pytest.raises(SystemExit, match="2"), one_line_errors():
        load_config(str(path), [flag])
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.rstrip("\n").isprintable()
