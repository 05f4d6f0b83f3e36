"""What the store of a run may be like: odd names, links, trouble in reading, saves that go wrong, steps that vanish."""

import contextlib
import errno
import gc
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mamba_jax.checkpoint import (
    Checkpointer,
    SaveFailed,
    arrays,
    check_path,
    damage,
    load_params,
    quarantined,
    stored_run,
)
from mamba_jax.config import CheckpointConfig, MeshConfig
from mamba_jax.errors import InputError
from tests.checkpoint.test_checkpointer import CONFIG, abstract, data_file, mesh_of, random_state, save

MESH = mesh_of(MeshConfig(data=1))


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("twice")
    for step in (3, 7):
        save(run_dir, random_state(MESH, step=step))
    return run_dir


@pytest.fixture
def run_dir(twice: Path, tmp_path: Path) -> Path:
    shutil.copytree(twice / "checkpoints", tmp_path / "checkpoints")
    return tmp_path


def restore(run_dir: Path) -> int | None:
    checkpointer = Checkpointer(run_dir, CONFIG.checkpoint)
    try:
        found = checkpointer.restore_newest(abstract(MESH).items())
    finally:
        checkpointer.close()
    if found is not None:
        jax.tree.map(np.testing.assert_array_equal, found.items, random_state(MESH, step=found.step).items())
    return None if found is None else found.step


NAMES = ["lr=[0.003]", "[", "a*b", "a?b", "{a,b}", "a b", "a%20b#c", "\xe4", "gs", "s3:", "~", "$HOME", "-x", "n" * 255]


@pytest.mark.parametrize("name", NAMES)
def test_path_is_no_pattern(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_path(name)
    params = random_state(MESH, step=7).params
    checkpointer = Checkpointer(name, CONFIG.checkpoint)
    checkpointer.save(7, {"params": params}, CONFIG)
    checkpointer.wait()
    checkpointer.close()
    jax.tree.map(np.testing.assert_array_equal, load_params(name).params, params)
    assert os.listdir(tmp_path / name / "checkpoints") == ["7"]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (os.fsdecode(b"run\xff"), "has bytes that are not UTF-8"),
        ("a\\b", "or a backslash"),
        ("a\nb", "has a line break"),
        ("a\0b", "another control character"),
        ("gs:/bucket", "would be taken for an address"),
        ("/s3/run", "would be taken for an address"),
        ("/".join(["n" * 250] * 16), "is longer than 3840 bytes"),
    ],
)
def test_path_that_cannot_work_is_refused_at_once(name: str, told: str) -> None:
    for call in (check_path, load_params, lambda path: Checkpointer(path, CONFIG.checkpoint)):
        with pytest.raises(InputError, match=told) as error:
            call(name)
        str(error.value).encode("ascii")


