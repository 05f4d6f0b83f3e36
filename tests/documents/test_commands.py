"""Every command that a document shows is one that its program accepts; no job is done."""

import argparse
import importlib.util
import os
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mamba_jax import cli
from mamba_jax.config import ModelConfig
from mamba_jax.export import initial
from tests.documents.pages import PAGES, ROOT

SCRIPTS = [
    path
    for path in (ROOT / "train.py", ROOT / "eval.py", *sorted(ROOT.glob("benchmarks/*.py")))
    if '__name__ == "__main__"' in path.read_text()
]
MODULES = (
    "mamba_jax.data.prepare",
    "mamba_jax.data.train_tokenizer",
    "mamba_jax.experiments",
    "mamba_jax.export",
    "mamba_jax.report",
    "mamba_jax.serve",
    "mamba_jax.sweep",
)
PROGRAMS = [*(str(path.relative_to(ROOT)) for path in SCRIPTS), *(f"-m {name}" for name in MODULES)]
# The libraries of extras that programs hand over to.
LIBRARIES = {"-m mamba_jax.evaluation.lm_eval": "lm_eval"}
# The texts that a program or a config explains itself with show commands too.
TEXTS = PAGES | {
    str(path.relative_to(ROOT)): path.read_text().split('"""')[1]
    for path in [*SCRIPTS, *sorted(ROOT.glob("configs/**/*.py"))]
}


class Accepted(Exception):
    """The program has read its command line."""


def commands(text: str) -> list[tuple[str, str]]:
    """Program and arguments of every command: `python train.py CONFIG --wait`, or without `python` in code type.

    A command ends where the shell's line, its quotes or the sentence do. A program named in code type and called with
    nothing is asked for its help.
    """
    joined = re.sub(r"\s*\\\n\s*", " ", text)
    known = "|".join(re.escape(program) for program in PROGRAMS)
    word = r" +(?:\"[^\"]*\"|[^\s\"'`>;|&#]+)"
    typed = re.findall(rf"python (-m [\w.]+|[\w./-]+\.py)\b((?:{word})*)(`?)", joined)
    shown = re.findall(rf"`({known})\b((?:{word})*)(`)", joined)
    return [
        (program, "--help" if end and not arguments else arguments.strip(" ,:."))
        for program, arguments, end in typed + shown
    ]


def file_of(program: str) -> Path:
    """The file that a script or `-m module` runs."""
    if not program.startswith("-m "):
        return ROOT / program
    name = program.removeprefix("-m ")
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.submodule_search_locations:
        spec = importlib.util.find_spec(f"{name}.__main__")
    assert spec is not None, f"no module {name}"
    assert spec.origin is not None
    return Path(spec.origin)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, list[str]], None]]:
    """Runs a program in this process until it has read its command line."""

    def stop_after(read: Callable[..., Any]) -> Callable[..., Any]:
        def reading(*args: Any, **options: Any) -> Any:
            read(*args, **options)
            raise Accepted

        return reading

    def run(program: str, arguments: list[str]) -> None:
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        runpy.run_path(str(file_of(program)), run_name="__main__")

    # Of a run that is not there.
    monkeypatch.setattr(initial, "model_for", lambda train: ModelConfig(vocab_size=257, d_model=16, num_layers=2))
    monkeypatch.setattr(cli, "parse", stop_after(cli.parse))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop_after(argparse.ArgumentParser.parse_args))
    monkeypatch.chdir(ROOT)
    # Benchmarks choose a platform before they import JAX, and programs put streams that endure in place of these.
    before = dict(os.environ)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    yield run
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize("name", [name for name, text in TEXTS.items() if commands(text)])
def test_commands(name: str, run: Callable[[str, list[str]], None], capsys: pytest.CaptureFixture[str]) -> None:
    for program, arguments in commands(TEXTS[name]):
        if importlib.util.find_spec(LIBRARIES.get(program, "sys")) is None:
            continue
        words = ["configs/quickstart.py" if word == "CONFIG" else word for word in shlex.split(arguments)]
        with pytest.raises((Accepted, SystemExit)) as stop:
            run(program, words)
        is_answered = isinstance(stop.value, Accepted) or (stop.value.code == 0 and "--help" in words)
        assert is_answered, f"{name}: {program} {arguments}: {capsys.readouterr().err}"


@pytest.mark.parametrize("program", PROGRAMS)
def test_help(program: str, run: Callable[[str, list[str]], None], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(program, ["--help"])
    assert stop.value.code == 0
    assert "usage: " in capsys.readouterr().out


def test_commands_are_found() -> None:
    text = r"""
    host0$ A=1 .venv/bin/python train.py CONFIG --wait > log 2>&1
    ssh --command='exec python eval.py runs/a \
        --prompt "The one; who" # first'
    `eval.py runs/b --seq-len 8`, `train.py` and `python -m mamba_jax.report`.
    """
    assert commands(text) == [
        ("train.py", "CONFIG --wait"),
        ("eval.py", 'runs/a --prompt "The one; who"'),
        ("-m mamba_jax.report", "--help"),
        ("eval.py", "runs/b --seq-len 8"),
        ("train.py", "--help"),
    ]


@pytest.mark.parametrize("program", PROGRAMS)
def test_unknown_flags_are_refused(program: str, run: Callable[[str, list[str]], None]) -> None:
    config = ["configs/quickstart.py"] if program in ("train.py", "-m mamba_jax.sweep") else []
    with pytest.raises(SystemExit) as stop:
        run(program, [*config, "--no-such-flag", "1"])
    assert stop.value.code == 2
