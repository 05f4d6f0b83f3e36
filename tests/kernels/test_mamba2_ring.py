"""The Mamba-2 step with a ring of inputs in place of a state that is written for every token."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mamba2_step.api import mamba2_step
from pallas_kernels.mamba2_step.arguments import Mamba2Carry
from pallas_kernels.mamba2_step.triton.tilings import default_tiling
from pallas_kernels.mamba2_step.xla.replay import settled_state
from tests.kernels.test_mamba2_step import (
    LIMIT,
    SHAPES,
    SMALL,
    STATIC,
    Call,
    E,
    G,
    H,
    N,
    by_kernels,
    in_dtype,
    make_call,
    of_published_size,
    shapes_of_call,
)
from tests.kernels.triton_interpreter import compiled, interpreted
from tests.kernels.triton_steps import (
    check_binaries,
    compiled_by,
    drawn,
    interpreter,  # noqa: F401
    on_gpu,
)

RING = 4


def with_ring(call: Call, *, length: int = RING) -> Call:
    """The call with an empty ring, whose places hold what nobody may read."""
    rows, dtype = call.before.residual.shape[0], call.before.window.dtype

    def rubbish(channels: int) -> jax.Array:
        return jnp.full((rows, length, channels), jnp.nan, dtype)

    rings: Any = {"ring_x": rubbish(E), "ring_B": rubbish(G * N), "ring_dt": rubbish(H)}
    return Call(dataclasses.replace(call.before, **rings, ring_length=jnp.zeros(rows, jnp.int32)), call.weights)


def read_tokens(call: Call, step: Any, count: int) -> list[Mamba2Carry]:
    """What a block carries after each of some tokens, whose residual streams are of random directions."""
    carried, found = call.before, []
    for seed in range(count):
        residual = make_call(rows=call.before.residual.shape[0], seed=seed + 1).before.residual
        carried = step(dataclasses.replace(carried, residual=jnp.asarray(residual, jnp.float32)))
        found.append(carried)
    return found


def check_replay(call: Call, step: Any, plain: Any) -> None:
    """Reads tokens with a ring and without; rows fill their rings at different times."""
    start = with_ring(call)
    before = step(dataclasses.replace(start.before, residual=call.before.residual))
    # The second row is replaced by one with an empty ring.
    before = jax.tree.map(lambda new, old: new.at[1].set(old[1]), before, start.before)
    settled = plain(dataclasses.replace(call.before, residual=call.before.residual))
    settled = jax.tree.map(lambda new, old: new.at[1].set(old[1]), settled, call.before)
    found = read_tokens(Call(before, call.weights), step, 2 * RING)
    expected = read_tokens(Call(settled, call.weights), plain, 2 * RING)
    state = call.before.state
    for index, (ring, right) in enumerate(zip(found, expected, strict=True)):
        for name in ("residual", "window", "BC_window"):
            right_one = np.asarray(getattr(right, name))
            # Both are float32, and add the same terms in another order.
            np.testing.assert_allclose(getattr(ring, name), right_one, rtol=0, atol=1e-5 * np.abs(right_one).max())
        assert np.asarray(ring.ring_length).tolist()[:2] == [(index + 2) % RING, (index + 1) % RING]
        is_full = np.asarray(ring.ring_length) == 0
        np.testing.assert_array_equal(np.asarray(ring.state)[~is_full], np.asarray(state)[~is_full])
        atol = 1e-5 * np.abs(right.state).max()
        np.testing.assert_allclose(np.asarray(ring.state)[is_full], np.asarray(right.state)[is_full], rtol=0, atol=atol)
        state = ring.state
        after = settled_state(
            ring.state,
            {name: getattr(ring, name) for name in ("ring_x", "ring_B", "ring_dt", "ring_length")},
            A_log_H=call.weights.A_log,
            dt_bias_H=call.weights.dt_bias,
            dt_limit=LIMIT,
        )
        np.testing.assert_allclose(after, right.state, rtol=0, atol=atol)


def test_a_ring_stands_for_a_state_that_is_written() -> None:
    call = in_dtype(make_call(rows=3), "float32")
    step = jax.jit(lambda before: mamba2_step(before, call.weights, **STATIC))
    check_replay(call, step, step)


def test_part_of_a_ring_is_refused() -> None:
    call = with_ring(in_dtype(make_call(rows=2), "float32"))
    with pytest.raises(ValueError, match="a ring lacks one of its arrays"):
        mamba2_step(dataclasses.replace(call.before, ring_dt=None), call.weights, **STATIC)
    wide = jnp.zeros((2, RING, G * N + 1))
    with pytest.raises(ValueError, match="ring_B has 21 channels, expected G N = 20"):
        mamba2_step(dataclasses.replace(call.before, ring_B=wide), call.weights, **STATIC)


@interpreted
@pytest.mark.usefixtures("interpreter")
def test_interpreted_ring() -> None:
    call = in_dtype(make_call(rows=3), "float32")

    def step(before: Mamba2Carry) -> Mamba2Carry:
        return by_kernels(Call(before, call.weights), SMALL)

    check_replay(call, step, lambda before: mamba2_step(before, call.weights, **STATIC))


def shapes_with_ring(rows: int, state: Any) -> Call:
    """Shapes of a call of 2.7B with a ring of 16."""
    call, (width, heads) = shapes_of_call(rows, *SHAPES["2.7b"], state=state), SHAPES["2.7b"]

    def half(channels: int) -> Any:
        return jax.ShapeDtypeStruct((rows, 16, channels), jnp.bfloat16)

    rings: Any = {"ring_x": half(2 * width), "ring_B": half(128), "ring_dt": half(heads)}
    length: Any = jax.ShapeDtypeStruct((rows,), jnp.int32)
    return Call(dataclasses.replace(call.before, **rings, ring_length=length), call.weights)


@compiled
@pytest.mark.parametrize("state", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [16, 128])
def test_kernels_compile(rows: int, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    binaries, call = compiled_by(monkeypatch), shapes_with_ring(rows, state)
    tiling = default_tiling(rows, width=SHAPES["2.7b"][0], has_ring=True)
    jax.eval_shape(functools.partial(of_published_size, tiling), call.before, call.weights)
    assert {"advance_ring", "score_ring"} <= binaries.keys()
    assert "advance" not in binaries
    check_binaries(binaries)


@on_gpu
def test_values_on_a_gpu() -> None:
    call = in_dtype(make_call(rows=3), "float32")

    def step(before: Mamba2Carry) -> Mamba2Carry:
        return by_kernels(Call(before, call.weights))

    check_replay(call, jax.jit(step), jax.jit(lambda before: mamba2_step(before, call.weights, **STATIC)))


@on_gpu
@pytest.mark.parametrize("rows", [1, 16, 128])
def test_a_full_ring_of_a_published_size_on_a_gpu(rows: int) -> None:
    """The last token of a ring, by kernels and in plain JAX; both round to bfloat16 in the same places."""
    shapes = shapes_with_ring(rows, "float32")
    before, weights = drawn((shapes.before, shapes.weights))
    before = dataclasses.replace(before, ring_length=jnp.full(rows, 15, jnp.int32))
    static = STATIC | {"group_size": weights.gated_norm_scale.shape[0]}
    found = jax.jit(functools.partial(of_published_size, None))(before, weights)
    expected = jax.jit(functools.partial(mamba2_step, **static, implementation="xla"))(before, weights)
    for name, at_start in (("residual", before.residual), ("state", 0 * before.state)):
        difference = np.asarray(getattr(found, name) - getattr(expected, name))
        relative = np.linalg.norm(difference) / np.linalg.norm(np.asarray(getattr(expected, name) - at_start))
        assert relative < 2.0**-6, (name, relative)
