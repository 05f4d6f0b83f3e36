"""Mixtures of experts: the layer of transformers in float64, products of groups, devices that share out experts."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from mamba_jax.config import MeshConfig, MoeConfig
from mamba_jax.errors import InputError
from mamba_jax.models.mixers.moe import grouped_product as products
from mamba_jax.models.mixers.moe.mixer import Moe
from mamba_jax.models.mixers.moe.routing import route
from mamba_jax.sharding import make_mesh
from tests.models.test_feed_forward import GOLDEN, assert_close, with_params

needs_eight_devices = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")


def from_golden(golden: dict[str, np.ndarray], kind: str) -> dict[str, Any]:
    """The arrays of a golden file, `kind` being "in" or "grad", as the mixer names and lays out its parameters."""
    gate, up = np.split(golden[f"{kind}.gate_up_proj"], 2, axis=1)
    experts = {"up_proj": np.stack([gate, up], axis=1).transpose(0, 3, 1, 2)}
    experts["down_proj"] = golden[f"{kind}.down_proj"].transpose(0, 2, 1)
    return {"router": {"kernel": golden[f"{kind}.router"].T}, "experts": experts}


@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "unnormalised"])
def test_the_layer_and_its_loss_are_those_of_transformers(normalize: bool) -> None:
    golden = load_file(GOLDEN / f"moe_top2_{'normalised' if normalize else 'unnormalised'}.safetensors")
    count, inner, width = golden["in.gate_up_proj"].shape
    config = MoeConfig(num_experts=count, hidden_dim=inner // 2, normalize_weights=normalize, balance_weight=1.0)
    state, run = with_params(Moe(config, d_model=width, rngs=nnx.Rngs(0)), from_golden(golden, "in"))
    u, projection = (jnp.asarray(golden[name], jnp.float32) for name in ("in.x", "proj.y"))

    def loss(params: Any, u: jax.Array) -> tuple[jax.Array, Any]:
        output = run(params, u)
        return jnp.vdot(output.y, projection) + golden["proj.balance_loss"][0] * output.penalty, output

    (gradient, du), output = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(state, u)
    assert_close(output.y, golden["out.y"])
    assert_close(output.penalty, golden["out.balance_loss"][0])
    assert_close(du, golden["grad.x"])
    expected = jax.tree.leaves_with_path(from_golden(golden, "grad"))
    for (path, reference), value in zip(expected, jax.tree.leaves(nnx.to_pure_dict(gradient)), strict=True):
        assert_close(value, reference), path


def _penalty(config: MoeConfig, logits: jax.Array) -> float:
    penalty = route(config, logits).penalty
    assert penalty is not None
    return float(penalty)


def test_the_penalty_on_logits() -> None:
    logits = np.random.default_rng(0).normal(size=(2, 3, 4))
    config = MoeConfig(num_experts=4, balance_weight=0.0, z_weight=0.5)
    expected = 0.5 * np.mean(np.log(np.sum(np.exp(logits), axis=-1)) ** 2)
    assert_close(route(config, jnp.asarray(logits, jnp.float32)).penalty, np.asarray(expected))
    assert route(dataclasses.replace(config, z_weight=0.0), jnp.zeros((1, 1, 4))).penalty is None


def test_of_equal_logits_the_first_experts_are_chosen_and_even_shares_cost_the_least() -> None:
    config = MoeConfig(num_experts=4, experts_per_token=2, balance_weight=1.0)
    routing = route(config, jnp.zeros((1, 3, 4)))
    assert routing.experts.tolist() == [[[0, 1]] * 3]
    assert routing.weights.tolist() == [[[0.25, 0.25]] * 3]
    assert _penalty(config, jnp.zeros((1, 3, 4))) == 2  # X sum_e f_e / X = K, whatever is chosen
    even = 10 * jnp.roll(jnp.eye(4)[None] + jnp.roll(jnp.eye(4), 1, axis=1)[None], 1, axis=1)
    assert _penalty(config, even) == pytest.approx(2, rel=1e-6)
    # Half of the experts have all.
    assert _penalty(config, jnp.broadcast_to(even[:, :1], even.shape)) == pytest.approx(4, rel=1e-3)


@functools.cache
def _product(block: int) -> Callable[..., Any]:
    """Values and gradients by `ragged_dot` or, with a block of rows, by the form for CPUs."""

    def both(rows: jax.Array, matrices: jax.Array, sizes: jax.Array, dy: jax.Array) -> Any:
        product = products.grouped_product if block else jax.lax.ragged_dot
        y, pullback = jax.vjp(lambda rows, matrices: product(rows, matrices, sizes), rows, matrices)
        return y, pullback(dy)

    return jax.jit(both)


@pytest.mark.parametrize(
    ("sizes", "block"),
    [
        pytest.param((3, 0, 6, 4), 4, id="groups across blocks"),
        pytest.param((13, 0, 0, 0), 4, id="one group"),
        pytest.param((0, 0, 0, 13), 4, id="the last group"),
        pytest.param((4, 4, 4, 1), 4, id="groups of a block"),
        pytest.param((5, 2, 0, 6), 128, id="one block"),
        pytest.param((2, 0, 3, 0), 4, id="rows of no group"),
        pytest.param((0, 0, 0, 0), 4, id="no rows"),
    ],
)
def test_products_of_groups(sizes: tuple[int, ...], block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "BLOCK", block)
    rng = np.random.default_rng(0)
    rows, matrices, dy = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((13, 5), (4, 5, 3), (13, 3)))
    arguments = (rows, matrices, jnp.asarray(sizes, jnp.int32), dy)
    _product.cache_clear()
    found, expected = (jax.tree.leaves(_product(each)(*arguments)) for each in (block, 0))
    # Sums of up to 13 products, each rounded.
    for value, reference in zip(found, expected, strict=True):
        bound = 2 * 13 * 2.0**-24 * float(jnp.max(jnp.abs(reference)))
        np.testing.assert_allclose(value, reference, rtol=0, atol=bound)


CONFIG = MoeConfig(num_experts=4, hidden_dim=8, balance_weight=1.0, z_weight=0.1)


@functools.cache
def _mixer() -> tuple[Any, Any]:
    return nnx.split(Moe(CONFIG, d_model=16, rngs=nnx.Rngs(0)))


def _output_and_gradients(u: jax.Array) -> Any:
    graph, state = _mixer()

    def loss(params: Any, u: jax.Array) -> tuple[jax.Array, Any]:
        output = nnx.merge(graph, params).advance(u)
        return jnp.sum(jnp.sin(output.y)) + output.penalty, (output.y, output.penalty)

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(state, u)


@needs_eight_devices
@pytest.mark.parametrize(
    ("mesh", "batch"),
    [
        pytest.param(MeshConfig(data=1, expert=4, tensor=2), 8, id="expert, tensor"),
        pytest.param(MeshConfig(data=1, fsdp=2, expert=2, sequence=2), 8, id="fsdp, expert, sequence"),
        pytest.param(MeshConfig(data=2, expert=4), 1, id="one row"),
        pytest.param(MeshConfig(data=1, expert=8), 8, id="fewer experts than devices", marks=pytest.mark.slow),
    ],
)
def test_devices_share_out_the_experts(mesh: MeshConfig, batch: int) -> None:
    u = jax.random.normal(jax.random.key(1), (batch, 4, 16))
    alone = _output_and_gradients(u)
    with jax.set_mesh(make_mesh(mesh)):
        shared = _output_and_gradients(u)
    # The same float32 sums over at most 8 x 4 tokens and 16 channels in another order.
    for (path, value), reference in zip(jax.tree.leaves_with_path(shared), jax.tree.leaves(alone), strict=True):
        bound = (32 + 16) * 2.0**-24 * float(np.max(np.abs(reference)))
        np.testing.assert_allclose(value, reference, rtol=0, atol=bound, err_msg=jax.tree_util.keystr(path))


@needs_eight_devices
def test_under_explicit_axes() -> None:
    u = jax.random.normal(jax.random.key(1), (8, 4, 16))
    alone = _output_and_gradients(u)
    with jax.set_mesh(jax.make_mesh((2, 4), ("rows", "time"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)):
        found = _output_and_gradients(jax.device_put(u, jax.P("rows", "time")))
    for value, reference in zip(jax.tree.leaves(found), jax.tree.leaves(alone), strict=True):
        bound = (32 + 16) * 2.0**-24 * float(np.max(np.abs(reference)))
        np.testing.assert_allclose(value, reference, rtol=0, atol=bound)


def test_a_token_does_not_depend_on_the_others_by_a_bit() -> None:
    """On a CPU; what else is in the batch moves the token's rows to another place among those of its experts."""
    graph, state = _mixer()
    run = jax.jit(lambda u: nnx.merge(graph, state)(u))
    u = np.asarray(jax.random.normal(jax.random.key(1), (2, 40, 16)))
    first = run(u)
    np.testing.assert_array_equal(run(u), first)
    others = np.concatenate([u[:1], 3 * u[1:, ::-1] - 1])
    np.testing.assert_array_equal(run(others)[0], first[0])


