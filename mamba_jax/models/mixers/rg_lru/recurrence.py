r"""The real-gated linear recurrent unit.

    r_t, i_t = sigmoid(W_a x_t + b_a), sigmoid(W_x x_t + b_x)
    a_t      = exp(-8 softplus(Lambda) r_t)
    h_t      = a_t h_{t-1} + sqrt(1 - a_t^2) i_t x_t,    and i_t x_t at the first token of a document

This is the selective scan with one state: step r_t, rate A = -8 softplus(Lambda), B = C = 1. The scan multiplies its
input by the step, so it is given i_t x_t sqrt(1 - a_t^2) / r_t. Nothing is lost by this detour. The gradients of r_t
that come through the step and through the quotient cancel to about half of either where a_t is near 1, since
sqrt(1 - a^2) grows as sqrt(r); and where a_t is small, what they leave is at most one rounding of the gradient of i_t.
tests/models/test_rg_lru.py holds values and every gradient to float64, for r down to 1e-15 and Lambda from -16 to 10.
So every backend, the exchange between devices that share a sequence, and the backward pass are those of the scan.

Source: arXiv 2402.19427, section 2.4.
"""

import dataclasses
import functools
import typing
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float, Int

from mamba_jax.models import initializers, ops
from mamba_jax.models.layers import parameter, read
from mamba_jax.models.mixers.rg_lru.state import NO_TOKEN
from mamba_jax.sharding import Axis, in_groups, placed_like, product_of_groups, whole
from pallas_kernels.common.array_types import Size
from pallas_kernels.common.segments import segment_starts

# c, the power that an open recurrence gate raises sigmoid(-Lambda) to.
POWER = 8.0
# Below it a is 1 in float32, and inputs enter with less than 1e-8 of their size; what divides by r^2 stays finite.
LEAST_STEP = 1e-18


# Not checked at construction: JAX also builds this class around what is no array.
@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RecurrenceOutput:
    """Result of the recurrence.

    Attributes:
        hidden: h after every token, (B, L, E).
        final: h after the last one, (B, E).
    """

    hidden: Float[jax.Array, "B L E"]
    final: Float[jax.Array, "B E"]


