"""Saving, restoring and refusing checkpoints."""

import dataclasses
import shutil
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
    optimizer = make_optimizer(CONFIG.optimizer, num_steps=100, decay=definition.decay)
    return abstract_state(definition, optimizer, mesh)


def random_state(mesh: Mesh, *, step: int) -> TrainState:
    """Values of all magnitudes, subnormal ones included, laid out over the mesh."""
    rng = np.random.default_rng(step)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        integers = np.full(leaf.shape, step, np.int32)
        values = rng.normal(size=leaf.shape) * 10.0 ** rng.uniform(-40, 30, leaf.shape)
        return jax.device_put(integers if leaf.dtype == np.int32 else values.astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(draw, abstract(mesh))


def rest(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state}


def save(run_dir: Path, state: TrainState, config: ExperimentConfig = CONFIG) -> None:
    checkpointer = Checkpointer(run_dir, config.checkpoint)
    checkpointer.save(int(state.step), params=state.params, rest=rest(state), config=config)
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
    params, others = checkpointer.restore(7, params=target.params, rest=rest(target))
    checkpointer.close()
    restored = TrainState(params=params, **others)
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
        checkpointer.save(step, params=state.params, rest=rest(state), config=CONFIG)
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
        checkpointer.restore(7, params=target.params, rest=rest(target))
    checkpointer.close()
    assert all(message in str(error.value) for message in messages)
    assert "\n" not in str(error.value)


def test_another_optimizer_state_is_refused(saved: Path) -> None:
    target = abstract(mesh_of(MeshConfig(data=1)))
    others = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=leaf.sharding), rest(target)
    )
    checkpointer = Checkpointer(saved, CONFIG.checkpoint)
    with pytest.raises(InputError, match=r"mu/norm_f/scale is float32\[16\], expected bfloat16\[16\]"):
        checkpointer.restore(7, params=target.params, rest=others)
    checkpointer.close()


def test_missing_checkpoints(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no run directory"):
        load_params(tmp_path)
    with pytest.raises(InputError, match="no checkpoint of step 9; there are 7"):
        load_params(saved, 9)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match="no complete checkpoint"):
        load_params(tmp_path)


@pytest.mark.parametrize("victim", ["params/manifest.ocdbt", "params/_METADATA", "config/metadata"])
@pytest.mark.parametrize("damage", ["missing", "empty"])
def test_damaged_checkpoint_is_one_line(saved: Path, tmp_path: Path, victim: str, damage: str) -> None:
    shutil.copytree(saved / "checkpoints", tmp_path / "checkpoints")
    path = tmp_path / "checkpoints" / "7" / victim
    path.unlink()
    if damage == "empty":
        path.touch()
    with pytest.raises(InputError, match=r"checkpoints/7") as error:
        load_params(tmp_path)
    assert "\n" not in str(error.value)


def test_reading_changes_nothing(saved: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in saved.rglob("*")}
    load_params(saved)
    assert {path: path.stat().st_mtime_ns for path in saved.rglob("*")} == before
