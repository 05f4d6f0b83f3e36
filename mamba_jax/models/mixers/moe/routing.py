"""Which experts a token goes through, and what the training loss pays for an uneven choice."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from mamba_jax.models.mixers.moe.config import MoeConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
    """The choice of a router.

    Attributes:
        experts: numbers of each token's experts, the most probable first, (B, L, K).
        weights: factors of their outputs, (B, L, K), float32.
        penalty: what is added to the training loss, float32; None if both weights of penalties are 0.
    """

    experts: Int[jax.Array, "B L K"]
    weights: Float[jax.Array, "B L K"]
    penalty: Float[jax.Array, ""] | None


def route(config: MoeConfig, logits_BLX: Float[jax.Array, "B L X"]) -> Routing:
    r"""Chooses experts by the router's logits.

        p       = softmax(logits)
        experts = the K largest p of a token; of equal ones those with the lower number
        weights = their p, divided by their sum if `normalize_weights`
        penalty = balance_weight X sum_e f_e P_e + z_weight mean(logsumexp(logits)^2)

    f_e is the number of tokens that go to expert e, over the number of tokens; it has no gradient. P_e is the mean of
    p_e over tokens. Tokens are all of the batch that is given, over all devices, and padding among them, for no mixer
    knows what the loss counts. With even shares the first sum is K / X.

    Source: arXiv 2101.03961, equations 4 to 6, whose f_e is the K = 1 of this; with K as in Mixtral and Jamba of
    `transformers`. There, f and P are means over the tokens of all layers at once, and the layers' shares may even out
    each other; here every layer has its own penalty, and the model adds them up.
    """
    experts_X = jnp.arange(config.num_experts)[None, None, None]
    p_BLX = jax.nn.softmax(logits_BLX, axis=-1)
    _, experts_BLK = jax.lax.top_k(jax.lax.stop_gradient(p_BLX), config.experts_per_token)
    is_chosen_BLKX = experts_BLK[..., None] == experts_X
    # A sum with a single term is that term, and its gradient no scatter, which adds in a free order on GPUs.
    weights_BLK = jnp.sum(jnp.where(is_chosen_BLKX, p_BLX[:, :, None], 0), axis=-1)
    if config.normalize_weights:
        weights_BLK = weights_BLK / jnp.sum(weights_BLK, axis=-1, keepdims=True)
    penalty = None
    if config.balance_weight or config.z_weight:
        share_X = jnp.mean(jnp.sum(is_chosen_BLKX, axis=2, dtype=jnp.float32), axis=(0, 1))
        uneven = config.num_experts * jnp.sum(share_X * jnp.mean(p_BLX, axis=(0, 1)))
        large = jnp.mean(jnp.square(jax.nn.logsumexp(logits_BLX, axis=-1)))
        penalty = config.balance_weight * uneven + config.z_weight * large
    return Routing(experts=experts_BLK, weights=weights_BLK, penalty=penalty)
