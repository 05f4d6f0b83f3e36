"""What a model carries from one call to the next; its size does not depend on how many tokens came before."""

import dataclasses
import typing
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from mamba_jax.models.config import ModelConfig
from mamba_jax.sharding import Axis


# JAX also builds these classes around shapes, shardings and logical axes, which a check of every construction would
# refuse.
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


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class MixerOutput:
    """Result of a mixer that carries a state.

    Attributes:
        y: (B, L, D), in the compute dtype.
        state: after the last token.
    """

    y: Float[jax.Array, "B L D"]
    state: Mamba1State


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LMState:
    """State of a language model.

    Attributes:
        layers: states of all layers, stacked on a leading axis.
    """

    layers: Mamba1State


_CONV_WINDOW: Any = (Axis.LAYERS, Axis.BATCH, None, Axis.INNER)
_SSM: Any = (Axis.LAYERS, Axis.BATCH, Axis.INNER, Axis.STATE)
# Logical axes of every array of an `LMState`.
STATE_AXES = LMState(layers=Mamba1State(conv_window=_CONV_WINDOW, ssm=_SSM))


def init_state(config: ModelConfig, batch_size: int) -> LMState:
    """The state before any token: all zeros."""
    width = config.mixer.conv_width - 1 if config.mixer.use_conv else 0
    layers, inner = config.num_layers, config.d_inner
    return LMState(
        layers=Mamba1State(
            conv_window=jnp.zeros((layers, batch_size, width, inner), config.compute_dtype),
            ssm=jnp.zeros((layers, batch_size, inner, config.mixer.state_dim), jnp.float32),
        )
    )


def reset_rows(state: LMState, rows: Bool[jax.Array, " B"]) -> LMState:
    """The state with zeros in the rows where `rows` is True: what comes next there starts a document."""

    def reset(leaf: jax.Array) -> jax.Array:
        return jnp.where(rows.reshape(1, -1, *(1,) * (leaf.ndim - 2)), jnp.zeros((), leaf.dtype), leaf)

    return jax.tree.map(reset, state)
