"""Steps that must not change the weights, and the moving average of those that do."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from mamba_jax.config import ExperimentConfig, FaultsConfig, MeshConfig, OptimizerConfig
from mamba_jax.sharding import put_batch
from mamba_jax.training.train_state import TrainState
from tests.training.test_step import make_batch, run_steps, set_up

MakeConfig = Callable[..., ExperimentConfig]


def weights(state: TrainState) -> Any:
    """What a skipped step must leave alone, as numpy arrays."""
    return jax.device_get((state.params, state.opt_state, state.ema))


def poisoned(state: TrainState) -> TrainState:
    """One weight that is not a number: loss and gradient of the next step are not either."""
    params = jax.tree.map(lambda leaf: leaf, state.params)
    params["norm_f"]["scale"] = params["norm_f"]["scale"].at[0].set(np.nan)
    return dataclasses.replace(state, params=params)


@pytest.mark.parametrize("mesh", [MeshConfig(data=1), MeshConfig(data=2, fsdp=2, tensor=2)], ids=["one", "eight"])
def test_step_that_is_not_finite_changes_nothing(make_config: MakeConfig, mesh: MeshConfig) -> None:
    config = make_config(mesh=mesh)
    device_mesh, state, step = set_up(config)
    with jax.set_mesh(device_mesh):
        state, first = step(state, put_batch(device_mesh, make_batch(config, seed=0)))
        good = weights(state)
        bad = poisoned(state)
        before = weights(bad)
        bad, metrics = step(bad, put_batch(device_mesh, make_batch(config, seed=1)))
        jax.tree.map(np.testing.assert_array_equal, weights(bad), before)
        assert not np.isfinite(metrics.loss)
        assert (float(metrics.skipped), float(metrics.skipped_in_a_row), int(bad.step)) == (1, 1, 2)
        assert np.all(np.isfinite(bad.skips.norms))
        # The weights healed, training goes on, and the schedule goes on where it was.
        healed = dataclasses.replace(
            bad, params=jax.device_put(good[0], jax.tree.map(lambda p: p.sharding, bad.params))
        )
        healed, metrics = step(healed, put_batch(device_mesh, make_batch(config, seed=2)))
    assert (float(metrics.skipped), float(metrics.skipped_in_a_row), int(healed.step)) == (1, 0, 3)
    assert np.isfinite(metrics.loss)
    assert metrics.learning_rate < first.learning_rate
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), jax.device_get(healed.params), good[0])
    assert all(jax.tree.leaves(moved))


def test_skipped_step_does_not_advance_the_schedule(make_config: MakeConfig) -> None:
    _, history, _ = run_steps(make_config(), 3)
    config = make_config()
    mesh, state, step = set_up(config)
    with jax.set_mesh(mesh):
        state, _ = step(state, put_batch(mesh, make_batch(config, seed=0)))
        good = jax.device_get(state.params)
        state, _ = step(poisoned(state), put_batch(mesh, make_batch(config, seed=7)))
        state = dataclasses.replace(state, params=jax.tree.map(jax.numpy.asarray, good))
        for index in (1, 2):
            state, metrics = step(state, put_batch(mesh, make_batch(config, seed=index)))
            # Same weights, moments, data and learning rate as a run that had no bad step.
            assert float(metrics.loss).hex() == float(history[index].loss).hex()
            assert float(metrics.learning_rate).hex() == float(history[index].learning_rate).hex()


def test_spike_is_skipped(make_config: MakeConfig) -> None:
    """A gradient 1000 times the mean of the window is a spike once the window is full, and not before."""
    faults = FaultsConfig(spike_factor=5.0, spike_window=3)
    config = dataclasses.replace(make_config(peak_lr=1e-4), faults=faults)
    mesh, state, step = set_up(config)
    with jax.set_mesh(mesh):
        for index in range(3):
            remembered = np.asarray(state.skips.norms)
            assert np.count_nonzero(remembered) == index
            state, metrics = step(state, put_batch(mesh, make_batch(config, seed=index)))
            assert float(metrics.skipped) == 0
            np.testing.assert_array_equal(np.asarray(state.skips.norms)[index], metrics.grad_norm)
        quiet = dataclasses.replace(state.skips, norms=state.skips.norms / 1000)
        before, remembered = weights(state), np.asarray(quiet.norms)
        state, metrics = step(dataclasses.replace(state, skips=quiet), put_batch(mesh, make_batch(config, seed=3)))
        assert np.isfinite(metrics.loss)
        assert float(metrics.skipped_in_a_row) == 1
        jax.tree.map(np.testing.assert_array_equal, weights(state), before)
        np.testing.assert_array_equal(state.skips.norms, remembered)
        usual = dataclasses.replace(state.skips, norms=state.skips.norms * 1000)
        state = dataclasses.replace(state, skips=usual)
        state, metrics = step(state, put_batch(mesh, make_batch(config, seed=4)))
    assert (float(metrics.skipped), float(metrics.skipped_in_a_row)) == (1, 0)


def test_average_of_the_weights(make_config: MakeConfig) -> None:
    config = make_config(mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    mesh, state, step = set_up(config)
    expected = jax.device_get(state.params)
    with jax.set_mesh(mesh):
        for index in range(3):
            state, _ = step(state, put_batch(mesh, make_batch(config, seed=index)))
            expected = jax.tree.map(
                lambda mean, value: 0.75 * mean + 0.25 * value, expected, jax.device_get(state.params)
            )
    # Three updates, each of three float32 roundings.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2.0**-20, atol=2.0**-30), expected, state.ema)
    assert jax.tree.map(lambda m: m.sharding, state.ema) == jax.tree.map(lambda p: p.sharding, state.params)


def test_no_average_is_kept_by_default(make_config: MakeConfig) -> None:
    _, state, _ = set_up(make_config(ema_decay=OptimizerConfig.ema_decay))
    assert state.ema is None
    assert "ema" not in state.items()
    assert TrainState.from_items(state.items()) == state
