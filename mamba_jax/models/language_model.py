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
from mamba_jax.models.head import Head, capped
from mamba_jax.models.layers import PROJECTION, Embedding, RMSNorm
from mamba_jax.models.mixers.mixer import BlockInput
from mamba_jax.models.state import LMState
from mamba_jax.models.storage.matrix import logits_of, narrowed, read_matrix
from mamba_jax.models.storage.per_layer import is_unstacked, layer, num_layers, of_layers, stacked, unstacked
from mamba_jax.sharding import Axis, constrain

_REMAT_POLICIES = {
    "block": jax.checkpoint_policies.nothing_saveable,
    "cheap": jax.checkpoint_policies.save_only_these_names(PROJECTION, "selective_scan", "ssd"),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class HiddenOutput:
    """Result of the model without its head.

    Attributes:
        hidden: (B, L, D) after the final norm, in the compute dtype.
        state: after the last token.
        penalty: sum of what the blocks add to the training loss, float32; None if no mixer adds anything.
    """

    hidden: Float[jax.Array, "B L D"]
    state: LMState
    penalty: Float[jax.Array, ""] | None


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
    depth. Parameters of a model of one mixer are under `layers`, those of a hybrid under `layers_0`, `layers_1`, ...,
    and those of a block that layers share under `shared_` and its name. Parameters and state may also have an array for
    each layer, as `ModelDefinition.unstacked` makes them; then blocks are run one after the other.

    Source: arXiv 2312.00752, section 3.4 and appendix E.2.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        vocab, dim, dtype = config.padded_vocab_size, config.d_model, config.param_dtype
        init = initializers.normal(config.embedding_std)
        self.embedding = Embedding(vocab, dim, initializer=init, param_dtype=dtype, rngs=rngs)
        for stack in config.stacks:
            setattr(self, stack.name, _build(stack, config, rngs))
        for name, shared in config.shared_blocks.items():
            norm = {"norm_eps": config.norm_eps, "norm_offset": config.norm_offset}
            setattr(self, f"shared_{name}", shared.block()(shared, config.setting, **norm, rngs=rngs))
        self.norm_f = RMSNorm(dim, eps=config.norm_eps, offset=config.norm_offset, param_dtype=dtype, rngs=rngs)
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
        embedded_BLD = self.embedded(jnp.asarray(tokens))
        segment_ids_BL = None if segment_ids is None else jnp.asarray(segment_ids)
        residual_BLD = embedded_BLD
        after: LMState = {}
        penalties = []
        for unit in self.config.units:
            before = tuple(None if state is None else state[stack.name] for stack in unit)
            residual_BLD, outputs = self._run_unit(unit, residual_BLD, before, (embedded_BLD, segment_ids_BL))
            after |= {stack.name: state for stack, (state, _) in zip(unit, outputs, strict=True)}
            penalties += [jnp.sum(penalty_R) for _, penalty_R in outputs if penalty_R is not None]
        hidden_BLD = self.norm_f(residual_BLD, dtype=self.config.compute_dtype)
        penalty = jnp.sum(jnp.stack(penalties)) if penalties else None
        return HiddenOutput(hidden=hidden_BLD, state=after, penalty=penalty)

    def embedded(self, tokens: Int[jax.Array, "B L"]) -> Float[jax.Array, "B L D"]:
        """The vectors of tokens as they enter the residual stream, float32."""
        vectors_BLD = self.embedding(tokens)
        scale = self.config.embedding_scale
        return constrain(vectors_BLD if scale == 1 else scale * vectors_BLD, Axis.BATCH, Axis.LENGTH, None)

    def _run_unit(
        self, unit: tuple[Stack, ...], residual_BLD: jax.Array, states: Any, beside: tuple[jax.Array, jax.Array | None]
    ) -> tuple[jax.Array, Any]:
        """The residual stream after all rounds through the unit's blocks; for each stack, its states and penalties.

        Args:
            unit: the blocks of a round.
            residual_BLD: before the first round.
            states: before the tokens, for each of the unit's stacks.
            beside: the embedded tokens, and their documents.
        """
        graphs, params = zip(*(nnx.split(getattr(self, stack.name)) for stack in unit), strict=True)
        shared = {name: nnx.split(getattr(self, f"shared_{name}")) for name in self.config.shared_blocks}
        is_per_layer = is_unstacked(params)

        def run_round(residual_BLD: jax.Array, blocks: tuple[Any, Any]) -> tuple[jax.Array, Any]:
            after = []
            merged = {name: nnx.merge(*parts) for name, parts in shared.items()}
            for graph, params, state in zip(graphs, *blocks, strict=True):
                given = BlockInput(
                    residual=residual_BLD,
                    embedded=beside[0],
                    segment_ids=beside[1],
                    shared=merged,
                    is_generating=is_per_layer,
                )
                output = nnx.merge(graph, params)(given, state)
                residual_BLD = output.residual
                after.append((output.state, output.penalty))
            return residual_BLD, tuple(after)

        if is_per_layer:
            return _run_layers(run_round, residual_BLD, params, unstacked(states))
        is_unrolled = self.config.unroll
        if self.config.remat != "none":
            policy = _REMAT_POLICIES[self.config.remat]
            # In a loop nothing that is computed again can be merged with what it repeats.
            run_round = jax.checkpoint(run_round, policy=policy, prevent_cse=is_unrolled)
        # Rounded once for all layers: neither the recomputation nor the gradient passes over wider matrices again.
        params = narrowed(params, self.config.compute_dtype)
        if is_unrolled:
            # The layers' gradients are put together here once, and not in each of the optimizer's passes over them.
            params = jax.lax.optimization_barrier(params)
        return jax.lax.scan(run_round, residual_BLD, (params, stacked(states)), unroll=is_unrolled)

    def unembed(self, hidden: Float[jax.Array, "B L D"]) -> Float[jax.Array, "B L V"]:
        """The head: float32 logits over the padded vocabulary."""
        head = self.head
        logits = logits_of(hidden, head.matrix)
        return capped(constrain(logits, Axis.BATCH, Axis.LENGTH, Axis.VOCAB), head.logit_cap)

    @property
    def head(self) -> Head:
        """The head, which may share the embedding's table."""
        table = self.embedding.table if self.config.tie_embeddings else self.lm_head.table
        return Head(matrix=read_matrix(table), logit_cap=self.config.logit_cap)


def _run_layers(run_round: Any, residual_BLD: jax.Array, params: tuple[Any, ...], states: tuple[Any, ...]) -> Any:
    """What `jax.lax.scan` gives, for parameters and states with an array for each layer."""
    outputs = []
    for index in range(num_layers(params)):
        residual_BLD, after = run_round(residual_BLD, (layer(params, index), layer(states, index)))
        outputs.append(after)
    return residual_BLD, tuple(
        (of_layers([state for state, _ in rounds]), None if rounds[0][1] is None else jnp.stack([p for _, p in rounds]))
        for rounds in zip(*outputs, strict=True)
    )


def _build(stack: Stack, config: ModelConfig, rngs: nnx.Rngs) -> Block:
    """The blocks of a stack, their parameters stacked on a leading axis."""

    def build(key: jax.Array) -> Block:
        return Block(stack.mixer, config, rngs=nnx.Rngs(params=key))

    return nnx.vmap(build)(jax.random.split(rngs.params(), stack.repeats))
