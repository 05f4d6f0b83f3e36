"""Next-token cross entropy that never holds the logits of a whole batch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from mamba_jax.models.head import Head, capped, capped_slope
from mamba_jax.models.storage.matrix import logits_of
from mamba_jax.sharding import Axis, constrain, parts
from pallas_kernels.common.devices import target_platform


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LossOutput:
    """Loss of a batch, or its part of the loss of a larger one.

    Attributes:
        loss: cross_entropy + z_loss + balance_loss; the only differentiable field.
        cross_entropy: sum over counted positions of -log p(target), over `normalizer`; nats per token.
        z_loss: weighted sum of squared log-partition values, over `normalizer`.
        balance_loss: what the model's blocks add, as for an even use of experts; 0 as `next_token_loss` returns it.
    """

    loss: Float[jax.Array, ""]
    cross_entropy: Float[jax.Array, ""]
    z_loss: Float[jax.Array, ""]
    balance_loss: Float[jax.Array, ""]

    @classmethod
    def zero(cls) -> "LossOutput":
        """The loss of no part of a batch."""
        zero = jnp.zeros((), jnp.float32)
        return cls(loss=zero, cross_entropy=zero, z_loss=zero, balance_loss=zero)

    def with_penalty(self, penalty: Float[jax.Array, ""]) -> "LossOutput":
        """The loss with what the model's blocks add to it."""
        balance_loss = jax.lax.stop_gradient(penalty)
        return dataclasses.replace(self, loss=self.loss + penalty, balance_loss=balance_loss)


