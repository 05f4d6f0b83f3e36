"""Edge states of the selective scan in plain JAX: sums over chunks of tokens, in any precision."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.common.array_types import Arrays
from pallas_kernels.common.channels import group_count, per_group
from pallas_kernels.common.discretization import step_size, zero_order_hold_gain
from pallas_kernels.common.rounding import round_up
from pallas_kernels.common.segments import segment_starts
from pallas_kernels.selective_scan.arguments import EdgeState, FinalStateArguments, InitialCotangentArguments

# Tokens per chunk: bounds the (B, chunk, E, N) terms that exist at once if the compiler does not fuse the sum.
_CHUNK = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Direction:
    """Towards which edge of the sequence terms are summed.

    Attributes:
        to_edge: (B, T, ...) of a chunk to the sums from each token to the edge, and those over the whole chunk.
        is_reversed: chunks are taken from the last to the first.
    """

    to_edge: Callable[[jax.Array], tuple[jax.Array, jax.Array]]
    is_reversed: bool


def _to_end(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A token's own step is not on its way to the end, as its input does not decay in it."""
    sums = jax.lax.cumsum(array, axis=1, reverse=True)
    return jnp.pad(sums[:, 1:], ((0, 0), (0, 1), *((0, 0),) * (array.ndim - 2))), sums[:, 0]


def _to_start(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A token's own step is on its way to the start."""
    sums = jax.lax.cumsum(array, axis=1, reverse=False)
    return sums, sums[:, -1]


_FORWARD = _Direction(to_edge=_to_end, is_reversed=False)
_BACKWARD = _Direction(to_edge=_to_start, is_reversed=True)


def final_state(arguments: FinalStateArguments) -> EdgeState:
    """See `pallas_kernels.selective_scan.edge_states.selective_scan_final_state`.

    h_L = sum_t exp(A s_tL) Bbar_t x_t.
    """
    steps_BLE = _steps(arguments)
    weights_BLE = arguments.x.astype(steps_BLE.dtype)
    if arguments.discretization == "euler":
        weights_BLE *= steps_BLE
    gain = zero_order_hold_gain if arguments.discretization == "zoh" else None
    return _sum_to_edge(arguments, _FORWARD, steps_BLE, weights_BLE, arguments.B, gain=gain)


def initial_cotangent(arguments: InitialCotangentArguments) -> EdgeState:
    """See `pallas_kernels.selective_scan.edge_states.selective_scan_initial_cotangent`.

    dh_0 = sum_t exp(A s_0t) C_t silu(z_t) dy_t.
    """
    steps_BLE = _steps(arguments)
    weights_BLE = arguments.dy.astype(steps_BLE.dtype)
    if arguments.z is not None:
        weights_BLE *= jax.nn.silu(arguments.z.astype(steps_BLE.dtype))
    if jnp.issubdtype(arguments.A.dtype, jnp.complexfloating):
        weights_BLE *= 2
    return _sum_to_edge(arguments, _BACKWARD, steps_BLE, weights_BLE, arguments.C, gain=None)


def _steps(arguments: FinalStateArguments | InitialCotangentArguments) -> jax.Array:
    bias = arguments.dt_bias
    return step_size(arguments.dt, None if bias is None else bias[None, None], dt_softplus=arguments.dt_softplus)


def _sum_to_edge(
    arguments: FinalStateArguments | InitialCotangentArguments,
    direction: _Direction,
    steps_BLE: jax.Array,
    weights_BLE: jax.Array,
    matrix: jax.Array,
    *,
    gain: Callable[[jax.Array, jax.Array], jax.Array] | None,
) -> EdgeState:
    """The sum over tokens of exp(A s) gain(dt, A) weight matrix, s the steps between the token and the edge."""
    A, segment_ids = arguments.A, arguments.segment_ids
    batch, _, channels = steps_BLE.shape
    states, groups = A.shape[1], group_count(matrix)
    dtype = jnp.result_type(steps_BLE.dtype, A.dtype)

    def constant(array_EN: jax.Array) -> jax.Array:
        return jnp.swapaxes(array_EN.astype(dtype).reshape(1, 1, groups, -1, states), 3, 4)

    tokens = {"steps": _chunks(steps_BLE), "weights": _chunks(weights_BLE)}
    if matrix.ndim > 2:
        tokens["matrix"] = _chunks(per_group(matrix, groups).astype(dtype))
    if segment_ids is not None:
        tokens["starts"] = _chunks(segment_starts(segment_ids).astype(jnp.int32))
    rates = constant(A)

    def by_group(array_BTE: jax.Array) -> jax.Array:
        return array_BTE.reshape(*array_BTE.shape[:2], groups, 1, -1)

    def advance(state_BGNF: jax.Array, tokens: Arrays) -> tuple[jax.Array, None]:
        to_edge_BTE, total_BE = direction.to_edge(tokens["steps"])
        rows = tokens["matrix"][..., None] if "matrix" in tokens else constant(matrix)
        terms = jnp.exp(by_group(to_edge_BTE) * rates) * (by_group(tokens["weights"]) * rows)
        if gain is not None:
            terms *= gain(by_group(tokens["steps"]), rates)
        state_BGNF = jnp.exp(by_group(total_BE[:, None]) * rates)[:, 0] * state_BGNF
        if "starts" in tokens:
            # What a document's start lies between, and the edge, contributes nothing.
            starts_BT, starts_B = direction.to_edge(tokens["starts"])
            terms = jnp.where(starts_BT[:, :, None, None, None] == 0, terms, 0)
            state_BGNF = jnp.where(starts_B[:, None, None, None] == 0, state_BGNF, 0)
        return state_BGNF + jnp.sum(terms, axis=1), None

    start = jnp.zeros_like(weights_BLE, dtype, (batch, groups, states, channels // groups))
    state_BGNF, _ = jax.lax.scan(advance, start, tokens, reverse=direction.is_reversed)
    return EdgeState(state=jnp.swapaxes(state_BGNF, 2, 3).reshape(batch, channels, states))


def _chunks(array: jax.Array) -> jax.Array:
    """(B, L, ...) to (chunks, B, T, ...), with zeros after the last token."""
    batch, length, *rest = array.shape
    chunk = min(length, _CHUNK) if isinstance(length, int) else _CHUNK
    padding = round_up(length, chunk) - length
    array = jnp.pad(array, ((0, 0), (0, padding), *((0, 0),) * len(rest)))
    return jnp.moveaxis(array.reshape(batch, -1, chunk, *rest), 1, 0)
