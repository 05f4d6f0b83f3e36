"""Checkpoints of two processes, and of a process whose disk is full."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoint.test_checkpointer import DAMAGES, flip_all
from tests.multiprocess.harness import Launcher

TWO_PROCESSES = """
import errno, shutil, sys
from pathlib import Path
from mamba_jax import distributed
distributed.initialize()
import jax
import numpy as np
from jax.experimental import multihost_utils
from mamba_jax.checkpoint import Checkpointer, record
from mamba_jax.errors import InputError
from tests.checkpoint.test_checkpointer import CONFIG, MeshConfig, abstract, make_mesh, random_state
from tests.checkpoint.test_processes import DAMAGES, DAMAGES_OF_ONE
mesh, root, index = make_mesh(MeshConfig(data=1, fsdp=8), jax.devices()), Path(sys.argv[1]), jax.process_index()
checkpointer = Checkpointer(root / "saved", CONFIG.checkpoint)
for step in (3, 7):
    checkpointer.save(step, random_state(mesh, step=step).items(), CONFIG)
checkpointer.wait()
checkpointer.close()
expected = random_state(mesh, step=3).items()
for number, (name, damage) in enumerate(DAMAGES_OF_ONE.items()):
    run = root / str(number)
    if index == 0:
        shutil.copytree(root / "saved", run)
        damage(run / "checkpoints" / "7")
    multihost_utils.sync_global_devices(name)
    events = []
    checkpointer = Checkpointer(run, CONFIG.checkpoint, on_event=lambda *_, **fields: events.append(fields))
    found = checkpointer.restore_newest(abstract(mesh).items())
    checkpointer.close()
    assert found.step == 3, (name, found.step)
    for leaf, wanted in zip(jax.tree.leaves(found.items), jax.tree.leaves(expected), strict=True):
        for shard, other in zip(leaf.addressable_shards, wanted.addressable_shards, strict=True):
            np.testing.assert_array_equal(shard.data, other.data, err_msg=name)
    assert (run / "damaged" / "7").is_dir() and not (run / "checkpoints" / "7").exists(), name
    print("fell back:", name, events, flush=True)
def refusal(name, identity=None):
    checkpointer = Checkpointer(root / name, CONFIG.checkpoint, identity=identity)
    try:
        checkpointer.restore_newest(abstract(mesh).items())
    except InputError as error:
        print("refused:", error, flush=True)
    checkpointer.close()
refusal("saved", identity={"run": str(index)})
if index == 0:
    DAMAGES["config garbled"](root / "saved" / "checkpoints" / "7")
multihost_utils.sync_global_devices("garbled")
def trouble(folder):
    raise OSError(errno.EIO, "Input/output error")
if index == 1:
    record.check_files = trouble
refusal("saved")
assert sorted(path.name for path in (root / "saved" / "checkpoints").iterdir()) == ["3", "7"]
"""

# What a process of two saved under `fsdp` is read by that process alone when two go on.
DAMAGES_OF_ONE: dict[str, Callable[[Path], object]] = {
    f"{name} {process}": lambda step, change=change, process=process: [
        change(step / item / f"ocdbt.process_{process}") for item in ("params", "rest")
    ]
    for process in (0, 1)
    for name, change in {"folder missing": shutil.rmtree, "bits flipped": lambda folder: flip_all(folder / "d")}.items()
} | {name: DAMAGES[name] for name in ("empty step", "config garbled", "rest missing")}


def test_two_processes_fall_back_together(tmp_path: Path) -> None:
    """Also where one of them finds nothing wrong with its part; both tell what the other found.

    Where one finds damage and the other cannot read, nothing is moved.
    """
    launcher = Launcher(tmp_path, tmp_path / "programs")
    ended = launcher.run([["-c", TWO_PROCESSES, str(tmp_path)]] * 2, timeout=120)
    assert ended.statuses == (0, 0), ended.logs
    reports = [[line for line in log.splitlines() if line.startswith("fell back:")] for log in ended.logs]
    assert reports[0] == reports[1]
    assert len(reports[0]) == len(DAMAGES_OF_ONE)
    assert all("is damaged (" in report for report in reports[0])
    first, second = ([line for line in log.splitlines() if line.startswith("refused:")] for log in ended.logs)
    assert first == second
    assert re.findall("is of another run|cannot be read now", "\n".join(first)) == [
        "is of another run",
        "cannot be read now",
    ]


ONE_FAILS = """
import resource, signal, sys
from pathlib import Path
from mamba_jax import distributed
distributed.initialize()
import jax
from mamba_jax.checkpoint import checkpointer as checkpoint
from tests.checkpoint.test_checkpointer import CONFIG, MeshConfig, abstract, make_mesh, random_state
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
checkpoint._DEADLINE_SECONDS = 10
mesh, folder, index = make_mesh(MeshConfig(data=1, fsdp=8), jax.devices()), Path(sys.argv[1]), jax.process_index()
checkpointer = checkpoint.Checkpointer(folder, CONFIG.checkpoint)
checkpointer.save(1, random_state(mesh, step=1).items(), CONFIG)
checkpointer.wait()
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
if index == 1:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
reason = None
try:
    checkpointer.save(2, random_state(mesh, step=2).items(), CONFIG)
    checkpointer.wait()
