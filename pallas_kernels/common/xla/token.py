"""What blocks compute alike of one token, in plain JAX."""

import jax
import jax.numpy as jnp


def wide(array: jax.Array, residual: jax.Array) -> jax.Array:
    """In float32, or float64 where the residual stream is."""
    return array.astype(jnp.result_type(jnp.float32, residual.dtype))


def product(x: jax.Array, weight: jax.Array, scale: jax.Array | None = None) -> jax.Array:
    """Contracts the last dimension with the first; summed in float32 and rounded to the dtype of x.

    Args:
        x: (B, terms).
        weight: (terms, *columns).
        scale: (*columns), of weights in int8.
    """
    if scale is None:
        return jnp.tensordot(x, weight, axes=1)
    wide_dtype = jnp.promote_types(x.dtype, jnp.float32)
    y = jnp.tensordot(x, weight.astype(x.dtype), axes=1, preferred_element_type=wide_dtype)
    return (y * scale[None]).astype(x.dtype)


def over_root_mean_square(x: jax.Array, eps: float) -> jax.Array:
    """X / sqrt(mean(x^2) + eps) over the last dimension."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


def normalized(residual_BD: jax.Array, scale_D: jax.Array, *, eps: float, dtype: jax.typing.DTypeLike) -> jax.Array:
    """(B, D), the residual stream over its root mean square, scaled, in the compute dtype."""
    u_BD = over_root_mean_square(wide(residual_BD, residual_BD), eps) * wide(scale_D, residual_BD)[None]
    return u_BD.astype(dtype)


def convolved(
    x_BE: jax.Array, window_BWE: jax.Array, *, weight_KE: jax.Array, bias_E: jax.Array, residual: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What convolution and SiLU make of x, and the window with x at its end; as wide as the residual stream."""
    inputs_BKE = jnp.concatenate([window_BWE.astype(x_BE.dtype), x_BE[:, None]], axis=1)
    taps_BKE = wide(inputs_BKE, residual) * wide(weight_KE, residual)[None]
    sum_BE = jnp.sum(taps_BKE, axis=1) + wide(bias_E, residual)[None]
    return jax.nn.silu(sum_BE).astype(x_BE.dtype), inputs_BKE[:, 1:].astype(window_BWE.dtype)
