"""What an attention mixer remembers of the tokens before: a ring of keys and values."""

import dataclasses
import typing
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from mamba_jax.models.mixers.attention.config import AttentionConfig
from mamba_jax.models.mixers.declaration import Setting, StateArray
from mamba_jax.sharding import Axis

# Of the ring's keys and values, rows by slots by heads by channels.
RING_AXES = (Axis.BATCH, None, Axis.KV_HEADS, None)


# Not checked at construction: JAX also builds this class around shapes, shardings and logical axes.
@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionState:
    """State of one attention mixer, or of a stack of them with a leading layer axis.

    A token is written over the oldest. What lies in a slot counts as long as it is of the current document.

    Attributes:
        keys: of the last C tokens, rotated, (B, C, K, P) in the compute dtype.
        values: of the same tokens, (B, C, K, P).
        slot: where the next token goes, from 0 to C - 1, (B,).
        position: tokens of the current document so far, (B,).
        windows: last inputs of the convolutions of q, k and v by those names, (B, W, channels); empty without them.
    """

    keys: Float[jax.Array, "*layers B C K P"]
    values: Float[jax.Array, "*layers B C K P"]
    slot: Int[jax.Array, "*layers B"]
    position: Int[jax.Array, "*layers B"]
    windows: dict[str, Float[jax.Array, "*layers B W E"]]


def declare(config: AttentionConfig, setting: Setting, *, batch_size: int, max_length: int | None) -> AttentionState:
    """The state as a tree of `StateArray`."""
    channels = config.channels(setting.d_model)
    shape = (batch_size, config.capacity(max_length), config.kv_heads, channels)
    ring: Any = StateArray(shape=shape, dtype=setting.compute_dtype, axes=RING_AXES)
    count: Any = StateArray(shape=(batch_size,), dtype="int32", axes=(Axis.BATCH,))
    heads = {"q": config.num_heads, "k": config.kv_heads, "v": config.kv_heads}
    windows: Any = {
        name: StateArray(
            shape=(batch_size, config.past, number * channels),
            dtype=setting.compute_dtype,
            axes=(Axis.BATCH, None, Axis.INNER),
        )
        for name, number in heads.items()
        if config.conv_width is not None
    }
    return AttentionState(keys=ring, values=ring, slot=count, position=count, windows=windows)


def in_order(ring: Float[jax.Array, "B C K P"], slot: Int[jax.Array, " B"]) -> Float[jax.Array, "B C K P"]:
    """What a ring holds, the oldest first."""
    capacity = ring.shape[1]
    order_BC = (slot[:, None] + jnp.arange(capacity, dtype=slot.dtype)[None]) % capacity
    return jnp.take_along_axis(ring, order_BC[:, :, None, None], axis=1)


def ages(slot: Int[jax.Array, " B"], capacity: int) -> Int[jax.Array, "B C"]:
    """How many tokens before the one in `slot`, the last written, each slot of a ring was written."""
    return (slot[:, None] - jnp.arange(capacity, dtype=slot.dtype)[None]) % capacity


def written(
    ring: Float[jax.Array, "B C K P"], slot: Int[jax.Array, " B"], new: Float[jax.Array, "B L K P"]
) -> Float[jax.Array, "B C K P"]:
    """A ring after L tokens more; those that would be overwritten at once are not written."""
    capacity, length = ring.shape[1], new.shape[1]
    last = min(length, capacity)
    places_BS = (slot[:, None] + length - last + jnp.arange(last, dtype=slot.dtype)[None]) % capacity

    def write(ring_CKP: jax.Array, places_S: jax.Array, new_SKP: jax.Array) -> jax.Array:
        return ring_CKP.at[places_S].set(new_SKP, unique_indices=True)

    return jax.vmap(write)(ring, places_BS, new[:, length - last :].astype(ring.dtype))


def grown(state: AttentionState, capacity: int) -> AttentionState:
    """A state whose rings hold more tokens, with what they held, or the same one if they hold as many already.

    Args:
        state: of a stack of mixers, each array with a leading layer axis.
        capacity: C that the rings shall have at least.
    """
    held = state.keys.shape[2]
    if capacity <= held:
        return state

    def extend(ring: jax.Array) -> jax.Array:
        return jnp.pad(jax.vmap(in_order)(ring, state.slot), ((0, 0), (0, 0), (0, capacity - held), (0, 0), (0, 0)))

    return dataclasses.replace(
        state, keys=extend(state.keys), values=extend(state.values), slot=jnp.full_like(state.slot, held)
    )
