"""The language model: embedding, residual blocks, final norm, head."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from mamba_jax.models import initializers
from mamba_jax.models.block import Block
from mamba_jax.models.config import ModelConfig
from mamba_jax.models.layers import Embedding, RMSNorm, read
from mamba_jax.models.state import LMState
from mamba_jax.sharding import Axis, constrain

_REMAT_POLICIES = {
    "block": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class HiddenOutput:
    """Result of the model without its head.

    Attributes:
        hidden: (B, L, D) after the final norm, in the compute dtype.
        state: after the last token.
    """

    hidden: Float[jax.Array, "B L D"]
    state: LMState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LMOutput:
    """Result of the model.

    Attributes:
        logits: (B, L, V) in float32, V the padded vocabulary.
        state: after the last token.
    """

    logits: Float[jax.Array, "B L V"]
    state: LMState


class LanguageModel(nnx.Module):
    """A Mamba language model; one call serves training, prefill and decoding.

    The blocks are stacked on a leading axis and run by `jax.lax.scan`, so that compile time does not depend on depth.

    Source: arXiv 2312.00752, section 3.4 and appendix E.2.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        vocab, dim, dtype = config.padded_vocab_size, config.d_model, config.param_dtype
        init = initializers.normal(config.embedding_std)
        self.embedding = Embedding(vocab, dim, initializer=init, param_dtype=dtype, rngs=rngs)
        self.layers = nnx.vmap(lambda key: Block(config, rngs=nnx.Rngs(params=key)))(
            jax.random.split(rngs.params(), config.num_layers)
        )
        self.norm_f = RMSNorm(dim, eps=config.norm_eps, param_dtype=dtype, rngs=rngs)
        if not config.tie_embeddings:
            head_init = initializers.fan_in(dim)
            self.lm_head = Embedding(vocab, dim, initializer=head_init, param_dtype=dtype, rngs=rngs)

    def __call__(
        self,
        tokens: Int[jax.Array | np.ndarray, "B L"],
        state: LMState | None = None,
        *,
        segment_ids: Int[jax.Array | np.ndarray, "B L"] | None = None,
    ) -> LMOutput:
        """Logits of the next token at every position.

        Args:
            tokens: ids in [0, vocab_size), (B, L).
            state: from the call on the tokens before; None starts a sequence.
            segment_ids: document of each token, (B, L); convolution and state are reset where it changes. None is one
                document a row.

        Returns:
            Logits, and the state after the last token.
        """
        output = self.hidden(tokens, state, segment_ids=segment_ids)
        return LMOutput(logits=self.unembed(output.hidden), state=output.state)

    def hidden(
        self,
        tokens: Int[jax.Array | np.ndarray, "B L"],
        state: LMState | None = None,
        *,
        segment_ids: Int[jax.Array | np.ndarray, "B L"] | None = None,
    ) -> HiddenOutput:
        """The model without its head; arguments as in `__call__`."""
        graph, params = nnx.split(self.layers)
        segment_ids_BL = None if segment_ids is None else jnp.asarray(segment_ids)

        def run_block(residual_BLD, layer):
            params, layer_state = layer
            return nnx.merge(graph, params)(residual_BLD, layer_state, segment_ids_BL)

        if self.config.remat != "none":
            policy = _REMAT_POLICIES[self.config.remat]
            run_block = jax.checkpoint(run_block, policy=policy, prevent_cse=False)
        residual_BLD = constrain(self.embedding(jnp.asarray(tokens)), Axis.BATCH, Axis.LENGTH, None)
        residual_BLD, layers = jax.lax.scan(run_block, residual_BLD, (params, state and state.layers))
        hidden_BLD = self.norm_f(residual_BLD, dtype=self.config.compute_dtype)
        return HiddenOutput(hidden=hidden_BLD, state=LMState(layers=layers))

    def unembed(self, hidden: Float[jax.Array, "B L D"]) -> Float[jax.Array, "B L V"]:
        """The head: float32 logits over the padded vocabulary."""
        weights = self.unembedding.astype(hidden.dtype)
        logits = jnp.einsum("bld,vd->blv", hidden, weights, preferred_element_type=jnp.float32)
        return constrain(logits, Axis.BATCH, Axis.LENGTH, Axis.VOCAB)

    @property
    def unembedding(self) -> Float[jax.Array, "V D"]:
        """The head's matrix (V, D), V the padded vocabulary, in the parameter dtype."""
        head = self.embedding if self.config.tie_embeddings else self.lm_head
        return read(head.table)
