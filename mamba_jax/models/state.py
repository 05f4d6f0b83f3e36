"""What a model carries from one call to the next: for each of its stacks of blocks, what their mixers declare."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool

from mamba_jax.models.config import ModelConfig, Stack
from mamba_jax.models.mixers.declaration import StateArray
from mamba_jax.sharding import Axis, constrain

# By the name of the stack, as parameters are; a leading axis of every array counts the blocks of the stack.
LMState = dict[str, Any]


def declare(config: ModelConfig, *, batch_size: int, max_length: int | None = None) -> LMState:
    """The state of a model as a tree of `StateArray`.

    Args:
        config: the model's.
        batch_size: B, rows.
        max_length: most tokens of a document that it has to hold; only a model with attention asks for it.

    Raises:
        InputError: attention without a window, and no `max_length`.
    """

    def stacked(stack: Stack, array: StateArray) -> StateArray:
        return StateArray(
            shape=(stack.repeats, *array.shape),
            dtype=array.dtype,
            axes=(Axis.LAYERS, *array.axes),
            initial=array.initial,
        )

    return {
        stack.name: jax.tree.map(
            functools.partial(stacked, stack),
            stack.mixer.mixer().declare_state(
                stack.mixer, config.setting, batch_size=batch_size, max_length=max_length
            ),
        )
        for stack in config.stacks
    }


def init_state(config: ModelConfig, batch_size: int, *, max_length: int | None = None) -> LMState:
    """The state before any token; arguments as in `declare`."""
    declared = declare(config, batch_size=batch_size, max_length=max_length)
    return jax.tree.map(lambda array: jnp.full(array.shape, array.initial, array.dtype), declared)


def _declare_any(config: ModelConfig) -> LMState:
    """What does not depend on sizes: axes, dtypes and initial values."""
    return declare(config, batch_size=1, max_length=1)


def with_room(config: ModelConfig, state: LMState, max_length: int) -> LMState:
    """The state with room for documents of up to `max_length` tokens, those so far included.

    What comes out of a call without a state has room for the tokens of that call; states of fixed size stay as they
    are. Where attention would need more than its state holds, the model's output is NaN.
    """
    return {
        stack.name: stack.mixer.mixer().grow_state(stack.mixer, state[stack.name], max_length)
        for stack in config.stacks
    }


def state_axes(config: ModelConfig) -> LMState:
    """Logical axes of every array of the state, as a tuple in its place."""
    return jax.tree.map(lambda array: array.axes, _declare_any(config))


def reset_rows(config: ModelConfig, state: LMState, rows: Bool[jax.Array, " B"]) -> LMState:
    """The state as before any token in the rows where `rows` is True: what comes next there starts a document."""

    def reset(leaf: jax.Array, declared: StateArray) -> jax.Array:
        shape = [-1 if axis == Axis.BATCH else 1 for axis in declared.axes]
        return jnp.where(rows.reshape(shape), jnp.asarray(declared.initial, leaf.dtype), leaf)

    return jax.tree.map(reset, state, _declare_any(config))


def finite_rows(config: ModelConfig, state: LMState) -> LMState:
    """Rows of the state that are not finite start anew."""

    def finite(leaf: jax.Array, declared: StateArray) -> jax.Array:
        is_right = jnp.isfinite(leaf)
        if not math.isfinite(declared.initial):
            is_right |= leaf == declared.initial
        return jnp.all(is_right, axis=[dim for dim, axis in enumerate(declared.axes) if axis != Axis.BATCH])

    rows = jax.tree.leaves(jax.tree.map(finite, state, _declare_any(config)))
    return reset_rows(config, state, ~functools.reduce(jnp.logical_and, rows)) if rows else state


def split_rows(config: ModelConfig, state: LMState, parts: int) -> LMState:
    """States of `parts` microbatches on a new leading axis, every `parts`-th row in one, so that none moves."""

    def split(leaf: jax.Array, axes: tuple[Axis | None, ...]) -> jax.Array:
        batch = axes.index(Axis.BATCH)
        shape = (*leaf.shape[:batch], leaf.shape[batch] // parts, parts, *leaf.shape[batch + 1 :])
        return constrain(jnp.moveaxis(leaf.reshape(shape), batch + 1, 0), None, *axes)

    return jax.tree.map(split, state, state_axes(config))


def join_rows(config: ModelConfig, state: LMState) -> LMState:
    """Reverses `split_rows`."""

    def join(leaf: jax.Array, axes: tuple[Axis | None, ...]) -> jax.Array:
        batch = axes.index(Axis.BATCH)
        joined = jnp.moveaxis(leaf, 0, batch + 1)
        shape = (*joined.shape[:batch], joined.shape[batch] * joined.shape[batch + 1], *joined.shape[batch + 2 :])
        return constrain(joined.reshape(shape), *axes)

    return jax.tree.map(join, state, state_axes(config))


def constrain_state(config: ModelConfig, state: LMState) -> LMState:
    """The state, pinned to the sharding rules."""
    return jax.tree.map(lambda leaf, axes: constrain(leaf, *axes), state, state_axes(config))