def test_no_sum_is_taken_in_a_free_order() -> None:
    """A scatter on a GPU adds with atomic operations."""
    graph, state = _mixer()
    u = jnp.zeros((2, 4, 16))
    gradient = jax.jit(jax.grad(lambda state, u: jnp.sum(nnx.merge(graph, state)(u) ** 2), argnums=(0, 1)))
    text = gradient.trace(state, u).lower(lowering_platforms=("cuda",)).as_text()
    assert "ragged_dot" in text
    assert "scatter" not in text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts": 0}, "MoeConfig.num_experts must be positive, got 0"),
        ({"experts_per_token": 0}, "MoeConfig.experts_per_token must be positive, got 0"),
        ({"num_experts": 2, "experts_per_token": 3}, "experts_per_token=3 is more than num_experts=2: change one"),
        ({"hidden_dim": -1}, "MoeConfig.hidden_dim must be positive, got -1"),
        ({"balance_weight": -0.1}, "MoeConfig.balance_weight must not be negative, got -0.1"),
    ],
)
def test_what_no_mixture_can_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        MoeConfig(**fields)
    assert "\n" not in str(caught.value)


def test_penalties_decide_nothing_about_trained_weights() -> None:
    trained = MoeConfig(hidden_dim=2048)
    assert MoeConfig(balance_weight=0.0, z_weight=1.0).decisive(768) == trained.decisive(768)
    assert MoeConfig(normalize_weights=True).decisive(768) != trained.decisive(768)
