"""Truncated back-propagation through time: windows within a step, and streams whose state passes between steps."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax.config import ExperimentConfig, MeshConfig
from mamba_jax.data.batch import LMBatch
from mamba_jax.models.parameters import define
from mamba_jax.models.state import LMState
from mamba_jax.sharding import make_mesh, put_batch
from mamba_jax.training.train_state import TrainState
from tests.training.test_step import REORDERING, gradient, make_batch, relative_difference, run_steps, set_up

MakeConfig = Callable[..., ExperimentConfig]


def streams(config: ExperimentConfig, batch: LMBatch) -> LMBatch:
    """The batch as one of `data.order="streams"` whose rows all start a document."""
    return dataclasses.replace(batch, continues=np.zeros(config.data.global_batch, bool))


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(MeshConfig(data=1), id="one device"),
        pytest.param(MeshConfig(data=2, fsdp=2, tensor=2), id="eight devices", marks=pytest.mark.slow),
    ],
)
def test_windows_with_gradient_equal_the_uncut_sequence(make_config: MakeConfig, mesh: MeshConfig) -> None:
    """Documents of 15 tokens against windows of 6: boundaries lie within windows and states cross between them."""
    whole_state, (whole,), _ = run_steps(make_config(mesh=mesh), 1)
    state, (cut,), _ = run_steps(make_config(mesh=mesh, windows=4), 1)
    for name in ("loss", "cross_entropy", "z_loss", "grad_norm"):
        np.testing.assert_allclose(getattr(cut, name), getattr(whole, name), rtol=REORDERING)
    assert relative_difference(gradient(state), gradient(whole_state)) < REORDERING


def test_windows_and_accumulation_together(make_config: MakeConfig) -> None:
    whole_state, (whole,), _ = run_steps(make_config(), 1)
    state, (cut,), _ = run_steps(make_config(windows=3, accumulation_steps=2), 1)
    np.testing.assert_allclose(cut.loss, whole.loss, rtol=REORDERING)
    assert relative_difference(gradient(state), gradient(whole_state)) < REORDERING


def one_step(config: ExperimentConfig, batch: LMBatch) -> tuple[TrainState, float]:
    mesh, state, step = set_up(config)
    with jax.set_mesh(mesh):
        state, metrics = step(state, put_batch(mesh, batch))
    return state, float(metrics.loss)


def test_truncated_windows_keep_the_loss_and_change_the_gradient(make_config: MakeConfig) -> None:
    whole = make_config()
    batch = dataclasses.replace(make_batch(whole), segment_ids=np.zeros((8, 24), np.int32))
    full_state, full_loss = one_step(whole, batch)
    cut_state, cut_loss = one_step(make_config(windows=4, window_gradient="truncated"), batch)
    np.testing.assert_allclose(cut_loss, full_loss, rtol=REORDERING)
    assert relative_difference(gradient(cut_state), gradient(full_state)) > 1e-3


def test_truncation_at_document_boundaries_loses_nothing(make_config: MakeConfig) -> None:
    """Where no state crosses, the truncated gradient is the full one."""
    whole = make_config()
    ids = np.broadcast_to(np.arange(24) // 6, (8, 24)).astype(np.int32)
    batch = dataclasses.replace(make_batch(whole), segment_ids=ids)
    full_state, full_loss = one_step(whole, batch)
    cut_state, cut_loss = one_step(make_config(windows=4, window_gradient="truncated"), batch)
    np.testing.assert_allclose(cut_loss, full_loss, rtol=REORDERING)
    assert relative_difference(gradient(cut_state), gradient(full_state)) < REORDERING


def forward_state(config: ExperimentConfig, params: Any, batch: LMBatch) -> LMState:
    """The model's state after the batch, from zero."""
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    definition = define(config.model)

    @jax.jit
    def forward(params: Any) -> LMState:
        return definition.merge(params).hidden(batch.tokens, segment_ids=batch.segment_ids).state

    with jax.set_mesh(mesh):
        return forward(params)


@pytest.mark.parametrize("accumulation_steps", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_streams_carry_the_state_from_step_to_step(make_config: MakeConfig, accumulation_steps: int) -> None:
    """Two steps over the halves of a text see what one pass over it sees; the learning rate changes nothing."""
    config = make_config(order="streams", peak_lr=1e-30, accumulation_steps=accumulation_steps)
    first, second = make_batch(config, seed=1), make_batch(config, seed=2)
    whole = jax.tree.map(lambda a, b: np.concatenate([a, b], axis=1), first, second)
    going_on = np.arange(8) % 2 == 0
    # The second half of an odd row is a document of its own.
    ids = np.zeros((8, 48), np.int32)
    ids[~going_on, 24:] = 1
    mesh, state, step = set_up(config)
    params = jax.device_get(state.params)
    halves = [dataclasses.replace(part, segment_ids=np.zeros((8, 24), np.int32)) for part in (first, second)]
    with jax.set_mesh(mesh):
        state, one = step(state, put_batch(mesh, streams(config, halves[0])))
        state, two = step(state, put_batch(mesh, dataclasses.replace(halves[1], continues=going_on)))
    whole = dataclasses.replace(whole, segment_ids=ids)
    expected = forward_state(config, params, whole)
    assert relative_difference(expected, state.recurrent) < REORDERING
    counts = [float(np.sum(part.loss_mask)) for part in halves]
    _, whole_loss = one_step(make_config(seq_len=48), whole)
    mean = (float(one.loss) * counts[0] + float(two.loss) * counts[1]) / sum(counts)
    np.testing.assert_allclose(mean, whole_loss, rtol=REORDERING)
    # Without the state, the second half would be predicted otherwise.
    _, alone = one_step(make_config(), halves[1])
    assert abs(alone - float(two.loss)) > 1e-4


def test_state_that_is_not_finite_starts_anew(make_config: MakeConfig) -> None:
    config = make_config(order="streams")
    mesh, state, step = set_up(config)
    bad = jax.tree.map(lambda leaf: leaf.at[:, 3].set(jnp.nan), state.recurrent)
    batch = dataclasses.replace(make_batch(config), continues=np.ones(8, bool))
    with jax.set_mesh(mesh):
        state, metrics = step(dataclasses.replace(state, recurrent=bad), put_batch(mesh, batch))
        assert not np.isfinite(metrics.loss)
        assert float(metrics.skipped) == 1
        assert not np.any(np.asarray(state.recurrent["layers"].ssm)[:, 3])
        assert np.all(np.any(np.asarray(state.recurrent["layers"].ssm)[:, :3], axis=(0, 2, 3)))
        state, metrics = step(state, put_batch(mesh, batch))
    assert np.isfinite(metrics.loss)
    assert float(metrics.skipped_in_a_row) == 0


@pytest.mark.slow
def test_memory_does_not_grow_with_the_sequence(make_config: MakeConfig) -> None:
    """Eight times the tokens in eight windows: only states at window boundaries and the tokens themselves are added."""

    def temporaries(**fields: Any) -> int:
        config = make_config(remat="block", loss_chunk=64, global_batch=2, **fields)
        mesh, state, step = set_up(config)
        with jax.set_mesh(mesh):
            compiled = step.lower(state, put_batch(mesh, make_batch(config))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, uncut = temporaries(seq_len=512), temporaries(seq_len=4096)
    windows = temporaries(seq_len=4096, windows=8)
    # A state is (2 layers, 2 rows, 32 channels, 4 states + 3 inputs) in float32, about 4 kB.
    assert windows < 1.25 * short
    assert uncut > 3 * short