def test_odd_names_are_passed_over_and_kept(run_dir: Path) -> None:
    folder = run_dir / "checkpoints"
    for name in (
        "0007",
        "\N{FULLWIDTH DIGIT SEVEN}",
        "12.tmp",
        "lost+found",
        "-9",
        "1e3",
        "99999999999",
        "9 ",
        "tmp.orbax-checkpoint-tmp",
    ):
        (folder / name).mkdir()
    for name in (".nfs000", "8"):
        (folder / name).write_text("")
    (folder / "11").symlink_to("nowhere")
    before = set(os.listdir(folder))
    (folder / "9.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    (folder / "2.removed").mkdir()
    assert restore(run_dir) == 7
    assert load_params(run_dir).step == 7
    assert set(os.listdir(folder)) == before
    checkpointer = Checkpointer(run_dir, CONFIG.checkpoint)
    with pytest.raises(SaveFailed, match="checkpoints/8 already exists"):
        checkpointer.save(8, random_state(MESH, step=8).items(), CONFIG)
    checkpointer.close()
    assert set(os.listdir(folder)) == before


def test_folder_that_is_a_link(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """To another disk, say; while that is not there, the run is not taken for one without checkpoints."""
    disk = tmp_path_factory.mktemp("disk") / "kept"
    (run_dir / "checkpoints").rename(disk)
    (run_dir / "checkpoints").symlink_to(disk)
    assert restore(run_dir) == 7
    (disk / "7").rename(disk / "seven")
    (disk / "7").symlink_to("seven")
    assert restore(run_dir) == 7
    disk.rename(disk.with_name("unmounted"))
    for call in (restore, stored_run):
        with pytest.raises(InputError, match=f"checkpoints, a link to {disk}, cannot be read now"):
            call(run_dir)


def test_damaged_on_another_disk_loses_its_name(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def rename_within(self: Path, target: Path) -> Path:
        if "damaged" in Path(target).parts:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_within)
    data_file(run_dir / "checkpoints" / "7", "params").write_bytes(b"")
    assert quarantined(run_dir) == []
    assert restore(run_dir) == 3
    assert quarantined(run_dir) == [run_dir / "checkpoints" / "7.damaged"]
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only file system")))
    data_file(run_dir / "checkpoints" / "3", "params").write_bytes(b"")
    with pytest.raises(InputError, match=r"checkpoints/3 is damaged .* cannot be moved away \(Read-only file system\)"):
        restore(run_dir)


TENSORSTORE = (
    'UNKNOWN: Error reading "x/0" in OCDBT database at local file "/r/7/params/": Failed to open: "/r/7/params/d/0": '
    "said so [os_error_code='{}'] [tensorstore_spec='{{}}']"
)


@pytest.mark.parametrize("name", sorted(set(errno.errorcode.values())))
def test_only_a_missing_file_is_damage_among_system_errors(name: str) -> None:
    number, missing = getattr(errno, name), ("ENOENT", "ENOTDIR", "EISDIR")
    assert damage.is_damage(OSError(number, os.strerror(number))) == (name in missing)
    assert damage.is_damage(ValueError(TENSORSTORE.format(number))) == (name in missing)


@pytest.mark.parametrize(
    ("error", "is_damage"),
    [
        (ValueError('DATA_LOSS: Error opening "cast" driver: Error decoding manifest: Length in header (114)'), True),
        (ValueError('FAILED_PRECONDITION: Error reading "x/0": Truncated Zstd-compressed stream; at byte 0'), True),
        (ValueError('OUT_OF_RANGE: Error reading "x/0": Requested byte range [0, 9) is not valid for a value'), True),
        (ValueError('NOT_FOUND: Error opening "zarr" driver: Metadata at "x/.zarray" does not exist'), True),
        (ValueError("Expecting value: line 1 column 1 (char 0)"), True),
        (FileNotFoundError("Metadata file (named _METADATA) does not exist"), True),
        (RecursionError("maximum recursion depth exceeded"), True),
        (KeyError("tree_metadata"), True),
        (ValueError("UNAVAILABLE: connection reset"), False),
        (ValueError("DEADLINE_EXCEEDED: too slow"), False),
        (ValueError("RESOURCE_EXHAUSTED: no memory"), False),
        (ValueError("ABORTED: stale"), False),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), False),
        (MemoryError(), False),
        (OSError("no number"), False),
        (RuntimeError("can't start new thread"), False),
    ],
)
def test_what_is_damage(error: Exception, is_damage: bool) -> None:
    assert damage.is_damage(error) == is_damage


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that reads as an input/output error")
@pytest.mark.parametrize("choose", [lambda step: step / "config" / "metadata", lambda step: data_file(step, "params")])
def test_input_output_error_is_no_damage(run_dir: Path, choose: Callable[[Path], Path]) -> None:
    """A process' memory begins with a page that is not there: a real EIO."""
    path = choose(run_dir / "checkpoints" / "7")
    aside = path.rename(run_dir / "aside")
    path.symlink_to("/proc/self/mem")
    for call in (restore, load_params):
        with pytest.raises(InputError, match=r"checkpoints/7 cannot be read now \(.*Input/output error") as error:
            call(run_dir)
        assert "\n" not in str(error.value)
    assert quarantined(run_dir) == []
    aside.replace(path)
    assert restore(run_dir) == 7


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_too_many_open_files_is_no_damage(run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    checkpointer = Checkpointer(run_dir, CONFIG.checkpoint)
    target = abstract(MESH).items()
    checkpointer.restore_newest(target)
    own, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(free := os.dup(0))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        with pytest.raises(InputError, match=r"cannot be read now .*Too many open files"):
            checkpointer.restore_newest(target)
        for spare in (1, 2, 3, 4, 6):
            resource.setrlimit(resource.RLIMIT_NOFILE, (free + spare, hard))
            with contextlib.suppress(InputError):
                checkpointer.restore_newest(target)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (own, hard))
    checkpointer.close()
    # Event loops that Orbax could not open are complained about when they are collected.
    gc.collect()
    assert sorted(os.listdir(run_dir)) == ["checkpoints"]
    assert capfd.readouterr().err == ""


