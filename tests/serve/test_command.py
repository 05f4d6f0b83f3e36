"""The program that serves, and what it says to bad input: one line, and status 2."""

import sys
from pathlib import Path

import pytest

import mamba_jax.serve
from mamba_jax.serve import __main__ as program
from mamba_jax.serve.server import bind
from tests.evaluation.conftest import SavedRun


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The line that a program prints which is not to start."""
    monkeypatch.setattr("sys.argv", ["serve", *arguments])
    with pytest.raises(SystemExit) as stop:
        program.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "missing"),
        (("not/there", "--port", "0"), "not/there"),
        (("x", "--port", "70000"), "--port must lie in 0 .. 65535, got 70000"),
        (("x", "--port", "-1"), "--port must lie in 0 .. 65535, got -1"),
        (("x", "--host", "not a host"), "cannot serve at not a host port 8000"),
        (("x", "--host", "192.0.2.1"), "choose another --host or --port"),
        (("x", "--timeout", "0"), "timeout must be a positive number of seconds, got 0"),
        (("x", "--grace", "nan"), "grace must be 0 or more, and finite, got nan"),
        (("x", "--max-queue", "-1"), "max_queue must be 0 or more, and finite, got -1"),
        (("x", "--row", "3"), "did you mean --rows?"),
    ],
)
def test_bad_input_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert message in run(monkeypatch, capsys, *arguments)


def test_a_port_that_is_taken_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with bind("127.0.0.1", 0) as other:
        other.listen()
        port = str(other.getsockname()[1])
        assert "Address already in use" in run(monkeypatch, capsys, "x", "--port", port)


def test_a_port_that_is_taken_later_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], saved_run: SavedRun
) -> None:
    with bind("127.0.0.1", 0) as other:
        port = str(other.getsockname()[1])
        monkeypatch.setattr(program, "warm_up", lambda engine, longest: other.listen())
        assert "Address already in use" in run(
            monkeypatch, capsys, str(saved_run.folder), "--port", port, "--rows", "4"
        )


def test_a_key_must_not_be_empty(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MAMBA_JAX_API_KEY", "")
    assert "MAMBA_JAX_API_KEY is empty" in run(monkeypatch, capsys, "x", "--port", "0")


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_without_the_extra_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], package: str
) -> None:
    names = [path.stem for path in Path(mamba_jax.serve.__path__[0]).glob("*.py")]
    for name in (f"mamba_jax.serve.{name}" for name in names if name != "__main__"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr(mamba_jax.serve, "server", raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    line = run(monkeypatch, capsys, "x")
    assert line == f"error: a server needs the package {package}: pip install 'mamba-jax[serve]'\n"
