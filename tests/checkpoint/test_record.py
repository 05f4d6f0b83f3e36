"""What a checkpoint says about itself, compared when it is read: step, run, config."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mamba_jax.checkpoint import Checkpointer, load_params, quarantined, stored_run
from mamba_jax.config import MeshConfig
from mamba_jax.errors import InputError
from tests.checkpoint.test_checkpointer import CONFIG, abstract, mesh_of, random_state

IDENTITY = {"run": "0a1b", "data": {"train": {"documents": 20, "sha256": "77f0"}, "tokenizer": "byte"}}
MESH = mesh_of(MeshConfig(data=1))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with checkpoints of steps 3 and 7 that record a run."""
    run_dir = tmp_path_factory.mktemp("run")
    checkpointer = Checkpointer(run_dir, CONFIG.checkpoint, identity=IDENTITY)
    for step in (3, 7):
        checkpointer.save(step, random_state(MESH, step=step).items(), CONFIG)
    checkpointer.close()
    return run_dir


@pytest.fixture
def run_dir(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved / "checkpoints", tmp_path / "checkpoints")
    return tmp_path


def restore(run_dir: Path, identity: dict[str, Any] | None = IDENTITY) -> int | None:
    """The step that a start with this identity goes on from."""
    checkpointer = Checkpointer(run_dir, CONFIG.checkpoint, identity=identity)
    try:
        found = checkpointer.restore_newest(abstract(MESH).items())
    finally:
        checkpointer.close()
    if found is not None:
        jax.tree.map(np.testing.assert_array_equal, found.items, random_state(MESH, step=found.step).items())
    return None if found is None else found.step


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("identity", [IDENTITY, None, json.loads(json.dumps(IDENTITY, sort_keys=True))])
def test_own_checkpoint_is_taken(run_dir: Path, identity: dict[str, Any] | None) -> None:
    assert restore(run_dir, identity) == 7


@pytest.mark.parametrize(
    ("identity", "told"),
    [
        ({**IDENTITY, "run": "ffff"}, "run was '0a1b', now 'ffff'"),
        (
            {**IDENTITY, "data": {**IDENTITY["data"], "train": {"documents": 21, "sha256": "5c"}}},
            "data.train.documents was 20, now 21; data.train.sha256 was '77f0', now '5c'",
        ),
        ({"run": "0a1b"}, "data.tokenizer was 'byte', now None; data.train.documents was 20, now None"),
    ],
)
def test_checkpoint_of_another_run_is_refused(run_dir: Path, identity: dict[str, Any], told: str) -> None:
    """It is intact, so it stays where it is; to evaluate it needs no run."""
    with pytest.raises(InputError) as error:
        restore(run_dir, identity)
    assert f"checkpoints/7 is of another run ({told}" in str(error.value)
    assert "move that folder away, or choose another train.run_dir" in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["3", "7"]
    assert quarantined(run_dir) == []
    assert load_params(run_dir).step == 7


def test_checkpoint_that_records_no_run_is_refused(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, CONFIG.checkpoint)
    checkpointer.save(7, random_state(MESH, step=7).items(), CONFIG)
    checkpointer.close()
    with pytest.raises(InputError, match=r"checkpoints/7 is of another run \(.*run was None, now '0a1b'"):
        restore(tmp_path)


def test_copy_under_another_step_is_refused(run_dir: Path) -> None:
    shutil.copytree(run_dir / "checkpoints" / "3", run_dir / "checkpoints" / "9")
    told = r"checkpoints/9 holds step 3, not 9: move that folder away"
    with pytest.raises(InputError, match=told):
        restore(run_dir)
    with pytest.raises(InputError, match=told):
        load_params(run_dir)
    with pytest.raises(InputError, match=told):
        stored_run(run_dir)
    assert quarantined(run_dir) == []
    assert load_params(run_dir, 7).step == 7
    shutil.rmtree(run_dir / "checkpoints" / "9")
    assert restore(run_dir) == 7


def test_changed_config_is_damage(run_dir: Path) -> None:
    """Also where the change is a valid config of equal shapes."""
    path = run_dir / "checkpoints" / "7" / "config" / "metadata"
    change(path, seed=1)
    with pytest.raises(InputError, match=r"checkpoints/7 is damaged \(its config differs from its checksum\)"):
        load_params(run_dir)
    assert restore(run_dir) == 3
    assert [path.name for path in quarantined(run_dir)] == ["7"]


@pytest.mark.parametrize("fields", [{"step": 8}, {"identity": None}, {"config_sha256": "0"}, {"arrays": {}}])
def test_changed_record_is_damage(run_dir: Path, fields: dict[str, Any]) -> None:
    change(run_dir / "checkpoints" / "7" / "fingerprints" / "metadata", **fields)
    assert restore(run_dir) == 3


def test_layout_of_a_config_is_no_damage(run_dir: Path) -> None:
    path = run_dir / "checkpoints" / "7" / "config" / "metadata"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=4, sort_keys=True))
    assert restore(run_dir) == 7


def test_checkpoint_without_a_record_is_refused(run_dir: Path) -> None:
    """Made before there was one: fingerprints alone."""
    path = run_dir / "checkpoints" / "7" / "fingerprints" / "metadata"
    path.write_text(json.dumps(json.loads(path.read_text())["fingerprints"]))
    with pytest.raises(
        InputError, match=r"checkpoints/7 is of an earlier version, which recorded .*: move that folder away"
    ):
        restore(run_dir)
    assert quarantined(run_dir) == []


def test_stored_run(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The newest that can be read says what the run was; nothing is moved."""
    found = stored_run(run_dir)
    assert found is not None
    assert (found.config, found.identity, found.step) == (CONFIG, IDENTITY, 7)
    (run_dir / "checkpoints" / "7" / "config" / "metadata").write_text("")
    found = stored_run(run_dir)
    assert found is not None
    assert (found.config, found.identity, found.step) == (CONFIG, IDENTITY, 3)
    shutil.rmtree(run_dir / "checkpoints" / "3" / "fingerprints")
    assert stored_run(run_dir) is None
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["3", "7"]
    assert stored_run(tmp_path_factory.mktemp("empty")) is None


def test_only_own_checkpoints_are_removed(run_dir: Path, tmp_path: Path) -> None:
    """A copy under another step, one of another run, a link and a damaged one are not the run's to remove."""
    folder, elsewhere = run_dir / "checkpoints", tmp_path / "elsewhere"
    shutil.copytree(folder / "3", folder / "1")
    shutil.copytree(folder / "3", elsewhere)
    (folder / "2").symlink_to(elsewhere)
    other = Checkpointer(run_dir, CONFIG.checkpoint, identity={"run": "other"})
    other.save(4, random_state(MESH, step=4).items(), CONFIG)
    other.close()
    own = Checkpointer(run_dir, dataclasses.replace(CONFIG.checkpoint, keep=1), identity=IDENTITY)
    own.save(9, random_state(MESH, step=9).items(), CONFIG)
    own.close()
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "4", "9"]
    assert (elsewhere / "params").is_dir()
