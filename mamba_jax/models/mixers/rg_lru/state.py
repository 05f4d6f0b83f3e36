"""What a recurrent block remembers of the tokens before."""

import dataclasses
import math
import typing
from typing import Any

import jax
from jaxtyping import Float

from mamba_jax.models.mixers.declaration import Setting, StateArray
from mamba_jax.models.mixers.rg_lru.config import RGLRUConfig
from mamba_jax.sharding import Axis

# Stands in a state for "no token yet". Zero cannot: the first token of a document enters the state unscaled, one that
# follows others does not, and a state after some tokens may be zero.
NO_TOKEN = -math.inf


# Not checked at construction: JAX also builds this class around shapes, shardings and logical axes.
@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RGLRUState:
    """State of one recurrent block, or of a stack of them with a leading layer axis.

    Attributes:
        conv_window: last K - 1 inputs of the convolution in the compute dtype, (B, K - 1, E).
        hidden: h in float32, (B, E); before the first token of a document `NO_TOKEN`.
    """

    conv_window: Float[jax.Array, "*layers B W E"]
    hidden: Float[jax.Array, "*layers B E"]


def declare(config: RGLRUConfig, setting: Setting, *, batch_size: int) -> RGLRUState:
    """The state as a tree of `StateArray`: the last inputs of the convolution, and the recurrent state."""
    channels = config.channels(setting.d_model)
    window: Any = StateArray(
        shape=(batch_size, config.past, channels), dtype=setting.compute_dtype, axes=(Axis.BATCH, None, Axis.INNER)
    )
    hidden: Any = StateArray(
        shape=(batch_size, channels), dtype="float32", axes=(Axis.BATCH, Axis.INNER), initial=NO_TOKEN
    )
    return RGLRUState(conv_window=window, hidden=hidden)