except checkpoint.SaveFailed as error:
    reason = str(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
assert checkpointer.restore_newest(abstract(mesh).items()).step == 1
checkpointer.save(3, random_state(mesh, step=3).items(), CONFIG)
checkpointer.wait()
assert checkpointer.restore_newest(abstract(mesh).items()).step == 3
checkpointer.close()
print("save failed:", reason, flush=True)
"""


@pytest.mark.slow
def test_save_that_fails_in_one_process_fails_in_both(tmp_path: Path) -> None:
    """The other waits until a deadline, here of 10 s; then both know why, and go on together."""
    folder = tmp_path / "logs"
    folder.mkdir()
    ended = Launcher(folder, tmp_path / "programs").run([["-c", ONE_FAILS, str(tmp_path / "run")]] * 2, timeout=150)
    assert ended.statuses == (0, 0), ended.logs
    # The limit has cut a line of the second one's log, so that this one may not start a line.
    first, second = (re.findall("save failed: .*", log) for log in ended.logs)
    assert first == second
    assert len(first) == 1
    assert "File too large" in first[0]
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["1", "3"]


FULL_DISK = """
import os, resource, signal, sys
from pathlib import Path
from mamba_jax.checkpoint import Checkpointer, SaveFailed
from tests.checkpoint.test_checkpointer import CONFIG, MeshConfig, abstract, mesh_of, random_state
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder, free = Path(sys.argv[1]), sys.argv[2]
mesh, ballast = mesh_of(MeshConfig(data=1)), folder / "ballast"
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
def fill():
    if free == "limit":
        return resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    disk = os.statvfs(folder)
    ballast.write_bytes(bytes(disk.f_bavail * disk.f_frsize - int(free)))
def make_room():
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    ballast.unlink(missing_ok=True)
checkpointer = Checkpointer(folder, CONFIG.checkpoint)
checkpointer.save(1, random_state(mesh, step=1).items(), CONFIG)
checkpointer.wait()
fill()
for step in (2, 3):
    try:
        checkpointer.save(step, random_state(mesh, step=step).items(), CONFIG)
        checkpointer.wait()
    except SaveFailed as error:
        assert "\\n" not in str(error)
        assert free == "limit" or "No space left on device" in str(error), error
    else:
        raise AssertionError("the save did not fail")
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["1"], names
make_room()
assert checkpointer.restore_newest(abstract(mesh).items()).step == 1
checkpointer.save(4, random_state(mesh, step=4).items(), CONFIG)
checkpointer.wait()
checkpointer.close()
assert Checkpointer(folder, CONFIG.checkpoint).restore_newest(abstract(mesh).items()).step == 4
"""
MOUNTED = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=2m tmpfs "$0" && exec "$@"']


def run_on_full_disk(command: list[str], folder: Path, free: str) -> None:
    done = subprocess.run(
        [*command, sys.executable, "-c", FULL_DISK, str(folder), free],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_save_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk: writing fails in the middle of the arrays."""
    run_on_full_disk([], tmp_path, "limit")


@pytest.mark.parametrize("free", ["0", "30000"])
def test_full_disk(tmp_path: Path, free: str) -> None:
    """A file system of 2 MB, with no room at all or with some for the first files of a step."""
    command = [*MOUNTED, str(tmp_path)]
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this system lets no user mount a file system of their own")
    run_on_full_disk(command, tmp_path, free)
