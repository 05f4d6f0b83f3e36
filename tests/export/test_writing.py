"""An export appears whole or not at all, wherever it is written to."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import jax
import numpy as np
import pytest
import safetensors.numpy

from mamba_jax.errors import InputError
from mamba_jax.export import huggingface
from mamba_jax.export.huggingface import LoadedModel

GOLDEN = Path("tests/golden/mamba1_tiny").absolute()
NAMES = {"config.json", "model.safetensors", "tokenizer.json"}


@pytest.fixture(scope="module")
def golden() -> LoadedModel:
    return huggingface.load(GOLDEN)


def save(path: Path, golden: LoadedModel) -> None:
    companions = {"tokenizer.json": b"{}"}
    huggingface.save(path, golden.config, golden.params, layout="hf", extra=golden.extra, companions=companions)


def no_room(*_: object, **__: object) -> NoReturn:
    raise OSError(errno.ENOSPC, "No space left on device")


def read_only(*_: object, **__: object) -> NoReturn:
    raise OSError(errno.EROFS, "Read-only file system")


def no_room_for_weights(*_: object, **__: object) -> NoReturn:
    raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    "place", ["new", "new/below", "empty", "link", ".", os.fsdecode(b"line\nbreak \xff"), 255 * "x"]
)
def test_all_files_are_there(golden: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    (tmp_path / "empty").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("empty")
    monkeypatch.chdir(tmp_path / "empty" if place == "." else tmp_path)
    save(Path(place), golden)
    assert {path.name for path in Path(place).iterdir()} == NAMES
    loaded = huggingface.load(Path(place))
    jax.tree.map(np.testing.assert_array_equal, loaded.params, golden.params)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "empty").stat().st_mode & 0o777 == 0o700
    assert not list(tmp_path.rglob(".export*"))
    assert len({path.stat().st_mode for path in Path(place).iterdir()}) == 1


@pytest.mark.parametrize(
    ("owner", "name", "fault"),
    [
        (safetensors.numpy, "save_file", no_room_for_weights),
        (safetensors.numpy, "save_file", no_room),
        (Path, "write_bytes", no_room),
        (Path, "mkdir", read_only),
        (Path, "rename", no_room),
    ],
)
@pytest.mark.parametrize("place", ["new", "empty"])
def test_nothing_is_left_where_something_fails(
    golden: LoadedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: object,
    name: str,
    fault: Callable[..., NoReturn],
    place: str,
) -> None:
    (tmp_path / "empty").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fault)
        with pytest.raises(InputError, match=r"cannot write .*(No space left|Read-only).*: make room there") as error:
            save(tmp_path / place, golden)
    assert str(error.value).isprintable()
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]
    save(tmp_path / place, golden)


def test_files_moved_into_a_folder_go_back_if_one_cannot(
    golden: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """config.json is the last, so that nobody takes what is there before it for a model."""
    moved = []

    def rename(self: Path, target: Path) -> None:
        moved.append(self.name)
        if self.name == "config.json":
            no_room()
        os.rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(InputError, match="No space left on device"):
            save(tmp_path, golden)
    assert set(moved) == NAMES
    assert moved[-1] == "config.json"
    assert not list(tmp_path.iterdir())


def test_a_config_that_cannot_be_written_is_one_line(golden: LoadedModel, tmp_path: Path) -> None:
    deep: list[object] = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(InputError, match=r"a value is nested too deeply among \['deep'\]"):
        huggingface.save(tmp_path / "out", golden.config, golden.params, layout="hf", extra={"deep": deep})
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_nothing(golden: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupt)
    for place in (tmp_path, tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt):
            save(place, golden)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("file", "file exists and is not an empty folder"),
        ("file/below", "cannot write .*file/below"),
        ("full", "full exists and is not an empty folder"),
        ("nowhere", "nowhere is a link to /nowhere/x, which does not exist"),
        ("pipe", "pipe exists and is not an empty folder"),
        ("loop", "loop is a link to .*loop, which does not exist"),
        (300 * "x", "File name too long"),
        ("zero\0byte", "zero.*byte"),
    ],
)
def test_what_is_there_stays(golden: LoadedModel, tmp_path: Path, place: str, message: str) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full" / "hidden").mkdir(parents=True)
    (tmp_path / "nowhere").symlink_to("/nowhere/x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(InputError, match=message) as error:
        save(tmp_path / place, golden)
    assert str(error.value).isprintable()
    assert {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")} == before