class RealGatedLRU(nnx.Module):
    """The unit of the module's equations: `gates` (W_a and W_x with their biases) and `Lambda`, (E,)."""

    def __init__(
        self, channels: int, *, heads: int, decay_range: tuple[float, float], param_dtype: str, rngs: nnx.Rngs
    ) -> None:
        self.gates = BlockDiagonal(heads, channels // heads, outputs=2, param_dtype=param_dtype, rngs=rngs)
        init = initializers.inverse_softplus_of_decay(*decay_range, power=POWER)
        self.Lambda = parameter(rngs, init, (channels,), (Axis.INNER,), dtype=param_dtype, decay=False)

    def __call__(
        self,
        x_BLE: Float[jax.Array, "B L E"],
        hidden_BE: Float[jax.Array, "B E"] | None = None,
        segment_ids_BL: Int[jax.Array, "B L"] | None = None,
        **options: Any,
    ) -> RecurrenceOutput:
        """Runs the recurrence over a sequence, in float32 (float64 if x is).

        Args:
            x_BLE: input, (B, L, E).
            hidden_BE: h before the first token, `NO_TOKEN` where there is none; None is none anywhere.
            segment_ids_BL: document of each token, (B, L); None is one document.
            **options: of `ops.selective_scan`: `past`, `implementation`.
        """
        gates_BLGE = self.gates(x_BLE)
        rates_E = -POWER * jax.nn.softplus(read(self.Lambda).astype(gates_BLGE.dtype))
        is_first = _first_tokens(x_BLE.shape[1], hidden_BE, segment_ids_BL)
        steps_BLE, inputs_BLE = _prepare(gates_BLGE, x_BLE, rates_E, is_first)
        if hidden_BE is not None:
            hidden_BE = jnp.where(hidden_BE == NO_TOKEN, 0, hidden_BE)
        if x_BLE.shape[1] == 1:
            return _one_token(steps_BLE[:, 0], inputs_BLE[:, 0], rates_E, hidden_BE)
        ones_BLN = jnp.ones((*x_BLE.shape[:2], 1), steps_BLE.dtype)
        output = ops.selective_scan(
            x=ops.constrain(inputs_BLE, "BLE"),
            dt=ops.constrain(steps_BLE, "BLE"),
            A=rates_E[:, None],
            B=ones_BLN,
            C=ones_BLN,
            initial_state=None if hidden_BE is None else hidden_BE[:, :, None],
            segment_ids=segment_ids_BL,
            **options,
        )
        return RecurrenceOutput(hidden=output.y, final=output.final_state[:, :, 0])


class BlockDiagonal(nnx.Module):
    """y = W x + b with W block-diagonal, several times: `kernel` (H, P, G, P) and `bias` (H, G, P) for G outputs.

    The weights begin normal with variance 1 / P, the biases zero. The result is float32.
    """

    def __init__(self, heads: int, size: int, *, outputs: int, param_dtype: str, rngs: nnx.Rngs) -> None:
        axes, init = (Axis.HEADS, None, None, None), initializers.normal(size**-0.5)
        self.kernel = parameter(rngs, init, (heads, size, outputs, size), axes, dtype=param_dtype, decay=True)
        shape = (heads, outputs, size)
        self.bias = parameter(rngs, initializers.zeros, shape, axes[:1] + axes[2:], dtype=param_dtype, decay=False)

    def __call__(self, x_BLE: Float[jax.Array, "B L E"]) -> Float[jax.Array, "B L G E"]:
        """The G results, (B, L, G, E); products are of the dtype of x and summed in float32 (float64 if x is)."""
        kernel_HPGP = read(self.kernel).astype(x_BLE.dtype)
        y_BLHGP = product_of_groups(ops.constrain(in_groups(x_BLE, kernel_HPGP.shape[1]), "BLHP"), kernel_HPGP)
        y_BLHGP += placed_like(read(self.bias).astype(y_BLHGP.dtype)[None, None], y_BLHGP)
        y_BLGHP = jnp.swapaxes(y_BLHGP, 2, 3)
        return y_BLGHP.reshape(*y_BLGHP.shape[:3], -1)


def _first_tokens(
    length: Size, hidden_BE: jax.Array | None, segment_ids_BL: jax.Array | None
) -> Bool[jax.Array, "#B L #E"]:
    """Where a document starts."""
    is_first = (jnp.arange(length) == 0)[None, :, None]
    if hidden_BE is not None:
        is_first &= (hidden_BE == NO_TOKEN)[:, None]
    if segment_ids_BL is not None:
        is_first |= segment_starts(whole(segment_ids_BL, 1))[:, :, None]
    return is_first


# The backward pass computes the float32 values once more from the gates and x: an element costs less to compute than to
# write and read. A compiler that shares them instead loses memory only.
@functools.partial(jax.checkpoint, prevent_cse=False)
def _prepare(
    gates_BLGE: jax.Array, x_BLE: jax.Array, rates_E: jax.Array, is_first: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Step and input of the scan, (B, L, E): their product is what enters the state.

    The derivative of sqrt(1 - a^2) is unbounded at a = 1, those by W_a, b_a and Lambda go to zero there; so it is zero
    where 1 - a^2 is.
    """
    gates_BLGE = jax.nn.sigmoid(gates_BLGE)
    r_BLE = jnp.maximum(gates_BLGE[:, :, 0], LEAST_STEP)
    squared_BLE = -jnp.expm1(2 * r_BLE * rates_E[None, None])
    is_positive = squared_BLE > 0
    factor_BLE = jnp.where(is_positive, jnp.sqrt(jnp.where(is_positive, squared_BLE, 1)), 0)
    gain_BLE = jnp.where(is_first, 1, factor_BLE / r_BLE)
    # A first token has no past to decay; a step of one keeps its input as it is.
    return jnp.where(is_first, 1, r_BLE), gain_BLE * gates_BLGE[:, :, 1] * x_BLE.astype(gates_BLGE.dtype)


def _one_token(
    steps_BE: jax.Array, inputs_BE: jax.Array, rates_E: jax.Array, hidden_BE: jax.Array | None
) -> RecurrenceOutput:
    """The recurrence of a single token."""
    entering_BE = steps_BE * inputs_BE
    if hidden_BE is not None:
        entering_BE += jnp.exp(steps_BE * rates_E[None]) * hidden_BE
    return RecurrenceOutput(hidden=entering_BE[:, None], final=entering_BE)
