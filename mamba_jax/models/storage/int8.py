"""Weights in int8, for generation: a quarter of the bytes of float32, which is what a token of a small batch waits for.

The rounding, and the pair of integers and scales that it gives, are those of `qwix`, an optional dependency (the extra
`int8`). Its products are not used: of a factor in float and one in int8 they multiply the scale into the weights first,
which rounds every weight once more in bfloat16.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from mamba_jax.errors import InputError
from mamba_jax.models.parameters import ModelDefinition, Params
from mamba_jax.models.storage.matrix import Quantized


def quantize(definition: ModelDefinition, params: Params) -> Params:
    r"""Parameters with the matrices of projections, of the embedding and of the head in int8.

        s = max |w| / 127.5, over the dimension that products sum over;   q = round(w / s), at most 127
        |w - q s| <= s / 2

    but for the rounding of w / s in float32, which adds at most 2^-16 s. A channel of zeros has s = 1 and q = 0. So has
    one whose largest weight is below 1e-17: what it loses is no more than that.

    All else stays as it is: convolutions, norms, biases, the step size and decay of mixers, the matrices of experts and
    their router, and block-diagonal ones. Such parameters stand for the given ones wherever the model runs without
    gradients, stacked or with an array for each layer.

    Arrays are quantised one after the other, so beside all parameters and their int8 form no more than one array in
    float32 exists. The function may also be called inside `jax.jit`.

    Args:
        definition: the model.
        params: its parameters, stacked.

    Returns:
        The same tree, with a `qwix.QArray` in the place of each such matrix.

    Raises:
        InputError: `qwix` is not installed, or the parameters are quantised already.
    """
    imported_qwix("weights in int8", extra="int8")
    if any(isinstance(leaf, Quantized) for leaf in jax.tree.leaves(params, is_leaf=_is_quantized)):
        raise InputError("these parameters are in int8 already: quantize those that they were made of")

    def of_leaf(param: jax.Array, dim: int | None) -> Any:
        return param if dim is None else _in_int8(dim, param)

    return jax.tree.map(of_leaf, params, definition.summed)


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, Quantized)


def imported_qwix(what: str, *, extra: str) -> Any:
    """The package, imported when it is asked for: it takes a third of a second.

    Args:
        what: what needs it.
        extra: of this project, with which it is installed.

    Raises:
        InputError: it is not installed.
    """
    try:
        import qwix
    except ImportError:
        raise InputError(f"{what} need the package qwix: pip install 'mamba-jax[{extra}]'") from None
    return qwix


@functools.partial(jax.jit, static_argnums=0)
def _in_int8(dim: int, weights: jax.Array) -> Any:
    channels = [other for other in range(weights.ndim) if other != dim]
    return imported_qwix("weights in int8", extra="int8").quantize(
        weights.astype(jnp.float32), jnp.int8, channelwise_axes=channels
    )
