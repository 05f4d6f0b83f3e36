"""What layers do with a matrix of weights: an array, int8 values with scales, or either with a low-rank adapter."""

import dataclasses
import typing
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from mamba_jax.models.lookup import look_up
from mamba_jax.sharding import Axis, constrain, in_context, placed_like, product, sharding_of_rows


@runtime_checkable
class Quantized(Protocol):
    """A matrix in int8: weight = qvalue * scale. `qwix.QArray` is one.

    Attributes:
        qvalue: int8, of the shape of the weights.
        scale: float32, of that shape, but for the dimension that products sum over, which is 1.
    """

    @property
    def qvalue(self) -> jax.Array:
        """The integers."""
        ...

    @property
    def scale(self) -> jax.Array:
        """What they are multiples of."""
        ...


# Not checked at construction: JAX also builds this class around shapes, shardings and logical axes.
@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRank:
    """A matrix and its adapter, W + scale A B, which stands in trees where the matrix would.

    Attributes:
        base: W, (I, *O), an array or in int8.
        lora_a: A, (I, r).
        lora_b: B, (r, *O).
        scale: alpha / r.

    Source: arXiv 2106.09685, equation 3.
    """

    base: Any
    lora_a: jax.Array
    lora_b: jax.Array
    scale: float = dataclasses.field(metadata={"static": True})


Matrix = jax.Array | Quantized | LowRank


def read_matrix(param: nnx.Param) -> Matrix:
    """The value of a parameter that may be quantised, for use under the mesh of the context."""
    return jax.tree.map(in_context, param.get_value())


def narrowed(params: Any, dtype: str) -> Any:
    """A tree of parameters whose matrices are rounded to a dtype that is narrower than theirs; products are the same.

    Args:
        params: tree of `nnx.Param`. Matrices in int8 or with an adapter stay as they are.
        dtype: of the products.
    """

    def one(param: Any) -> Any:
        value = param.get_value()
        is_matrix = param.get_metadata().get("summed") is not None and isinstance(value, jax.Array)
        if not is_matrix or jnp.finfo(value.dtype).bits <= jnp.finfo(dtype).bits:
            return param
        return param.replace(value.astype(dtype))

    return jax.tree.map(one, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def columns_of(kernel: Matrix, index: int) -> Matrix:
    """The matrix (I, *O) of those columns of a matrix (I, P, *O) whose second index is given."""
    if isinstance(kernel, LowRank):
        return dataclasses.replace(kernel, base=columns_of(kernel.base, index), lora_b=kernel.lora_b[:, index])
    return jax.tree.map(lambda array: array[:, index], kernel)


def product_with(x: Float[jax.Array, "... I"], kernel: Matrix, *, dtype: str) -> Float[jax.Array, "..."]:
    """The product x W, summed over the last dimension of x and the first of W, in `dtype`.

    A quantised matrix is never multiplied out. Integers of 8 bits are exact in `dtype`, and the scale, which the sum
    does not depend on, is applied in float32 to the result:

        y = (x q) s

    A compiler reads q where it lies, one byte for a weight, and converts it within the product.

    Nor is an adapter: y = x W + scale (x A) B.

    Args:
        x: (..., I).
        kernel: W, (I, *O).
        dtype: of both factors of the product, and of the result; the compute dtype.
    """
    x = x.astype(dtype)
    if isinstance(kernel, LowRank):
        of_adapter = product(product(x, kernel.lora_a.astype(dtype)), kernel.lora_b.astype(dtype))
        return product_with(x, kernel.base, dtype=dtype) + kernel.scale * of_adapter
    if not isinstance(kernel, Quantized):
        return product(x, kernel.astype(dtype))
    y = product(x, kernel.qvalue.astype(dtype), dtype=jnp.promote_types(dtype, jnp.float32))
    scale = kernel.scale.reshape((1,) * (x.ndim - 1) + kernel.scale.shape[1:])
    return (y * placed_like(scale, y)).astype(dtype)


def logits_of(hidden: Float[jax.Array, "... D"], table: Matrix) -> Float[jax.Array, "... V"]:
    """The product hidden table^T with a table (V, D), summed in float32 and left so.

    Args:
        hidden: (..., D); the product's factors have its dtype.
        table: (V, D).
    """
    assert not isinstance(table, LowRank), "a table has no adapter"
    factor = table.qvalue if isinstance(table, Quantized) else table
    factor = factor.astype(hidden.dtype)
    logits = jnp.einsum("...d,vd->...v", hidden, factor, preferred_element_type=jnp.float32)
    if not isinstance(table, Quantized):
        return logits
    return logits * table.scale.reshape((1,) * (hidden.ndim - 1) + (-1,))


def rows_of(table: Matrix, ids: Int[jax.Array, "B L"]) -> Float[jax.Array, "B L D"]:
    """The rows of a table (V, D) with the given numbers, float32; NaN for ids outside of it."""
    assert not isinstance(table, LowRank), "a table has no adapter"
    # Split by the width too, the table would make the partitioner move the vectors instead.
    table = jax.tree.map(lambda array: constrain(array, Axis.VOCAB, None), table)
    if not isinstance(table, Quantized):
        return look_up(table, ids).astype(jnp.float32)
    integers = table.qvalue.at[ids].get(mode="clip", wrap_negative_indices=False, out_sharding=sharding_of_rows(ids))
    return integers.astype(jnp.float32) * look_up(table.scale, ids)
