"""Edge states of the selective scan in plain JAX: sums over chunks of tokens, in any precision."""

import jax
import jax.numpy as jnp

from pallas_kernels.common.discretization import step_size, zero_order_hold_gain
from pallas_kernels.selective_scan.argument_layout import group_count, per_group, round_up, segment_starts
from pallas_kernels.selective_scan.arguments import Discretization
from pallas_kernels.selective_scan.xla.pointwise import Tree

# Tokens whose terms, N times as many as inputs, exist together where a compiler does not fuse the sum over them.
_CHUNK = 64


def edge_state(
    arrays: Tree,
    segment_ids: jax.Array | None,
    *,
    dt_softplus: bool,
    discretization: Discretization,
    backwards: bool,
) -> jax.Array:
    """See `pallas_kernels.selective_scan.edge_states`; backwards "x" is dy."""
    A, matrix, dt_bias = arrays["A"], arrays["B"], arrays.get("dt_bias")
    batch, length, channels = arrays["x"].shape
    states, groups = A.shape[1], group_count(matrix)
    steps_BLE = step_size(arrays["dt"], None if dt_bias is None else dt_bias[None, None], dt_softplus=dt_softplus)
    weights_BLE = arrays["x"].astype(steps_BLE.dtype)
    if "z" in arrays:
        weights_BLE *= jax.nn.silu(arrays["z"].astype(steps_BLE.dtype))
    if backwards and jnp.issubdtype(A.dtype, jnp.complexfloating):
        weights_BLE *= 2
    if not backwards and discretization == "euler":
        weights_BLE *= steps_BLE
    dtype = jnp.result_type(steps_BLE.dtype, A.dtype)

    def constant(array_EN: jax.Array) -> jax.Array:
        return jnp.swapaxes(array_EN.astype(dtype).reshape(1, 1, groups, -1, states), 3, 4)

    chunk = min(length, _CHUNK) if isinstance(length, int) else _CHUNK
    padding = round_up(length, chunk) - length

    def chunks(array: jax.Array) -> jax.Array:
        array = jnp.pad(array, ((0, 0), (0, padding), *((0, 0),) * (array.ndim - 2)))
        return jnp.moveaxis(array.reshape(batch, -1, chunk, *array.shape[2:]), 1, 0)

    tokens = {"steps": chunks(steps_BLE), "weights": chunks(weights_BLE)}
    if matrix.ndim > 2:
        tokens["matrix"] = chunks(per_group(matrix, groups).astype(dtype))
    if segment_ids is not None:
        tokens["starts"] = chunks(segment_starts(segment_ids).astype(jnp.int32))
    rates = constant(A)

    def by_group(array_BTE: jax.Array) -> jax.Array:
        return array_BTE.reshape(*array_BTE.shape[:2], groups, 1, -1)

    def advance(state_BGNF: jax.Array, tokens: Tree) -> tuple[jax.Array, None]:
        to_edge_BTE, total_BE = _to_edge(tokens["steps"], backwards=backwards)
        rows = tokens["matrix"][..., None] if "matrix" in tokens else constant(matrix)
        terms = jnp.exp(by_group(to_edge_BTE) * rates) * (by_group(tokens["weights"]) * rows)
        if not backwards and discretization == "zoh":
            terms *= zero_order_hold_gain(by_group(tokens["steps"]), rates)
        state_BGNF = jnp.exp(by_group(total_BE[:, None]) * rates)[:, 0] * state_BGNF
        if "starts" in tokens:
            starts_BT, starts_B = _to_edge(tokens["starts"], backwards=backwards)
            terms = jnp.where(starts_BT[:, :, None, None, None] == 0, terms, 0)
            state_BGNF = jnp.where(starts_B[:, None, None, None] == 0, state_BGNF, 0)
        return state_BGNF + jnp.sum(terms, axis=1), None

    start = jnp.zeros_like(weights_BLE, dtype, (batch, groups, states, channels // groups))
    state_BGNF, _ = jax.lax.scan(advance, start, tokens, reverse=backwards)
    return jnp.swapaxes(state_BGNF, 2, 3).reshape(batch, channels, states)


def _to_edge(array: jax.Array, *, backwards: bool) -> tuple[jax.Array, jax.Array]:
    """Sums of a chunk's (B, T, ...) from each token to the edge, and over the whole chunk.

    Forward a token's own step is not on its way to the end, as its input does not decay in it.
    """
    sums = jax.lax.cumsum(array, axis=1, reverse=not backwards)
    if backwards:
        return sums, sums[:, -1]
    return jnp.pad(sums[:, 1:], ((0, 0), (0, 1), *((0, 0),) * (array.ndim - 2))), sums[:, 0]
