"""Rows of a table by number: their gradient, and that no platform is left free to choose the order of its sums."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax.config import MeshConfig
from mamba_jax.models import lookup
from mamba_jax.models.lookup import look_up, sum_of_rows
from mamba_jax.sharding import make_mesh

# An XLA for GPUs adds with atomics in a scatter whose places may repeat.
_SCATTER = re.compile(r'"stablehlo\.scatter"\(.*?unique_indices = (\w+)', re.DOTALL)


@pytest.mark.parametrize(("length", "num_rows"), [(1, 3), (128, 1), (129, 5), (1000, 7), (20_000, 300)])
def test_sums_of_rows(length: int, num_rows: int) -> None:
    """Runs within a block, over many, and of blocks of blocks; ids outside the table are left out."""
    rng = np.random.default_rng(length)
    ids = rng.zipf(1.3, length) % (num_rows + 2) - 1
    values = rng.standard_normal((length, 4)).astype(np.float32)
    expected = np.zeros((num_rows, 4))
    inside = (ids >= 0) & (ids < num_rows)
    np.add.at(expected, ids[inside], values[inside].astype(np.float64))
    found = jax.jit(sum_of_rows, static_argnums=2)(jnp.asarray(ids, jnp.int32), jnp.asarray(values), num_rows)
    # A sum of n terms: n roundings of half an epsilon, as good as independent; see docs/numerics.md.
    tolerance = 8 * 2.0**-24 * np.sqrt(length) * max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "mesh", [MeshConfig(data=1), MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=2, sequence=2, tensor=2)]
)
def test_gradient_has_one_order_on_gpus(mesh: MeshConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU runs, on CPU devices, gives what XLA's own scatter gives; places of its scatters never repeat."""
    count = math.prod(dataclasses.astuple(mesh))
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(-1, 24, (4, 64)), jnp.int32)
    weights = jnp.asarray(rng.standard_normal((4, 64, 8)), jnp.float32)

    def loss(table: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(ids[..., None] >= 0, look_up(table, ids), 0) * weights)

    with jax.set_mesh(make_mesh(mesh, jax.devices()[:count])):
        table = jnp.ones((24, 8))
        expected = jax.jit(jax.grad(loss))(table)
        text = jax.jit(jax.grad(loss)).trace(table).lower(lowering_platforms=("cuda",)).as_text()
        monkeypatch.setattr(lookup, "_add_in_order", lookup._add_sorted)
        found = jax.jit(lambda table: jax.grad(loss)(table))(table)
    scatters = _SCATTER.findall(text)
    assert scatters
    assert set(scatters) == {"true"}
    # Two orders of a sum of some ten terms below 4 each.
    np.testing.assert_allclose(found, expected, rtol=0, atol=8 * 2.0**-24 * 4 * 10)


def test_derivatives_agree_in_both_directions() -> None:
    rng = np.random.default_rng(1)
    ids = jnp.asarray(rng.integers(0, 6, (2, 9)), jnp.int32)
    table, tangent = (jnp.asarray(rng.standard_normal((6, 3)), jnp.float32) for _ in range(2))
    weights = jnp.asarray(rng.standard_normal((2, 9, 3)), jnp.float32)
    primal, moved = jax.jvp(lambda table: look_up(table, ids), (table,), (tangent,))
    np.testing.assert_array_equal(primal, table[ids])
    np.testing.assert_array_equal(moved, tangent[ids])
    gradient = jax.grad(lambda table: jnp.sum(look_up(table, ids) * weights))(table)
    assert float(jnp.vdot(gradient, tangent)) == pytest.approx(float(jnp.vdot(weights, moved)), rel=1e-5)
