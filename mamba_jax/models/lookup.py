"""Rows of a table by number, with a gradient whose sums are taken in one order on every platform."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mamba_jax.sharding import Axis, constrain, parts, per_shard, shard_number, sharding_of_rows
from pallas_kernels import differentiable

# Tokens whose sums are one product; the side of a matrix unit.
_BLOCK = 128


def look_up(table: Float[Array, "V D"], ids: Int[Array, "B L"]) -> Float[Array, "B L D"]:
    """The rows of a table with the given numbers.

        y_t = table[ids_t];  dtable_v = sum of dy_t over the t with ids_t = v

    On GPUs the transpose of a gather adds with atomic operations, in another order every time. There the tokens are
    sorted by id instead, and summed by products with matrices of zeros and ones, unless mesh axes are explicit or
    manual. Elsewhere XLA adds in one order.

    Args:
        table: (V, D).
        ids: (B, L) in [0, V); others give NaN and have no gradient.

    Returns:
        (B, L, D), in the dtype of the table. A row of `dy` that is not finite spoils the gradients of other rows too.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.explicit_axes or mesh.manual_axes:
        return _rows(table.shape[0], table, ids)
    return _look_up(table.shape[0], table, ids)


def _rows(num_rows: int, table_VD: jax.Array, ids_BL: jax.Array) -> jax.Array:
    del num_rows
    return table_VD.at[ids_BL].get(
        mode="fill", fill_value=jnp.nan, wrap_negative_indices=False, out_sharding=sharding_of_rows(ids_BL)
    )


def _gradient(num_rows: int, ids_BL: jax.Array, dy_BLD: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(
        ids_BL,
        dy_BLD,
        cuda=functools.partial(_add_sorted, num_rows),
        default=functools.partial(_add_in_order, num_rows),
    )


_look_up = differentiable(
    _rows,
    forward=lambda num_rows, table_VD, ids_BL: (_rows(num_rows, table_VD, ids_BL), ids_BL),
    backward=_gradient,
    tangent=lambda num_rows, ids_BL, dtable_VD: _rows(num_rows, dtable_VD, ids_BL),
)


def _add_in_order(num_rows: int, ids_BL: jax.Array, dy_BLD: jax.Array) -> jax.Array:
    zeros_VD = jnp.zeros((num_rows, dy_BLD.shape[-1]), dy_BLD.dtype)
    return zeros_VD.at[ids_BL].add(dy_BLD, mode="drop", wrap_negative_indices=False)


def _add_sorted(num_rows: int, ids_BL: jax.Array, dy_BLD: jax.Array) -> jax.Array:
    """Each device adds up its tokens; the sums over devices follow, once."""
    sizes = ((Axis.BATCH, ids_BL.shape[0]), (Axis.LENGTH, ids_BL.shape[1]))
    shards = tuple(axis for axis, size in sizes if parts(axis, size) > 1)
    vocab_shards = parts(Axis.VOCAB, num_rows)
    rows_here = num_rows // vocab_shards

    def add(ids: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
        if vocab_shards > 1:
            ids = ids - shard_number(Axis.VOCAB) * rows_here
        return (sum_of_rows(ids.reshape(-1), dy.reshape(-1, dy.shape[-1]), rows_here)[None],)

    tokens = (Axis.BATCH, Axis.LENGTH)
    (sums_SVD,) = per_shard(
        add,
        {"ids": ids_BL, "dy": dy_BLD},
        {"ids": tokens, "dy": (*tokens, None)},
        ((shards, Axis.VOCAB if vocab_shards > 1 else None, None),),
    )
    return constrain(jnp.sum(sums_SVD, axis=0), Axis.VOCAB, Axis.EMBED)


def sum_of_rows(ids: Int[Array, " T"], values: Float[Array, "T D"], num_rows: int) -> Float[Array, "V D"]:
    """Sums of the values with equal ids, always in the same order.

        sum_v = sum of values_t over the t with ids_t = v

    Args:
        ids: (T,); values whose id is not in [0, V) are left out.
        values: (T, D), finite.
        num_rows: V.
    """
    order_T = jnp.argsort(ids)
    ids_T = ids[order_T]
    sums_TD = _running_sums(ids_T, values[order_T])
    is_last_T = jnp.concatenate([ids_T[1:] != ids_T[:-1], jnp.ones(1, bool)])
    # Every place is written once: what is no whole sum goes to places of its own behind the table, which are dropped.
    behind_T = num_rows + jnp.arange(ids_T.shape[0], dtype=ids_T.dtype)
    place_T = jnp.where(is_last_T & (ids_T >= 0) & (ids_T < num_rows), ids_T, behind_T)
    zeros_VD = jnp.zeros((num_rows, values.shape[1]), values.dtype)
    return zeros_VD.at[place_T].set(sums_TD, mode="drop", unique_indices=True)


def _running_sums(ids_T: jax.Array, values_TD: jax.Array) -> jax.Array:
    """Sum of each value and those before it with the same id, which are its neighbours.

    Within blocks of tokens, and then, of the sums at the ends of blocks, over blocks.
    """
    length, width = values_TD.shape
    padding = -length % _BLOCK
    ids_CQ = jnp.pad(ids_T, (0, padding), mode="edge").reshape(-1, _BLOCK)
    values_CQD = jnp.pad(values_TD, ((0, padding), (0, 0))).reshape(-1, _BLOCK, width)
    until_QQ = jnp.tril(jnp.ones((_BLOCK, _BLOCK), bool))
    same_CQQ = (ids_CQ[:, :, None] == ids_CQ[:, None, :]) & until_QQ[None]
    sums_CQD = jnp.einsum(
        "cqk,ckd->cqd", same_CQQ.astype(values_TD.dtype), values_CQD, precision=jax.lax.Precision.HIGHEST
    )
    if ids_CQ.shape[0] > 1:
        entering_CD = _running_sums(ids_CQ[:, -1], sums_CQD[:, -1])[:-1]
        goes_on_CQ = ids_CQ[1:] == ids_CQ[:-1, -1:]
        sums_CQD = sums_CQD.at[1:].add(jnp.where(goes_on_CQ[..., None], entering_CD[:, None], 0))
    return sums_CQD.reshape(-1, width)[:length]
