"""Saving, restoring and refusing checkpoints."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from mamba_jax.checkpoint import Checkpointer, SaveFailed, load_params
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
from mamba_jax.sharding import make_mesh
from mamba_jax.training.program import TrainProgram
from mamba_jax.training.train_state import TrainState

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
    return TrainProgram(dataclasses.replace(CONFIG.program, model=model, global_batch=8), mesh).state


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
        ({"tie_embeddings": False}, ["missing params/lm_head/table"]),
        ({"mixer": Mamba1Config(state_dim=4, use_conv_bias=False)}, ["unexpected params/layers/mixer/conv1d/bias"]),
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
    with pytest.raises(InputError, match=r"rest/opt_state/1/0/count is int32\[\], expected bfloat16\[\]"):
        checkpointer.restore_newest(items)
    checkpointer.close()


def test_missing_checkpoints(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a run directory"):
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


def flip_all(folder: Path) -> None:
    for path in folder.iterdir():
        for part in (0.2, 0.4, 0.6, 0.8):
            flip(path, part)


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
    "metadata garbled": lambda step: (step / "params" / "_METADATA").write_text("{}"),
    "metadata of another kind": lambda step: (step / "params" / "_METADATA").write_text("[]"),
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


def test_verified_state_outweighs_a_lost_marker(saved: Path, tmp_path: Path) -> None:
    """A step gets its name when it is complete, and its arrays are compared: a lost marker alone costs no training."""
    shutil.copytree(saved / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "7" / "_CHECKPOINT_METADATA").unlink()
    mesh = mesh_of(MeshConfig(data=1))
    checkpointer = Checkpointer(tmp_path, CONFIG.checkpoint)
    found = checkpointer.restore_newest(abstract(mesh).items())
    checkpointer.close()
    assert found is not None
    assert found.step == 7
    jax.tree.map(np.testing.assert_array_equal, found.items, random_state(mesh, step=7).items())


def test_two_damaged_in_a_row(twice: Path, tmp_path: Path) -> None:
    """Each is moved to a name of its own, also where an earlier start has moved a step of that number."""
    shutil.copytree(twice / "checkpoints", tmp_path / "checkpoints")
    save(tmp_path, random_state(mesh_of(MeshConfig(data=1)), step=9))
    (tmp_path / "damaged" / "9").mkdir(parents=True)
    events = []
    checkpointer = Checkpointer(tmp_path, CONFIG.checkpoint, on_event=lambda *name, **fields: events.append(fields))
    for step in ("7", "9"):
        cut(data_file(tmp_path / "checkpoints" / step, "params"))
    found = checkpointer.restore_newest(abstract(mesh_of(MeshConfig(data=1))).items())
    checkpointer.close()
    assert found is not None
    assert found.step == 3
    assert [fields["step"] for fields in events] == [9, 7]
    assert sorted(path.name for path in (tmp_path / "damaged").iterdir()) == ["7", "9", "9-1"]
    assert any((tmp_path / "damaged" / "9-1").iterdir())


def test_saving_leaves_the_preemption_service_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`StopRequests` numbers its questions by call; Orbax's, by step, made one process stop and the other go on."""
    asked = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked.append)
    save(tmp_path, random_state(mesh_of(MeshConfig(data=1)), step=7))
    assert asked == []


def test_average_alone(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"optimizer\.ema_decay was not set"):
        load_params(saved, weights="average")
    config = dataclasses.replace(CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, ema_decay=0.9))
    mesh = mesh_of(MeshConfig(data=1))
    average = random_state(mesh, step=8).params
    save(tmp_path, dataclasses.replace(random_state(mesh, step=7), ema=average), config)
    loaded = load_params(tmp_path, weights="average")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, average)
    flip_all(tmp_path / "checkpoints" / "7" / "ema" / "d")
    with pytest.raises(InputError, match=r"checkpoints/7 is damaged .*: move that folder away"):
        load_params(tmp_path, weights="average")


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
    step = tmp_path / "checkpoints" / "7"
    save(tmp_path / "other", random_state(mesh_of(MeshConfig(data=1)), step=8))
    shutil.rmtree(step / "params")
    (tmp_path / "other" / "checkpoints" / "8" / "params").rename(step / "params")
    with pytest.raises(InputError, match=r"checkpoints/7 is damaged .*array params/embedding/table") as error:
        load_params(tmp_path)
    assert "\n" not in str(error.value)
    assert (tmp_path / "checkpoints" / "7").is_dir()


def test_reading_changes_nothing(saved: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in saved.rglob("*")}
    load_params(saved)
    assert {path: path.stat().st_mtime_ns for path in saved.rglob("*")} == before


def test_reason_of_a_failed_write_outlives_a_long_message(tmp_path: Path) -> None:
    """TensorStore says at the end of a message, which may have thousands of characters, what the system refused."""
    checkpointer = Checkpointer(tmp_path, CONFIG.checkpoint)
    message = f"RESOURCE_EXHAUSTED: Error writing {'x' * 3000} [os_error_code='28'] {'y' * 3000}"
    expected = r"^No space left on device: ValueError: RESOURCE_EXHAUSTED"
    with pytest.raises(SaveFailed, match=expected) as failure, checkpointer._failure_in_one_line():
        raise ValueError(message)
    assert "\n" not in str(failure.value)
    checkpointer.close()
