"""The output gate of a Mamba-2 mixer, and its norm."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from mamba_jax.models.initializers import ones
from mamba_jax.models.layers import parameter, read, rms_normalized
from mamba_jax.sharding import Axis, in_groups


class GatedRMSNorm(nnx.Module):
    """norm(y silu(z)), or norm(y) silu(z), with norm(v) = v / sqrt(mean(v^2) + eps) scale over groups of channels.

    Statistics are float32.

    Source: arXiv 2405.21060, section 7.1.
    """

    def __init__(
        self, channels: int, *, group_size: int, eps: float, is_before_gate: bool, param_dtype: str, rngs: nnx.Rngs
    ) -> None:
        self.scale = parameter(rngs, ones, (channels,), (Axis.INNER,), dtype=param_dtype, decay=False)
        self.group_size, self.eps, self.is_before_gate = group_size, eps, is_before_gate

    def __call__(self, y: Float[jax.Array, "B L E"], z: Float[jax.Array, "B L E"]) -> Float[jax.Array, "B L E"]:
        """Gates y by z; the result has the dtype of y."""
        return self._gated(read(self.scale), y, z)

    # The backward pass computes the float32 values once more from y and z, which are kept for other uses as they are:
    # an element costs less to compute than to write and read. A compiler that shares them instead loses memory only.
    @functools.partial(jax.checkpoint, static_argnums=0, prevent_cse=False)
    def _gated(self, scale: jax.Array, y: jax.Array, z: jax.Array) -> jax.Array:
        gate, value = jax.nn.silu(z.astype(jnp.float32)), y.astype(jnp.float32)
        if self.is_before_gate:
            return (self._norm(scale, value) * gate).astype(y.dtype)
        return self._norm(scale, value * gate).astype(y.dtype)

    def _norm(self, scale: jax.Array, v: jax.Array) -> jax.Array:
        normed = rms_normalized(in_groups(v, self.group_size), eps=self.eps)
        return normed.reshape(v.shape) * scale.astype(jnp.float32)[None, None]
