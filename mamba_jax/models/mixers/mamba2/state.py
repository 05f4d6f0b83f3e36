"""What a Mamba-2 mixer remembers of the tokens before."""

import dataclasses
import math
import typing
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from mamba_jax.models.mixers.declaration import Setting, StateArray
from mamba_jax.models.mixers.mamba2.config import Mamba2Config
from mamba_jax.sharding import Axis

# Stands for the learned state before the first token, which a declaration cannot know.
LEARNED = -math.inf


# Not checked at construction: JAX also builds these classes around shapes, shardings and logical axes.
@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2Ring:
    """Inputs of the last tokens, of one mixer or of a stack; see `pallas_kernels.Mamba2Carry`.

    Attributes:
        x: inputs of the recurrence in the compute dtype, (B, J, E).
        B: their B, (B, J, G N).
        dt: their step sizes before bias and softplus, (B, J, H).
        length: places of the J that are taken, (B,).
    """

    x: Float[jax.Array, "*layers B J E"]
    B: Float[jax.Array, "*layers B J M"]
    dt: Float[jax.Array, "*layers B J H"]
    length: Int[jax.Array, "*layers B"]

    def named(self) -> dict[str, jax.Array]:
        """The arrays as the operations on single tokens name them."""
        return {f"ring_{name}": array for name, array in vars(self).items()}


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2State:
    """State of one Mamba-2 mixer, or of a stack of them with a leading layer axis.

    Attributes:
        conv_window: last K - 1 inputs of the convolution of x in the compute dtype, (B, K - 1, E).
        BC_window: those of B and C, (B, K - 1, 2 G N).
        ssm: recurrent state in float32, (B, H, P, N).
        ring: with `Mamba2Config.step_ring`, inputs of the tokens that the recurrent state does not know yet; empty
            after anything but single tokens of generation.
    """

    conv_window: Float[jax.Array, "*layers B W E"]
    BC_window: Float[jax.Array, "*layers B W M"]
    ssm: Float[jax.Array, "*layers B H P N"]
    ring: Mamba2Ring | None = None


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
        ring=declare_ring(config, setting, batch_size=batch_size),
    )


def declare_ring(config: Mamba2Config, setting: Setting, *, batch_size: int) -> Mamba2Ring | None:
    """The ring as a tree of `StateArray`; None if the config has none."""
    if not config.step_ring:
        return None

    def part(channels: int, axis: Axis | None) -> Any:
        shape = (batch_size, config.step_ring, channels)
        return StateArray(shape=shape, dtype=setting.compute_dtype, axes=(Axis.BATCH, None, axis), is_passing=True)

    length: Any = StateArray(shape=(batch_size,), dtype="int32", axes=(Axis.BATCH,), is_passing=True)
    return Mamba2Ring(
        x=part(config.channels(setting.d_model), Axis.INNER),
        B=part(config.num_groups * config.state_dim, None),
        dt=part(config.heads(setting.d_model), Axis.HEADS),
        length=length,
    )


def empty_ring(config: Mamba2Config, setting: Setting, *, batch_size: int) -> Mamba2Ring | None:
    """The ring before any token."""
    declared = declare_ring(config, setting, batch_size=batch_size)
    return jax.tree.map(lambda array: jnp.zeros(array.shape, array.dtype), declared)
