"""Attention over devices: each takes some rows, queries and heads, and keeps its part of the ring."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from mamba_jax.models import sequence_parallel
from mamba_jax.models.mixers.attention.attend import AttendOptions, attend
from mamba_jax.models.mixers.attention.backends.xla import attend_visible
from mamba_jax.models.mixers.attention.cache import RING_AXES, AttentionState, ages, in_order, written
from mamba_jax.sharding import Axis, gathered, parts, per_shard, shard_number

_Result = tuple[jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadsOutput:
    """Result of `attend_and_keep`.

    Attributes:
        y: (B, L, H, P).
        keys: the ring after the last token, (B, C, K, P).
        values: likewise.
    """

    y: Float[jax.Array, "B L H P"]
    keys: Float[jax.Array, "B C K P"]
    values: Float[jax.Array, "B C K P"]


def attend_and_keep(
    options: AttendOptions,
    *,
    q: Float[jax.Array, "B L H P"],
    k: Float[jax.Array, "B L K P"],
    v: Float[jax.Array, "B L K P"],
    positions: Int[jax.Array, "B L"] | None,
    state: AttentionState | None,
) -> HeadsOutput:
    """Attention to tokens that are new and to those of a state's rings, and the rings after it.

    Sequences whose length is split keep their queries where they are; every device gets all keys and values.

    Args:
        options: scale, window and backend.
        q: queries, rotated.
        k: keys, rotated.
        v: values.
        positions: of the tokens in their documents; None, without a state only, is one document a row.
        state: before the tokens; None starts a sequence.

    Returns:
        The output and the rings. It is NaN for tokens that would have to attend to more of their document than the
        rings hold.
    """
    is_split = sequence_parallel.is_split(q.shape[1], past=0)
    is_shared = parts(Axis.HEADS, q.shape[2]) > 1 and parts(Axis.KV_HEADS, k.shape[2]) == 1
    run = _OnDevice(options=options, is_split=is_split, group=q.shape[2] // k.shape[2] if is_shared else None)
    tokens = (Axis.BATCH, Axis.LENGTH if is_split else None)
    queries, new = (*tokens, Axis.HEADS, None), (*tokens, Axis.KV_HEADS, None)
    given = {
        "q": (q, queries),
        "k": (k, new),
        "v": (v, new),
        "positions": (positions, tokens),
        "keys": (None if state is None else state.keys, RING_AXES),
        "values": (None if state is None else state.values, RING_AXES),
        "slot": (None if state is None else state.slot, (Axis.BATCH,)),
    }
    y, keys, values = per_shard(
        run,
        {name: array for name, (array, _) in given.items()},
        {name: axes for name, (_, axes) in given.items()},
        (queries, RING_AXES, RING_AXES),
    )
    return HeadsOutput(y=y, keys=keys, values=values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _OnDevice:
    """`attend_and_keep` of a device's part.

    Attributes:
        options: see there.
        is_split: whether the arrays hold a part of the length.
        group: heads of queries for a head of keys if each device has some of those and all of these, else None.
    """

    options: AttendOptions
    is_split: bool
    group: int | None

    def __call__(
        self,
        *,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        positions: jax.Array | None,
        keys: jax.Array | None,
        values: jax.Array | None,
        slot: jax.Array | None,
    ) -> _Result:
        """See `attend_and_keep`."""
        if self.is_split:
            k, v = gathered((k, v), Axis.LENGTH, dim=1)
        if keys is None or values is None or slot is None:
            y = self._attend(q, (k, v), positions, before=0)
            length = k.shape[1]
            capacity = min(self.options.window or length, length)
            # As if they had been written one after the other.
            keys, values = (jnp.roll(x[:, -capacity:], length % capacity, axis=1) for x in (k, v))
            return y, keys, values
        assert positions is not None
        if q.shape[1] == 1 and not self.is_split:
            return self._one_token(q, (k, v), positions, (keys, values), slot)
        capacity, index_L = keys.shape[1], jnp.arange(q.shape[1], dtype=positions.dtype)[None]
        old = (in_order(ring, slot) for ring in (keys, values))
        all_k, all_v = (jnp.concatenate([x, new.astype(x.dtype)], axis=1) for x, new in zip(old, (k, v), strict=True))
        y = self._attend(q, (all_k, all_v), positions, before=capacity)
        is_lost = self._reach(positions) > capacity + self._number(q.shape[1]) + index_L
        return _unless(is_lost, y), written(keys, slot, k), written(values, slot, v)

    def _one_token(
        self,
        q: jax.Array,
        new: tuple[jax.Array, ...],
        positions: jax.Array,
        rings: tuple[jax.Array, ...],
        slot: jax.Array,
    ) -> _Result:
        """One token more: it is written first, over the oldest, and then attends to the rings alone."""
        keys, values = (written(ring, slot, x) for ring, x in zip(rings, new, strict=True))
        capacity, reach = keys.shape[1], self._reach(positions)
        is_visible = ages(slot, capacity) <= reach
        y = attend_visible(q, self._mine(q, keys), self._mine(q, values), is_visible[:, None], scale=self.options.scale)
        return _unless(reach >= capacity, y), keys, values

    def _attend(
        self, q: jax.Array, keys_and_values: tuple[jax.Array, jax.Array], positions: jax.Array | None, *, before: int
    ) -> jax.Array:
        """Attention to consecutive keys, of which `before` come before all that are new."""
        k, v = (self._mine(q, x) for x in keys_and_values)
        first = before + self._number(q.shape[1]) if before or self.is_split else None
        return attend(q, k, v, positions, first=first, options=self.options)

    def _number(self, length: int) -> jax.Array | int:
        """How many of the new tokens come before this device's part of them."""
        return shard_number(Axis.LENGTH) * length if self.is_split else 0

    def _reach(self, positions: jax.Array) -> jax.Array:
        """How many tokens before its own each one attends to."""
        return positions if self.options.window is None else jnp.minimum(positions, self.options.window - 1)

    def _mine(self, q: jax.Array, x: jax.Array) -> jax.Array:
        """Of keys or values, the heads that this device's queries read."""
        if self.group is None:
            return x
        heads_H = shard_number(Axis.HEADS) * q.shape[2] + jnp.arange(q.shape[2])
        return jnp.take(x, heads_H // self.group, axis=2)


def _unless(is_lost_BL: jax.Array, y_BLHP: jax.Array) -> jax.Array:
    return jnp.where(is_lost_BL[:, :, None, None], jnp.nan, y_BLHP)
