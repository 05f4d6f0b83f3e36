"""Edge states of the selective scan in plain JAX: sums over chunks of tokens, in any precision."""

import jax
import jax.numpy as jnp

from pallas_kernels.selective_scan.argument_layout import group_count, per_group, round_up, segment_starts
from pallas_kernels.selective_scan.discretization import step_size, zero_order_hold_gain
from pallas_kernels.selective_scan.signature import Discretization

# Tokens whose terms, N times as many as inputs, exist together where a compiler does not fuse the sum over them.
_CHUNK = 64


def edge_state(
    inputs: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    matrix: jax.Array,
    *,
    z: jax.Array | None,
    dt_bias: jax.Array | None,
    dt_softplus: bool,
    discretization: Discretization,
    segment_ids: jax.Array | None,
    backwards: bool,
) -> jax.Array:
    """See `pallas_kernels.selective_scan.edge_states`; `inputs` and `matrix` are x and B, or backwards dy and C."""
    batch, length, channels = inputs.shape
    states, groups = A.shape[1], group_count(matrix)
    steps_BLE = step_size(dt, None if dt_bias is None else dt_bias[None, None], dt_softplus=dt_softplus)
    weights_BLE = inputs.astype(steps_BLE.dtype)
    if z is not None:
        weights_BLE *= jax.nn.silu(z.astype(steps_BLE.dtype))
    if backwards and jnp.issubdtype(A.dtype, jnp.complexfloating):
        weights_BLE *= 2
    if not backwards and discretization == "euler":
        weights_BLE *= steps_BLE
    dtype = jnp.result_type(steps_BLE.dtype, A.dtype)

    def constant(array_EN: jax.Array) -> jax.Array:
        return jnp.swapaxes(array_EN.astype(dtype).reshape(1, 1, groups, -1, states), 3, 4)

    chunk = min(length, _CHUNK)
    padding = round_up(length, chunk) - length

    def chunks(array: jax.Array) -> jax.Array:
        array = jnp.pad(array, ((0, 0), (0, padding), *((0, 0),) * (array.ndim - 2)))
        return jnp.moveaxis(array.reshape(batch, -1, chunk, *array.shape[2:]), 1, 0)

    tokens = {"steps": chunks(steps_BLE), "weights": chunks(weights_BLE)}
    if matrix.ndim > 2:
        tokens["matrix"] = chunks(per_group(matrix, groups).astype(dtype))
    if segment_ids is not None:
        tokens["starts"] = chunks(segment_starts(segment_ids))
    rates = constant(A)

    def by_group(array_BTE: jax.Array) -> jax.Array:
        return array_BTE.reshape(*array_BTE.shape[:2], groups, 1, -1)

    def advance(state_BGNF: jax.Array, tokens: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        to_edge_BTE = jax.lax.cumsum(tokens["steps"], axis=1, reverse=not backwards)
        total_BE = to_edge_BTE[:, -1 if backwards else 0]
        if not backwards:
            # A token's input does not decay in its own step.
            to_edge_BTE = jnp.pad(to_edge_BTE[:, 1:], ((0, 0), (0, 1), (0, 0)))
        rows = tokens["matrix"][..., None] if "matrix" in tokens else constant(matrix)
        terms = jnp.exp(by_group(to_edge_BTE) * rates) * (by_group(tokens["weights"]) * rows)
        if not backwards and discretization == "zoh":
            terms *= zero_order_hold_gain(by_group(tokens["steps"]), rates)
        state_BGNF = jnp.exp(by_group(total_BE[:, None]) * rates)[:, 0] * state_BGNF
        if "starts" in tokens:
            counts_BT, keeps_B = _reaching_the_edge(tokens["starts"], backwards=backwards)
            terms = jnp.where(counts_BT[:, :, None, None, None], terms, 0)
            state_BGNF = jnp.where(keeps_B[:, None, None, None], state_BGNF, 0)
        return state_BGNF + jnp.sum(terms, axis=1), None

    start = jnp.zeros((batch, groups, states, channels // groups), dtype)
    state_BGNF, _ = jax.lax.scan(advance, start, tokens, reverse=backwards)
    return jnp.swapaxes(state_BGNF, 2, 3).reshape(batch, channels, states)


def _reaching_the_edge(starts_BT: jax.Array, *, backwards: bool) -> tuple[jax.Array, jax.Array]:
    """Which tokens of a chunk have no segment's start between them and the edge, and whether the chunk has none."""
    if backwards:
        return jnp.cumsum(starts_BT, axis=1) == 0, ~jnp.any(starts_BT, axis=1)
    after_BT = jnp.pad(starts_BT[:, 1:], ((0, 0), (0, 1)))
    return jax.lax.cumsum(after_BT.astype(jnp.int32), axis=1, reverse=True) == 0, ~jnp.any(starts_BT, axis=1)
