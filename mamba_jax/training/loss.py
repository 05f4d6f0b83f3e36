"""Next-token cross entropy that never holds the logits of a whole batch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LossOutput:
    """Loss of a batch, or its part of the loss of a larger one.

    Attributes:
        loss: cross_entropy + z_loss; the only differentiable field.
        cross_entropy: sum over counted positions of -log p(target), over `normalizer`; nats per token.
        z_loss: weighted sum of squared log-partition values, over `normalizer`.
    """

    loss: Float[jax.Array, ""]
    cross_entropy: Float[jax.Array, ""]
    z_loss: Float[jax.Array, ""]


def next_token_loss(
    hidden: Float[jax.Array, "B L D"],
    unembedding: Float[jax.Array, "V D"],
    targets: Int[jax.Array | np.ndarray, "B L"],
    mask: Bool[jax.Array | np.ndarray, "B L"],
    *,
    normalizer: Float[jax.Array, ""],
    z_loss: float,
    chunk: int,
) -> LossOutput:
    r"""Cross entropy of a linear head, computed for `chunk` positions of the sequence at a time.

        logits = hidden unembedding^T
        loss   = sum_t mask_t (logsumexp(logits_t) - logits_t[target_t] + z_loss logsumexp(logits_t)^2) / normalizer

    When it is differentiated, the pass that computes a chunk's logits also turns them into the gradients of `hidden`
    and `unembedding`, so the vocabulary product is never done twice.

    Args:
        hidden: (B, L, D); the product with the head runs in its dtype and accumulates in float32.
        unembedding: (V, D) head, any V.
        targets: (B, L) ids in [0, V).
        mask: (B, L) positions that count.
        normalizer: what the sums are divided by: the number of counted positions of the whole batch, so that parts of
            a batch add up to its loss. A value below 1 counts as 1.
        z_loss: weight of the penalty on the log-partition (arXiv 2204.02311, section 5).
        chunk: positions of the sequence whose logits exist at a time.
    """
    length = hidden.shape[1]
    chunk = min(chunk, length)
    padding = -length % chunk

    def split(array: jax.Array | np.ndarray) -> jax.Array:
        array = jnp.pad(array, ((0, 0), (0, padding)) + ((0, 0),) * (array.ndim - 2))
        return jnp.moveaxis(array.reshape(array.shape[0], -1, chunk, *array.shape[2:]), 1, 0)

    inverse = 1 / jnp.maximum(normalizer, 1).astype(jnp.float32)
    chunks = (split(hidden), split(targets), split(mask))
    cross_entropy, penalty = _chunked_loss(z_loss, *chunks, unembedding, inverse)
    return LossOutput(
        loss=cross_entropy + penalty,
        cross_entropy=jax.lax.stop_gradient(cross_entropy),
        z_loss=jax.lax.stop_gradient(penalty),
    )


def _logits_and_partition(hidden_BTD, unembedding_VD):
    weights_VD = unembedding_VD.astype(hidden_BTD.dtype)
    logits_BTV = jnp.einsum("btd,vd->btv", hidden_BTD, weights_VD, preferred_element_type=jnp.float32)
    return logits_BTV, jax.nn.logsumexp(logits_BTV, axis=-1)


def _chunk_sums(logits_BTV, partition_BT, targets_BT, mask_BT):
    target_logit_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    cross_entropy = jnp.sum(jnp.where(mask_BT, partition_BT - target_logit_BT, 0))
    return cross_entropy, jnp.sum(jnp.where(mask_BT, jnp.square(partition_BT), 0))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked_loss(z_loss, hidden_CBTD, targets_CBT, mask_CBT, unembedding_VD, inverse):
    """Cross entropy and z penalty, both times `inverse`; the gradient is that of their sum."""

    def step(sums, chunk):
        hidden_BTD, targets_BT, mask_BT = chunk
        logits_BTV, partition_BT = _logits_and_partition(hidden_BTD, unembedding_VD)
        return jax.tree.map(jnp.add, sums, _chunk_sums(logits_BTV, partition_BT, targets_BT, mask_BT)), None

    zero = jnp.zeros((), jnp.float32)
    (cross_entropy, square), _ = jax.lax.scan(step, (zero, zero), (hidden_CBTD, targets_CBT, mask_CBT))
    return cross_entropy * inverse, z_loss * square * inverse


def _chunked_loss_forward(z_loss, hidden_CBTD, targets_CBT, mask_CBT, unembedding_VD, inverse):
    def step(carry, chunk):
        sums, dunembedding_VD = carry
        hidden_BTD, targets_BT, mask_BT = chunk
        logits_BTV, partition_BT = _logits_and_partition(hidden_BTD, unembedding_VD)
        sums = jax.tree.map(jnp.add, sums, _chunk_sums(logits_BTV, partition_BT, targets_BT, mask_BT))
        scale_BT = jnp.where(mask_BT, inverse, 0)
        softmax_BTV = jnp.exp(logits_BTV - partition_BT[..., None])
        is_target_BTV = jnp.arange(logits_BTV.shape[-1])[None, None] == targets_BT[..., None]
        dlogits_BTV = softmax_BTV * (1 + 2 * z_loss * partition_BT)[..., None] - is_target_BTV
        dlogits_BTV = (dlogits_BTV * scale_BT[..., None]).astype(hidden_BTD.dtype)
        weights_VD = unembedding_VD.astype(hidden_BTD.dtype)
        dhidden_BTD = jnp.einsum("btv,vd->btd", dlogits_BTV, weights_VD, preferred_element_type=jnp.float32)
        dunembedding_VD += jnp.einsum("btv,btd->vd", dlogits_BTV, hidden_BTD, preferred_element_type=jnp.float32)
        return (sums, dunembedding_VD), dhidden_BTD.astype(hidden_BTD.dtype)

    zero = jnp.zeros((), jnp.float32)
    start = ((zero, zero), jnp.zeros(unembedding_VD.shape, jnp.float32))
    chunks = (hidden_CBTD, targets_CBT, mask_CBT)
    ((cross_entropy, square), dunembedding_VD), dhidden_CBTD = jax.lax.scan(step, start, chunks)
    outputs = (cross_entropy * inverse, z_loss * square * inverse)
    return outputs, (dhidden_CBTD, dunembedding_VD.astype(unembedding_VD.dtype))


def _chunked_loss_backward(z_loss, residuals, cotangents):
    """Both outputs enter the loss with the same weight, so one cotangent scales the gradients of their sum."""
    del z_loss
    dhidden_CBTD, dunembedding_VD = residuals
    weight = cotangents[0]
    return (dhidden_CBTD * weight.astype(dhidden_CBTD.dtype), None, None, dunembedding_VD * weight, None)


_chunked_loss.defvjp(_chunked_loss_forward, _chunked_loss_backward)