@jax.named_scope("loss")
def next_token_loss(
    hidden: Float[jax.Array, "B L D"],
    head: Head,
    targets: Int[jax.Array | np.ndarray, "B L"],
    mask: Bool[jax.Array | np.ndarray, "B L"],
    *,
    normalizer: Float[jax.Array, ""],
    z_loss: float,
    chunk: int,
) -> LossOutput:
    r"""Cross entropy of a linear head, computed for `chunk` positions of the sequence at a time.

        logits = hidden matrix^T, capped as the head says
        loss   = sum_t mask_t (logsumexp(logits_t) - logits_t[target_t] + z_loss logsumexp(logits_t)^2) / normalizer

    When it is differentiated, the pass that computes a chunk's logits also turns them into the gradients of `hidden`
    and of the head, so the vocabulary product is never done twice.

    Args:
        hidden: (B, L, D); the product with the head runs in its dtype and accumulates in float32.
        head: its matrix is (V, D), any V.
        targets: (B, L) ids in [0, V).
        mask: (B, L) positions that count.
        normalizer: what the sums are divided by: the number of counted positions of the whole batch, so that parts of
            a batch add up to its loss. A value below 1 counts as 1.
        z_loss: weight of the penalty on the log-partition (arXiv 2204.02311, section 5).
        chunk: positions of the sequence, or of each device's part of it, whose logits exist at a time.
    """
    inverse = 1 / jnp.maximum(normalizer, 1).astype(jnp.float32)
    sizes = zip((Axis.BATCH, Axis.LENGTH), targets.shape, strict=True)
    shards = tuple(axis for axis, size in sizes if parts(axis, size) > 1)
    chunks = (_split(array, shards, chunk) for array in (hidden, targets, mask))
    how = _How(z_loss=z_loss, shards=shards, logit_cap=head.logit_cap)
    cross_entropy, penalty = _chunked_loss(how, *chunks, head.matrix, inverse)
    return LossOutput(
        loss=cross_entropy + penalty,
        cross_entropy=jax.lax.stop_gradient(cross_entropy),
        z_loss=jax.lax.stop_gradient(penalty),
        balance_loss=jnp.zeros((), jnp.float32),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _How:
    """What is static about a loss: the weight of the penalty, the axes that are split, and the cap of the logits."""

    z_loss: float
    shards: tuple[Axis, ...]
    logit_cap: float | None


# S shards of batch and length are a dimension of their own here, and every sum keeps it: each device then adds up what
# is its own, and the sums over devices are taken once, after the loop over chunks, not in each of its steps.


def _split(array_BL: jax.Array | np.ndarray, shards: tuple[Axis, ...], chunk: int) -> jax.Array:
    """(B, L, ...) to (C, S, B, T, ...): C chunks of T positions of each of S shards, which nothing leaves."""
    batch, length, *rest = array_BL.shape
    rows, columns = parts(Axis.BATCH, batch), parts(Axis.LENGTH, length)
    size = min(chunk, length // columns)
    padding = -(length // columns) % size
    array = jnp.reshape(array_BL, (rows, batch // rows, columns, length // columns, *rest))
    array = jnp.pad(array, ((0, 0),) * 3 + ((0, padding),) + ((0, 0),) * len(rest))
    array = array.reshape(rows, batch // rows, columns, -1, size, *rest)
    array = jnp.moveaxis(array, (3, 2), (0, 2)).reshape(-1, rows * columns, batch // rows, size, *rest)
    return constrain(array, None, shards, *(None,) * (len(rest) + 2))


def _logits_and_partition(how, hidden_SBTD, unembedding_VD):
    logits_SBTV = logits_of(hidden_SBTD, unembedding_VD)
    logits_SBTV = capped(constrain(logits_SBTV, how.shards, None, None, Axis.VOCAB), how.logit_cap)
    return logits_SBTV, jax.nn.logsumexp(logits_SBTV, axis=-1)


def _einsum(subscripts, a, b):
    """A sum of products in float32, of factors that may be narrower."""
    if target_platform() == "cpu":
        # XLA for CPUs has no batches of such products; in float32 they are the same numbers.
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def _chunk_sums(logits_SBTV, partition_SBT, targets_SBT, mask_SBT):
    target_logit_SBT = jnp.take_along_axis(logits_SBTV, targets_SBT[..., None], axis=-1)[..., 0]
    cross_entropy_S = jnp.sum(jnp.where(mask_SBT, partition_SBT - target_logit_SBT, 0), axis=(1, 2))
    return cross_entropy_S, jnp.sum(jnp.where(mask_SBT, jnp.square(partition_SBT), 0), axis=(1, 2))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked_loss(how, hidden_CSBTD, targets_CSBT, mask_CSBT, unembedding_VD, inverse):
    """Cross entropy and z penalty, both times `inverse`; the gradient is that of their sum."""

    def step(sums, chunk):
        hidden_SBTD, targets_SBT, mask_SBT = chunk
        logits_SBTV, partition_SBT = _logits_and_partition(how, hidden_SBTD, unembedding_VD)
        return jax.tree.map(jnp.add, sums, _chunk_sums(logits_SBTV, partition_SBT, targets_SBT, mask_SBT)), None

    zero_S = jnp.zeros(hidden_CSBTD.shape[1], jnp.float32)
    (cross_entropy_S, square_S), _ = jax.lax.scan(step, (zero_S, zero_S), (hidden_CSBTD, targets_CSBT, mask_CSBT))
    return jnp.sum(cross_entropy_S) * inverse, how.z_loss * jnp.sum(square_S) * inverse


def _chunked_loss_forward(how, hidden_CSBTD, targets_CSBT, mask_CSBT, unembedding_VD, inverse):
    """Both losses, and already the gradients of their sum: so no logits are kept or computed twice."""
    weights_VD = unembedding_VD.astype(hidden_CSBTD.dtype)

    def step(carry, chunk):
        sums, dunembedding_SDV = carry
        hidden_SBTD, targets_SBT, mask_SBT = chunk
        logits_SBTV, partition_SBT = _logits_and_partition(how, hidden_SBTD, weights_VD)
        sums = jax.tree.map(jnp.add, sums, _chunk_sums(logits_SBTV, partition_SBT, targets_SBT, mask_SBT))
        scale_SBT = jnp.where(mask_SBT, inverse, 0)
        softmax_SBTV = jnp.exp(logits_SBTV - partition_SBT[..., None])
        is_target_SBTV = jnp.arange(logits_SBTV.shape[-1])[None, None, None] == targets_SBT[..., None]
        dlogits_SBTV = softmax_SBTV * (1 + 2 * how.z_loss * partition_SBT)[..., None] - is_target_SBTV
        if how.logit_cap is not None:
            dlogits_SBTV *= capped_slope(logits_SBTV, how.logit_cap)
        dlogits_SBTV = (dlogits_SBTV * scale_SBT[..., None]).astype(hidden_SBTD.dtype)
        dhidden_SBTD = _einsum("sbtv,vd->sbtd", dlogits_SBTV, weights_VD)
        # With D first a CPU transposes the small operand for the product, not the logits.
        dunembedding_SDV += _einsum("sbtd,sbtv->sdv", hidden_SBTD, dlogits_SBTV)
        dunembedding_SDV = constrain(dunembedding_SDV, how.shards, None, Axis.VOCAB)
        return (sums, dunembedding_SDV), dhidden_SBTD.astype(hidden_SBTD.dtype)

    num_shards = hidden_CSBTD.shape[1]
    zero_S = jnp.zeros(num_shards, jnp.float32)
    start = ((zero_S, zero_S), jnp.zeros((num_shards, *unembedding_VD.T.shape), jnp.float32))
    chunks = (hidden_CSBTD, targets_CSBT, mask_CSBT)
    ((cross_entropy_S, square_S), dunembedding_SDV), dhidden_CSBTD = jax.lax.scan(step, start, chunks)
    outputs = (jnp.sum(cross_entropy_S) * inverse, how.z_loss * jnp.sum(square_S) * inverse)
    dunembedding_VD = constrain(jnp.sum(dunembedding_SDV, axis=0).T, Axis.VOCAB, Axis.EMBED)
    return outputs, (dhidden_CSBTD, dunembedding_VD.astype(unembedding_VD.dtype))


def _chunked_loss_backward(how, residuals, cotangents):
    """Both outputs enter the loss with the same weight, so one cotangent scales the gradients of their sum."""
    del how
    dhidden_CSBTD, dunembedding_VD = residuals
    weight = cotangents[0]
    dunembedding_VD = dunembedding_VD * weight.astype(dunembedding_VD.dtype)
    return (dhidden_CSBTD * weight.astype(dhidden_CSBTD.dtype), None, None, dunembedding_VD, None)


_chunked_loss.defvjp(_chunked_loss_forward, _chunked_loss_backward)
