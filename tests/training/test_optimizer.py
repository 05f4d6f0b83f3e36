"""Schedules against their formulas, and one AdamW update by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mamba_jax.config import CosineSchedule, OptimizerConfig, WarmupStableDecaySchedule
from mamba_jax.training.optimizer import learning_rate, make_optimizer

# A schedule is some ten float32 operations on values below the peak.
RTOL = 10 * 2.0**-24


def test_cosine() -> None:
    config = OptimizerConfig(peak_lr=3e-3, schedule=CosineSchedule(warmup_fraction=0.1, final_lr=1e-5))
    rates = np.array([learning_rate(config, 100)(step) for step in range(100)])
    np.testing.assert_allclose(rates[:10], 3e-3 * np.arange(1, 11) / 10, atol=3e-3 * RTOL)
    cosine = 0.5 * (1 + np.cos(np.pi * np.arange(91) / 90))
    np.testing.assert_allclose(rates[9:], 1e-5 + (3e-3 - 1e-5) * cosine, rtol=RTOL, atol=3e-3 * RTOL)
    assert rates[-1] == pytest.approx(1e-5, rel=1e-4)


def test_warmup_stable_decay() -> None:
    schedule = WarmupStableDecaySchedule(warmup_fraction=0.1, decay_fraction=0.2, final_lr=1e-4)
    rates = np.array([learning_rate(OptimizerConfig(peak_lr=1e-2, schedule=schedule), 50)(step) for step in range(50)])
    np.testing.assert_allclose(rates[:5], 1e-2 * np.arange(1, 6) / 5, atol=1e-2 * RTOL)
    np.testing.assert_allclose(rates[5:40], 1e-2, rtol=RTOL)
    np.testing.assert_allclose(rates[39:], np.linspace(1e-2, 1e-4, 11), rtol=RTOL, atol=1e-2 * RTOL)


@pytest.mark.parametrize("schedule", [CosineSchedule(warmup_fraction=0.0), CosineSchedule(warmup_fraction=1.0)])
def test_extreme_warmup(schedule: CosineSchedule) -> None:
    config = OptimizerConfig(peak_lr=1.0, schedule=schedule)
    rates = np.array([learning_rate(config, 4)(step) for step in range(4)])
    assert np.all((rates > 0) & (rates <= 1))


def test_first_update_is_adamw() -> None:
    """After one update from zero moments the bias-corrected step is g / (|g| + eps) with g clipped, plus the decay."""
    config = OptimizerConfig(peak_lr=0.1, schedule=CosineSchedule(warmup_fraction=0.0), weight_decay=0.3, clip_norm=1.0)
    params = {"kernel": jnp.array([1.0, -2.0, 3.0]), "bias": jnp.array([0.5])}
    decay = {"kernel": True, "bias": False}
    gradient = {"kernel": jnp.array([3.0, 0.0, -4.0]), "bias": jnp.array([12.0])}
    optimizer = make_optimizer(config, num_steps=10, decay=decay)
    updates, state = optimizer.update(gradient, optimizer.init(params), params)
    norm = 13.0
    rate = float(learning_rate(config, 10)(0))
    for name, decayed in decay.items():
        g = np.asarray(gradient[name]) / norm
        expected = -rate * (g / (np.abs(g) + config.eps) + decayed * config.weight_decay * np.asarray(params[name]))
        # The bias correction computes 1 - b^1, which loses log2(1 / 0.05) of the 24 bits.
        np.testing.assert_allclose(updates[name], expected, rtol=40 * 2.0**-24)
        moment = optax.tree_utils.tree_get(state, "mu")[name]
        np.testing.assert_allclose(moment, (1 - config.b1) * g, rtol=20 * 2.0**-24)


def test_small_gradients_are_not_clipped() -> None:
    config = OptimizerConfig(peak_lr=0.1, clip_norm=1.0)
    params = {"w": jnp.ones(4)}
    optimizer = make_optimizer(config, num_steps=10, decay={"w": False})
    _, state = optimizer.update({"w": jnp.full(4, 0.25)}, optimizer.init(params), params)
    np.testing.assert_allclose(optax.tree_utils.tree_get(state, "mu")["w"], 0.1 * 0.25, rtol=20 * 2.0**-24)


def test_moments_are_float32() -> None:
    optimizer = make_optimizer(OptimizerConfig(peak_lr=1e-3), num_steps=10, decay={"w": True})
    state = optimizer.init({"w": jnp.ones(3)})
    assert {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim} == {jnp.dtype("float32")}
    assert math.isclose(sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim), 6)
