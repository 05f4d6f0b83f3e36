"""The language model: embedding, residual blocks, final norm, head."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from mamba_jax.models import initializers
from mamba_jax.models.block import Block
from mamba_jax.models.config import ModelConfig, Stack
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
    """A language model; one call serves training, prefill and decoding.

    Blocks that repeat are stacked on a leading axis and run by `jax.lax.scan`, so that compile time does not depend on
    depth. Parameters of a model of one mixer are under `layers`, those of a hybrid under `layers_0`, `layers_1`, ...

    Source: arXiv 2312.00752, section 3.4 and appendix E.2.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        vocab, dim, dtype = config.padded_vocab_size, config.d_model, config.param_dtype
        init = initializers.normal(config.embedding_std)
        self.embedding = Embedding(vocab, dim, initializer=init, param_dtype=dtype, rngs=rngs)
        for stack in config.stacks:
            setattr(self, stack.name, _build(stack, config, rngs))
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
        segment_ids_BL = None if segment_ids is None else jnp.asarray(segment_ids)
        residual_BLD = constrain(self.embedding(jnp.asarray(tokens)), Axis.BATCH, Axis.LENGTH, None)
        after: LMState = {}
        for unit in self.config.units:
            before = tuple(None if state is None else state[stack.name] for stack in unit)
            residual_BLD, states = self._run_unit(unit, residual_BLD, before, segment_ids_BL)
            after |= {stack.name: stack_state for stack, stack_state in zip(unit, states, strict=True)}
        hidden_BLD = self.norm_f(residual_BLD, dtype=self.config.compute_dtype)
        return HiddenOutput(hidden=hidden_BLD, state=after)

    def _run_unit(
        self, unit: tuple[Stack, ...], residual_BLD: jax.Array, states: Any, segment_ids_BL: jax.Array | None
    ) -> tuple[jax.Array, Any]:
        """The residual stream and the states of the unit's stacks after all rounds through its blocks."""
        graphs, params = zip(*(nnx.split(getattr(self, stack.name)) for stack in unit), strict=True)

        def run_round(residual_BLD: jax.Array, blocks: tuple[Any, Any]) -> tuple[jax.Array, Any]:
            after = []
            for graph, params, state in zip(graphs, *blocks, strict=True):
                residual_BLD, block_state = nnx.merge(graph, params)(residual_BLD, state, segment_ids_BL)
                after.append(block_state)
            return residual_BLD, tuple(after)

        if self.config.remat != "none":
            policy = _REMAT_POLICIES[self.config.remat]
            run_round = jax.checkpoint(run_round, policy=policy, prevent_cse=False)
        return jax.lax.scan(run_round, residual_BLD, (params, states))

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


def _build(stack: Stack, config: ModelConfig, rngs: nnx.Rngs) -> Block:
    """The blocks of a stack, their parameters stacked on a leading axis."""

    def build(key: jax.Array) -> Block:
        return Block(stack.mixer, config.setting, norm_eps=config.norm_eps, rngs=nnx.Rngs(params=key))

    return nnx.vmap(build)(jax.random.split(rngs.params(), stack.repeats))
