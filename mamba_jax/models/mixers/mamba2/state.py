"""What a Mamba-2 mixer remembers of the tokens before."""

import dataclasses
import math
import typing
from typing import Any

import jax
from jaxtyping import Float

from mamba_jax.models.mixers.declaration import Setting, StateArray
from mamba_jax.models.mixers.mamba2.config import Mamba2Config
from mamba_jax.sharding import Axis

# Stands for the learned state before the first token, which a declaration cannot know.
LEARNED = -math.inf


# Not checked at construction: JAX also builds this class around shapes, shardings and logical axes.
@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2State:
    """State of one Mamba-2 mixer, or of a stack of them with a leading layer axis.

    Attributes:
        conv_window: last K - 1 inputs of the convolution of x in the compute dtype, (B, K - 1, E).
        BC_window: those of B and C, (B, K - 1, 2 G N).
        ssm: recurrent state in float32, (B, H, P, N).
    """

    conv_window: Float[jax.Array, "*layers B W E"]
    BC_window: Float[jax.Array, "*layers B W M"]
    ssm: Float[jax.Array, "*layers B H P N"]


def declare(config: Mamba2Config, setting: Setting, *, batch_size: int) -> Mamba2State:
    """The state as a tree of `StateArray`: the last inputs of the convolution, and the recurrent state."""

    def window(channels: int) -> Any:
        return StateArray(
            shape=(batch_size, config.past, channels),
            dtype=setting.compute_dtype,
            axes=(Axis.BATCH, None, Axis.INNER),
        )

    ssm: Any = StateArray(
        shape=(batch_size, config.heads(setting.d_model), config.head_dim, config.state_dim),
        dtype="float32",
        axes=(Axis.BATCH, Axis.HEADS, None, Axis.STATE),
        initial=LEARNED if config.learn_initial_state else 0.0,
    )
    return Mamba2State(
        conv_window=window(config.channels(setting.d_model)),
        BC_window=window(2 * config.num_groups * config.state_dim),
        ssm=ssm,
    )