def test_unknown_error_is_no_damage(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("options of Orbax") from ValueError("UNAVAILABLE: connection reset")

    with monkeypatch.context() as patch:
        patch.setattr(ocp.StandardCheckpointHandler, "restore", fail)
        with pytest.raises(InputError, match=r"checkpoints/7 cannot be read now \(.*connection reset\)"):
            restore(run_dir)
    assert restore(run_dir) == 7


def test_step_removed_while_it_is_read(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a run does that goes on: the next newer one is read instead, and nothing is called damaged."""
    read_item = arrays._read_item

    def remove_and_read(folder: Path, *args: Any) -> Any:
        if folder.name == "7":
            save(run_dir, random_state(MESH, step=9))
            shutil.rmtree(folder)
        return read_item(folder, *args)

    monkeypatch.setattr(arrays, "_read_item", remove_and_read)
    loaded = load_params(run_dir)
    assert loaded.step == 9
    jax.tree.map(np.testing.assert_array_equal, loaded.params, random_state(MESH, step=9).params)
    with pytest.raises(InputError, match="has no checkpoint of step 7; there are 3, 9"):
        load_params(run_dir, 7)
    assert restore(run_dir) == 9
    assert quarantined(run_dir) == []


def test_every_step_removed_while_it_is_read(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(folder: Path, *_: Any) -> Any:
        raise damage.CheckpointGone(f"checkpoint {folder} was removed while it was read")

    monkeypatch.setattr(arrays.records, "read", gone)
    with pytest.raises(InputError, match=r"removes its checkpoints before they are read: .*raise checkpoint.keep"):
        load_params(run_dir)
    with pytest.raises(InputError, match=r"checkpoints/7 was removed .*: make sure that every process sees the same"):
        restore(run_dir)


def lose(what: str) -> Callable[[Path, Any], None]:
    """Spoils a step between the last write and its name."""
    check_written = arrays.check_written

    def lose_and_check(folder: Path, record: Any) -> None:
        path = folder / what
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        check_written(folder, record)

    return lose_and_check


@pytest.mark.parametrize("what", ["config", "fingerprints/metadata", "params", "params/manifest.ocdbt", "rest/d"])
def test_save_counts_once_all_of_it_was_listed(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A bad save costs no good one, is told in one line, and the next one works."""
    events: list[tuple[str, int]] = []
    checkpointer = Checkpointer(
        tmp_path, CheckpointConfig(keep=1), on_event=lambda name, **rest: events.append((name, rest["step"]))
    )
    checkpointer.save(1, random_state(MESH, step=1).items(), CONFIG)
    checkpointer.wait()
    with monkeypatch.context() as patch:
        patch.setattr("mamba_jax.checkpoint.checkpointer.check_written", lose(what))
        checkpointer.save(2, random_state(MESH, step=2).items(), CONFIG)
        with pytest.raises(SaveFailed) as error:
            checkpointer.wait()
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path / "checkpoints") == ["1"]
    checkpointer.save(3, random_state(MESH, step=3).items(), CONFIG)
    checkpointer.wait()
    checkpointer.close()
    assert events == [("checkpoint", 1), ("checkpoint", 3)]
    assert os.listdir(tmp_path / "checkpoints") == ["3"]
    assert capfd.readouterr().err == ""


def test_lost_part_of_an_array_is_found(tmp_path: Path) -> None:
    """Orbax reads the rest without complaint until that part is asked for."""
    whole = jax.sharding.NamedSharding(mesh_of(MeshConfig(data=8)), jax.sharding.PartitionSpec("data"))
    checkpointer = Checkpointer(tmp_path, CONFIG.checkpoint)
    checkpointer.save(7, {"params": {"table": jax.device_put(np.zeros((8, 2)), whole)}}, CONFIG)
    checkpointer.close()
    folder = tmp_path / "checkpoints" / "7"
    record = arrays.records.read(folder)
    arrays.check_written(folder, record)
    store = arrays.tensorstore.KvStore.open(
        {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder / 'params'}/"}}
    ).result()
    store.write(b"table/2.0", None).result()
    with pytest.raises(InputError, match="1 of 8 parts of the array params/table are missing"):
        arrays.check_written(folder, record)


def test_what_cannot_be_removed_is_told(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, dict[str, Any]]] = []
    checkpointer = Checkpointer(
        run_dir, CheckpointConfig(keep=1), on_event=lambda name, **rest: events.append((name, rest))
    )
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EBUSY, "Device busy")))
    checkpointer.save(9, random_state(MESH, step=9).items(), CONFIG)
    checkpointer.wait()
    checkpointer.close()
    assert [name for name, _ in events] == ["checkpoint", "not_removed"]
    assert "Device busy" in events[1][1]["reason"]


def test_pipe_blocks_nothing(run_dir: Path) -> None:
    for name in ("params/_METADATA", "config/metadata"):
        path = run_dir / "checkpoints" / "7" / name
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(InputError, match=rf"checkpoints/7 is damaged \({name} is neither a file nor a folder\)"):
            load_params(run_dir)
    assert restore(run_dir) == 3
    assert stored_run(run_dir) is not None
