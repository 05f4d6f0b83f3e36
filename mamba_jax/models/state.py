"""What a model carries from one call to the next: for each of its stacks of blocks, what their mixers declare."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int

from mamba_jax.errors import InputError
from mamba_jax.models.config import ModelConfig, Stack
from mamba_jax.models.mixers.declaration import StateArray
from mamba_jax.models.storage.per_layer import PerLayer, is_unstacked, layer, of_layers
from mamba_jax.sharding import Axis, constrain

# By the name of the stack, as parameters are; a leading axis of every array counts the blocks of the stack, or a
# `PerLayer` holds an array for each of them.
LMState = dict[str, Any]

# More tokens than any text has, where a state is declared and not allocated.
ANY_LENGTH = 2**31 - 1


def declare(config: ModelConfig, *, batch_size: int, max_length: int | None = None) -> LMState:
    """The state of a model as a tree of `StateArray`.

    Args:
        config: the model's.
        batch_size: B, rows.
        max_length: most tokens of a document that it has to hold; only a model with attention asks for it.

    Raises:
        InputError: attention without a window, and no `max_length`.
    """

    def with_layers(stack: Stack, array: StateArray) -> StateArray:
        return dataclasses.replace(array, shape=(stack.repeats, *array.shape), axes=(Axis.LAYERS, *array.axes))

    return {
        stack.name: jax.tree.map(
            functools.partial(with_layers, stack),
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


def is_endless(config: ModelConfig) -> bool:
    """Whether a state of fixed size holds texts of any length: not so for attention without a window."""
    try:
        declare(config, batch_size=1)
    except InputError:
        return False
    return True


def _declare_any(config: ModelConfig) -> LMState:
    """What does not depend on sizes: axes, dtypes and initial values."""
    return declare(config, batch_size=1, max_length=1)


def with_room(config: ModelConfig, state: LMState, max_length: int | None) -> LMState:
    """The state with room for documents of up to `max_length` tokens, those so far included.

    None is any number of tokens, for models whose attention has a window.

    What comes out of a call without a state has room for the tokens of that call; states of fixed size stay as they
    are. Where attention would need more than its state holds, the model's output is NaN.
    """
    length = ANY_LENGTH if max_length is None else max_length

    def grown(stack: Stack) -> Any:
        grow = functools.partial(stack.mixer.mixer().grow_state, stack.mixer)
        before = state[stack.name]
        if not is_unstacked(before):
            return grow(before, length)
        layers = [jax.tree.map(lambda array: array[None], layer(before, index)) for index in range(stack.repeats)]
        return of_layers([jax.tree.map(lambda array: array[0], grow(one, length)) for one in layers])

    return {stack.name: grown(stack) for stack in config.stacks}


def state_axes(config: ModelConfig) -> LMState:
    """Logical axes of every array of a stacked state, as a tuple in its place."""
    return jax.tree.map(lambda array: array.axes, _declare_any(config))


def reset_rows(config: ModelConfig, state: LMState, rows: Bool[jax.Array, " B"]) -> LMState:
    """The state as before any token in the rows where `rows` is True: what comes next there starts a document."""

    def reset(leaf: jax.Array, declared: StateArray) -> jax.Array:
        return jnp.where(_as_rows(rows, declared), jnp.asarray(declared.initial, leaf.dtype), leaf)

    return _map(reset, config, state)


def chosen_rows(config: ModelConfig, rows: Bool[jax.Array, " B"], chosen: LMState, others: LMState) -> LMState:
    """Rows of `chosen` where `rows` is True, and of `others` elsewhere."""

    def choose(leaf: jax.Array, declared: StateArray, other: jax.Array) -> jax.Array:
        return jnp.where(_as_rows(rows, declared), leaf, other)

    return _map(choose, config, chosen, others)


def taken_rows(config: ModelConfig, state: LMState, rows: Int[jax.Array, " R"]) -> LMState:
    """The state of these rows, in this order."""

    def take(leaf: jax.Array, declared: StateArray) -> jax.Array:
        return jnp.take(leaf, rows, axis=declared.axes.index(Axis.BATCH))

    return _map(take, config, state)


def placed_rows(config: ModelConfig, state: LMState, rows: Int[jax.Array, " R"], new: LMState) -> LMState:
    """The state with those of `new` in these rows; row numbers outside of the state place nothing."""

    def place(leaf: jax.Array, declared: StateArray, other: jax.Array) -> jax.Array:
        index = (slice(None),) * declared.axes.index(Axis.BATCH) + (rows,)
        return leaf.at[index].set(other.astype(leaf.dtype), mode="drop", wrap_negative_indices=False)

    return _map(place, config, state, new)


def one_of_each_row(config: ModelConfig, states: LMState, which: Int[jax.Array, " B"]) -> LMState:
    """Of several states, in arrays with a leading axis for them, each row of the one with the given number."""

    def choose(leaf: jax.Array, declared: StateArray) -> jax.Array:
        return jnp.take_along_axis(leaf, _as_rows(which, declared)[None], axis=0)[0]

    return _map(choose, config, states)


def _as_rows(rows: jax.Array, declared: StateArray) -> jax.Array:
    """What says something of each row, (B,), for use with the array that is declared."""
    return rows.reshape([-1 if axis == Axis.BATCH else 1 for axis in declared.axes])


def _map(function: Callable[..., jax.Array], config: ModelConfig, state: LMState, *others: LMState) -> LMState:
    """Applies function(array, its declaration, arrays of the others): to stacked arrays, or to those of each layer."""

    def apply(declared: StateArray, leaf: Any, *others: Any) -> Any:
        if not isinstance(leaf, PerLayer):
            return function(leaf, declared, *others)
        of_layer = dataclasses.replace(declared, shape=declared.shape[1:], axes=declared.axes[1:])
        arrays = zip(leaf.arrays, *(other.arrays for other in others), strict=True)
        return PerLayer(tuple(function(array, of_layer, *rest) for array, *rest in arrays))

    return jax.tree.map(apply, _declare_any(config), state, *others)


def finite_rows(config: ModelConfig, state: LMState) -> LMState:
    """Rows of the state that are not finite start anew."""

    def finite(leaf: jax.Array, declared: StateArray) -> jax.Array:
        is_right = jnp.isfinite(leaf)
        if not math.isfinite(declared.initial):
            is_right |= leaf == declared.initial
        return jnp.all(is_right, axis=[dim for dim, axis in enumerate(declared.axes) if axis != Axis.BATCH])

    rows = jax.tree.leaves(_map(finite, config, state))
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
    return _map(lambda leaf, declared: constrain(leaf, *declared.axes), config, state)
