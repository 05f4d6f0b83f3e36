"""The layers every model is built from. Parameters carry their logical axes and whether weight decay applies."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from mamba_jax.models import initializers
from mamba_jax.models.initializers import Initializer
from mamba_jax.models.mixers.declaration import Setting
from mamba_jax.models.storage.matrix import Matrix, columns_of, product_with, read_matrix, rows_of
from mamba_jax.sharding import Axis, in_context, placed_like

# Rematerialisation policies know the results of projections by this name.
PROJECTION = "projection"


def parameter(
    rngs: nnx.Rngs,
    initializer: Initializer,
    shape: tuple[int, ...],
    axes: tuple[Axis | None, ...],
    *,
    dtype: str,
    decay: bool,
    summed: int | None = None,
) -> nnx.Param:
    """A parameter with its metadata.

    Args:
        rngs: source of the key.
        initializer: draws the initial value.
        shape: shape of the value.
        axes: logical axis of every dimension.
        dtype: dtype of the value.
        decay: whether weight decay applies.
        summed: for a matrix that is read by `read_matrix`, and so may be in int8, the dimension that products with it
            sum over.
    """
    value = initializer(rngs.params(), shape, jnp.dtype(dtype))
    return nnx.Param(value, axes=axes, decay=decay, summed=summed)


def read(param: nnx.Param) -> jax.Array:
    """The value of a parameter, for use under the mesh of the context."""
    return in_context(param[...])


class Linear(nnx.Module):
    """y = x W + b, contracting the last dimension of x with the first of W; W may have several output dimensions."""

    def __init__(
        self,
        shape: tuple[int, ...],
        axes: tuple[Axis | None, ...],
        *,
        kernel_init: Initializer,
        bias_init: Initializer | None,
        param_dtype: str,
        compute_dtype: str,
        rngs: nnx.Rngs,
    ) -> None:
        self.kernel = parameter(rngs, kernel_init, shape, axes, dtype=param_dtype, decay=True, summed=0)
        if bias_init is not None:
            self.bias = parameter(rngs, bias_init, shape[1:], axes[1:], dtype=param_dtype, decay=False)
        self.has_bias, self.num_parts = bias_init is not None, shape[1]
        self.compute_dtype = compute_dtype

    def __call__(self, x: Float[jax.Array, "... I"]) -> Float[jax.Array, "..."]:
        """Maps (..., I) to (..., O) or (..., O1, O2), in the compute dtype."""
        return self._applied(x, read_matrix(self.kernel), read(self.bias) if self.has_bias else None)

    def parts(self, x: Float[jax.Array, "... I"]) -> tuple[Float[jax.Array, "... O"], ...]:
        """The outputs for each index of W's second dimension, a product each: none is cut out of a larger array."""
        kernel, bias = read_matrix(self.kernel), read(self.bias) if self.has_bias else None
        return tuple(
            self._applied(x, columns_of(kernel, index), None if bias is None else bias[index])
            for index in range(self.num_parts)
        )

    def _applied(self, x: jax.Array, kernel: Matrix, bias: jax.Array | None) -> jax.Array:
        y = product_with(x, kernel, dtype=self.compute_dtype)
        if bias is not None:
            bias = bias.astype(self.compute_dtype)
            y = y + placed_like(bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape), y)
        return checkpoint_name(y, PROJECTION)


def projection(
    setting: Setting,
    shape: tuple[int, ...],
    axes: tuple[Axis | None, ...],
    *,
    use_bias: bool = False,
    scale: float = 1.0,
    rngs: nnx.Rngs,
) -> Linear:
    """A `Linear` as mixers begin with it: weights uniform within +-scale / sqrt(shape[0]), and a bias of zeros if any.

    Args:
        setting: dtypes of the mixer.
        shape: shape of the weights, the contracted dimension first.
        axes: logical axis of every dimension.
        use_bias: whether it has a bias.
        scale: factor on the initial weights.
        rngs: source of the key.
    """
    return Linear(
        shape,
        axes,
        kernel_init=initializers.fan_in(shape[0], scale=scale),
        bias_init=initializers.zeros if use_bias else None,
        param_dtype=setting.param_dtype,
        compute_dtype=setting.compute_dtype,
        rngs=rngs,
    )


def rms_normalized(x: Float[jax.Array, "..."], *, eps: float) -> Float[jax.Array, "..."]:
    """The last dimension over its root mean square: x / sqrt(mean(x^2) + eps), in float32 (arXiv 1910.07467)."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


class RMSNorm(nnx.Module):
    """y = x / sqrt(mean(x^2) + eps) * (offset + scale), with float32 statistics (arXiv 1910.07467).

    Offset and scale are 1 together at first.
    """

    def __init__(self, dim: int, *, eps: float, offset: float = 0.0, param_dtype: str, rngs: nnx.Rngs) -> None:
        init = initializers.constant(1.0 - offset)
        self.scale = parameter(rngs, init, (dim,), (Axis.EMBED,), dtype=param_dtype, decay=False)
        self.eps, self.offset = eps, offset

    def __call__(self, x: Float[jax.Array, "B L D"], *, dtype: str) -> Float[jax.Array, "B L D"]:
        """Normalises the last dimension and rounds the result to `dtype`."""
        scale = read(self.scale).astype(jnp.float32)[None, None]
        return (rms_normalized(x, eps=self.eps) * (scale + self.offset if self.offset else scale)).astype(dtype)


class Embedding(nnx.Module):
    """A table of token vectors, (V, D); ids outside the table give NaN rather than another token's vector."""

    def __init__(
        self, vocab_size: int, dim: int, *, initializer: Initializer, param_dtype: str, rngs: nnx.Rngs
    ) -> None:
        axes = (Axis.VOCAB, Axis.EMBED)
        self.table = parameter(rngs, initializer, (vocab_size, dim), axes, dtype=param_dtype, decay=True, summed=1)

    def __call__(self, tokens: Int[jax.Array, "B L"]) -> Float[jax.Array, "B L D"]:
        """Looks up the vectors of `tokens`, in float32."""
        return rows_of(read_matrix(self.table), tokens)
