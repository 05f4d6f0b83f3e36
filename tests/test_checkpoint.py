"""Saving, restoring and refusing checkpoints."""

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from mamba_jax.checkpoint import Checkpointer, load_params
from mamba_jax.config import (
    CheckpointConfig,
    DataConfig,
    ExperimentConfig,
    Mamba1Config,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TextFolderSource,
    TrainConfig,
)
from mamba_jax.errors import InputError
from mamba_jax.models.parameters import define
from mamba_jax.sharding import make_mesh
from mamba_jax.training.optimizer import make_optimizer
from mamba_jax.training.train_state import TrainState, abstract_state

CONFIG = ExperimentConfig(
    name="test",
    model=ModelConfig(vocab_size=40, d_model=16, num_layers=2, mixer=Mamba1Config(state_dim=4)),
    data=DataConfig(train=TextFolderSource(path="corpus"), seq_len=8, global_batch=4),
    optimizer=OptimizerConfig(peak_lr=1e-3),
    train=TrainConfig(num_steps=100, run_dir="run"),
)


def mesh_of(config: MeshConfig) -> Mesh:
    return make_mesh(config, jax.devices()[: config.data * config.fsdp * config.tensor])


def abstract(mesh: Mesh, model: ModelConfig = CONFIG.model) -> TrainState:
    definition = define(model)
    optimizer = make_optimizer(CONFIG.optimizer, num_steps=100, definition=definition)
    return abstract_state(dataclasses.replace(CONFIG, model=model), definition, optimizer, mesh)


