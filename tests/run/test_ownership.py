"""One job owns a run: another is refused or waits, and a crashed owner is none."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from mamba_jax.errors import InputError
from mamba_jax.run import ownership
from mamba_jax.run.ownership import LOCK, OWNER, owned

HOLDER = """
import sys, time
from pathlib import Path
from mamba_jax.run.ownership import owned
with owned(Path(sys.argv[1]), wait=False):
    (Path(sys.argv[1]) / "kept").touch()
    print("owner", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that owns `tmp_path / "run"` until it reads a line."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "owner\n"
        yield process
        process.kill()


def test_second_is_refused_or_waits_until_the_first_is_killed(
    tmp_path: Path,
    holder: subprocess.Popen[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A lock is gone with its process, whatever that has left behind."""
    monkeypatch.setattr(ownership, "_POLL_SECONDS", 0.05)
    run_dir = tmp_path / "run"
    with pytest.raises(InputError) as error, owned(run_dir, wait=False):
        pass
    message = str(error.value)
    assert f"is being trained by process {holder.pid} on {socket.gethostname()} since 20" in message
    assert "--wait" in message
    assert "\n" not in message
    timer = threading.Timer(0.3, holder.kill)
    timer.start()
    with owned(run_dir, wait=True):
        assert holder.wait() == -signal.SIGKILL
        assert json.loads((run_dir / OWNER).read_text())["process"] == os.getpid()
    assert {path.name for path in run_dir.iterdir()} == {LOCK, "kept"}
    assert capsys.readouterr().out.count(f"waiting for process {holder.pid} on ") == 1


LOCKING = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"


def test_same_process_is_refused_and_its_lock_stays(tmp_path: Path) -> None:
    def can_be_locked_elsewhere() -> bool:
        command = [sys.executable, "-c", LOCKING, str(tmp_path / LOCK)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    with owned(tmp_path, wait=False):
        for _ in range(2):
            with pytest.raises(InputError, match="this very process"), owned(tmp_path, wait=False):
                pass
        (tmp_path / "kept").touch()
        assert not can_be_locked_elsewhere()
    assert can_be_locked_elsewhere()


def test_folder_made_in_vain_is_removed(tmp_path: Path) -> None:
    with owned(tmp_path / "a" / "b", wait=False):
        assert (tmp_path / "a" / "b" / OWNER).is_file()
    assert not list(tmp_path.iterdir())


def test_waiting_for_a_folder_that_its_owner_removes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock of a removed file keeps nobody away, so it does not count."""
    run_dir, lockf, removed = tmp_path / "run", fcntl.lockf, []

    def remove_once(*args: int) -> None:
        lockf(*args)
        if not removed:
            removed.append(True)
            (run_dir / LOCK).unlink()

    monkeypatch.setattr(fcntl, "lockf", remove_once)
    with owned(run_dir, wait=False):
        assert removed
        assert (run_dir / LOCK).is_file()


def no_locks(*_: object) -> NoReturn:
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks, in a world that is forty times faster."""
    monkeypatch.setattr(fcntl, "lockf", no_locks)
    for name, seconds in {"_POLL_SECONDS": 0.05, "_BEAT_SECONDS": 0.1, "_STALE_SECONDS": 0.8}.items():
        monkeypatch.setattr(ownership, name, seconds)


@pytest.mark.usefixtures("without_locks")
def test_heartbeat_stands_in_for_a_lock(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with owned(tmp_path, wait=False):
            start = time.monotonic()
            with pytest.raises(InputError, match="is being trained by process"):
                owned(tmp_path, wait=False).__enter__()
            assert time.monotonic() - start < 0.8
    assert "without locks (No locks available)" in str(caught[0].message)
    assert "keeps its folder for 0.8 s" in str(caught[0].message)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("without_locks")
@pytest.mark.filterwarnings("ignore:.*without locks")
def test_owner_without_a_heartbeat_is_gone(tmp_path: Path) -> None:
    (tmp_path / OWNER).write_text('{"host": "elsewhere", "process": 7, "since": "long ago"}')
    start = time.monotonic()
    with owned(tmp_path, wait=False):
        assert time.monotonic() - start > 0.8
        assert json.loads((tmp_path / OWNER).read_text())["host"] == socket.gethostname()
