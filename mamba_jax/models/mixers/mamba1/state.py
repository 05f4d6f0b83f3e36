"""What a Mamba-1 mixer remembers of the tokens before."""

import dataclasses
import typing
from typing import Any

import jax
from jaxtyping import Float

from mamba_jax.models.mixers.declaration import Setting, StateArray
from mamba_jax.models.mixers.mamba1.config import Mamba1Config
from mamba_jax.sharding import Axis


# Not checked at construction: JAX also builds this class around shapes, shardings and logical axes.
@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba1State:
    """State of one Mamba-1 mixer, or of a stack of them with a leading layer axis.

    Attributes:
        conv_window: last K - 1 inputs of the convolution in the compute dtype, (B, K - 1, E); K - 1 is 0 without one.
        ssm: recurrent state in float32, (B, E, N).
    """

    conv_window: Float[jax.Array, "*layers B W E"]
    ssm: Float[jax.Array, "*layers B E N"]


def declare(config: Mamba1Config, setting: Setting, *, batch_size: int) -> Mamba1State:
    """The state as a tree of `StateArray`: the last inputs of the convolution, and the recurrent state."""
    inner = config.channels(setting.d_model)
    window: Any = StateArray(
        shape=(batch_size, config.past, inner), dtype=setting.compute_dtype, axes=(Axis.BATCH, None, Axis.INNER)
    )
    ssm: Any = StateArray(
        shape=(batch_size, inner, config.state_dim), dtype="float32", axes=(Axis.BATCH, Axis.INNER, Axis.STATE)
    )
    return Mamba1State(conv_window=window, ssm=ssm)