def random_state(mesh: Mesh, *, step: int) -> TrainState:
    """Values of all magnitudes, subnormal ones included, laid out over the mesh."""
    rng = np.random.default_rng(step)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        integers = np.full(leaf.shape, step, np.int32)
        values = rng.normal(size=leaf.shape) * 10.0 ** rng.uniform(-40, 30, leaf.shape)
        return jax.device_put(integers if leaf.dtype == np.int32 else values.astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(draw, abstract(mesh))


def save(run_dir: Path, state: TrainState, config: ExperimentConfig = CONFIG) -> None:
    checkpointer = Checkpointer(run_dir, config.checkpoint)
    checkpointer.save(int(state.step), state.items(), config)
    checkpointer.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a checkpoint of step 7, written by eight devices."""
    run_dir = tmp_path_factory.mktemp("run")
    save(run_dir, random_state(mesh_of(MeshConfig(data=2, fsdp=2, tensor=2)), step=7))
    return run_dir


@pytest.mark.parametrize("mesh", [MeshConfig(data=1), MeshConfig(data=1, fsdp=4, tensor=2)])
def test_state_comes_back_bit_for_bit_on_any_mesh(saved: Path, mesh: MeshConfig) -> None:
    target = abstract(mesh_of(mesh))
    checkpointer = Checkpointer(saved, CONFIG.checkpoint)
    assert checkpointer.latest_step == 7
    found = checkpointer.restore_newest(target.items())
    checkpointer.close()
    assert found is not None
    assert found.step == 7
    restored = TrainState.from_items(found.items)
    expected = random_state(mesh_of(MeshConfig(data=1)), step=7)
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    for leaf, value, wanted in zip(*map(jax.tree.leaves, (restored, expected, target)), strict=True):
        assert np.asarray(leaf).tobytes() == np.asarray(value).tobytes()
        assert (leaf.dtype, leaf.sharding) == (wanted.dtype, wanted.sharding)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    mesh = mesh_of(MeshConfig(data=1))
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(keep=2))
    assert checkpointer.latest_step is None
    for step in (1, 2, 3):
        state = random_state(mesh, step=step)
        checkpointer.save(step, state.items(), CONFIG)
        # The next step overwrites what it was given; the checkpoint must not see that.
        jax.tree.map(lambda leaf: leaf.delete(), state)
    checkpointer.close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]
    expected = random_state(mesh, step=2)
    jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path, 2).params, expected.params)


def test_parameters_alone(saved: Path) -> None:
    loaded = load_params(saved)
    assert (loaded.step, loaded.config) == (7, CONFIG)
    expected = random_state(mesh_of(MeshConfig(data=1)), step=7)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, expected.params)
    assert {leaf.device for leaf in jax.tree.leaves(loaded.params)} == {jax.devices()[0]}


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        ({"d_model": 32}, ["embedding/table is float32[40, 16], expected float32[40, 32]"]),
        ({"num_layers": 3}, ["layers/norm/scale is float32[2, 16], expected float32[3, 16]"]),
        ({"param_dtype": "bfloat16"}, ["norm_f/scale is float32[16], expected bfloat16[16]"]),
        ({"tie_embeddings": False}, ["missing lm_head/table"]),
        ({"mixer": Mamba1Config(state_dim=4, use_conv_bias=False)}, ["unexpected layers/mixer/conv1d/bias"]),
    ],
)
def test_another_model_is_refused(saved: Path, change: dict[str, Any], messages: list[str]) -> None:
    model = dataclasses.replace(CONFIG.model, **change)
    target = abstract(mesh_of(MeshConfig(data=1)), model)
    checkpointer = Checkpointer(saved, CONFIG.checkpoint)
    with pytest.raises(InputError) as error:
        checkpointer.restore_newest(target.items())
    checkpointer.close()
    # A mistake in the config is no damage: nothing is moved.
    assert not (saved / "damaged").exists()
    assert all(message in str(error.value) for message in messages)
    assert "\n" not in str(error.value)


def test_another_optimizer_state_is_refused(saved: Path) -> None:
    target = abstract(mesh_of(MeshConfig(data=1)))
    items = target.items()
    items["rest"] = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=leaf.sharding), items["rest"]
    )
    checkpointer = Checkpointer(saved, CONFIG.checkpoint)
    with pytest.raises(InputError, match=r"mu/norm_f/scale is float32\[16\], expected bfloat16\[16\]"):
        checkpointer.restore_newest(items)
    checkpointer.close()


def test_missing_checkpoints(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no run directory"):
        load_params(tmp_path)
    with pytest.raises(InputError, match="no checkpoint of step 9; there are 7"):
        load_params(saved, 9)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match="no complete checkpoint"):
        load_params(tmp_path)


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with checkpoints of steps 3 and 7."""
    run_dir = tmp_path_factory.mktemp("twice")
    for step in (3, 7):
        save(run_dir, random_state(mesh_of(MeshConfig(data=1)), step=step))
    return run_dir


def data_file(step: Path, item: str) -> Path:
    """The largest file of an item: its arrays."""
    return max((path for path in (step / item).rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path: Path, part: float) -> None:
    """Flips one bit at a part of the file's length."""
    content = bytearray(path.read_bytes())
    content[int(part * len(content))] ^= 16
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty_folder(step: Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty step": empty_folder,
    "parameters missing": lambda step: shutil.rmtree(step / "params"),
    "rest missing": lambda step: shutil.rmtree(step / "rest"),
    "fingerprints missing": lambda step: shutil.rmtree(step / "fingerprints"),
    "config missing": lambda step: shutil.rmtree(step / "config"),
    "data file missing": lambda step: data_file(step, "params").unlink(),
    "data file empty": lambda step: data_file(step, "params").write_bytes(b""),
    "data file cut": lambda step: cut(data_file(step, "rest")),
    "data file zeroed": lambda step: data_file(step, "params").write_bytes(bytes(1000)),
    "bit flipped early": lambda step: flip(data_file(step, "params"), 0.3),
    "bit flipped in the middle": lambda step: flip(data_file(step, "rest"), 0.5),
    "bit flipped late": lambda step: flip(data_file(step, "params"), 0.8),
    "manifest cut": lambda step: cut(step / "params" / "manifest.ocdbt"),
    "metadata cut": lambda step: cut(step / "params" / "_METADATA"),
    "metadata missing": lambda step: (step / "rest" / "_METADATA").unlink(),
    "config garbled": lambda step: (step / "config" / "metadata").write_text("{"),
    "fingerprints garbled": lambda step: (step / "fingerprints" / "metadata").write_text("[1, 2]"),
    "parameters of another step": lambda step: (
        shutil.rmtree(step / "params"),
        shutil.copytree(step.with_name("3") / "params", step / "params"),
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_checkpoint_is_moved_away(twice: Path, tmp_path: Path, damage: Callable[[Path], object]) -> None:
    """The one before it is taken, the damaged one is kept aside, and the event says what was found."""
    shutil.copytree(twice / "checkpoints", tmp_path / "checkpoints")
    damage(tmp_path / "checkpoints" / "7")
    events = []
    checkpointer = Checkpointer(
        tmp_path, CONFIG.checkpoint, on_event=lambda name, **fields: events.append((name, fields))
    )
    mesh = mesh_of(MeshConfig(data=1))
    found = checkpointer.restore_newest(abstract(mesh).items())
    assert found is not None
    assert found.step == 3
    expected = random_state(mesh, step=3).items()
    jax.tree.map(np.testing.assert_array_equal, found.items, expected)
    ((name, fields),) = events
    assert (name, fields["step"]) == ("quarantined", 7)
    assert "checkpoints/7 is damaged" in fields["reason"]
    assert "\n" not in fields["reason"]
    assert [path.name for path in (tmp_path / "damaged").iterdir()] == ["7"]
    # The step can be saved again.
    checkpointer.save(7, random_state(mesh, step=7).items(), CONFIG)
    checkpointer.close()
    assert load_params(tmp_path).step == 7


def test_all_damaged_is_not_a_fresh_start(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "checkpoints", tmp_path / "checkpoints")
    empty_folder(tmp_path / "checkpoints" / "7")
    checkpointer = Checkpointer(tmp_path, CONFIG.checkpoint)
    with pytest.raises(InputError, match=r"all checkpoints .* are damaged"):
        checkpointer.restore_newest(abstract(mesh_of(MeshConfig(data=1))).items())
    checkpointer.close()
    assert (tmp_path / "damaged" / "7").is_dir()


def test_reader_names_the_array(saved: Path, tmp_path: Path) -> None:
    """Evaluation moves nothing; it says in one line which array differs."""
    shutil.copytree(saved / "checkpoints", tmp_path / "checkpoints")
    path = tmp_path / "checkpoints" / "7" / "fingerprints" / "metadata"
    path.write_text(path.read_text().replace('norm_f/scale": ', 'norm_f/scale": 1'))
    with pytest.raises(InputError, match=r"checkpoints/7 is damaged .*array params/norm_f/scale") as error:
        load_params(tmp_path)
    assert "\n" not in str(error.value)
    assert (tmp_path / "checkpoints" / "7").is_dir()


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from mamba_jax.checkpoint import Checkpointer, SaveFailed
from tests.test_checkpoint import CONFIG, MeshConfig, abstract, mesh_of, random_state
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
mesh, events = mesh_of(MeshConfig(data=1)), []
checkpointer = Checkpointer(sys.argv[1], CONFIG.checkpoint, on_event=lambda *name, **fields: events.append(name))
checkpointer.save(1, random_state(mesh, step=1).items(), CONFIG)
checkpointer.wait()
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
try:
    checkpointer.save(2, random_state(mesh, step=2).items(), CONFIG)
    checkpointer.wait()
except SaveFailed as error:
    assert "\\n" not in str(error)
else:
    raise AssertionError("the save did not fail")
names = sorted(path.name for path in Path(sys.argv[1], "checkpoints").iterdir())
assert names == ["1"], names
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
assert checkpointer.restore_newest(abstract(mesh).items()).step == 1
checkpointer.save(3, random_state(mesh, step=3).items(), CONFIG)
checkpointer.wait()
checkpointer.close()
assert Checkpointer(sys.argv[1], CONFIG.checkpoint).restore_newest(abstract(mesh).items()).step == 3
"""


def test_save_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk: writing fails in the middle of the arrays."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        cwd=Path(__file__).resolve().parents[1],
        env={**os.environ, "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_reading_changes_nothing(saved: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in saved.rglob("*")}
    load_params(saved)
    assert {path: path.stat().st_mtime_ns for path in saved.rglob("*")} == before
