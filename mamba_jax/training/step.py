"""One optimizer step as one compiled, donated program."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from mamba_jax.config import ExperimentConfig
from mamba_jax.data.batch import LMBatch
from mamba_jax.models.parameters import ModelDefinition, Params
from mamba_jax.sharding import Axis, constrain
from mamba_jax.training.loss import next_token_loss
from mamba_jax.training.optimizer import learning_rate
from mamba_jax.training.train_state import TrainState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """What a step reports, each a float32 scalar.

    Attributes:
        loss: cross_entropy + z_loss.
        cross_entropy: nats per counted token.
        z_loss: weighted log-partition penalty.
        grad_norm: global norm before clipping.
        learning_rate: of this update.
    """

    loss: Float[jax.Array | np.ndarray, ""]
    cross_entropy: Float[jax.Array | np.ndarray, ""]
    z_loss: Float[jax.Array | np.ndarray, ""]
    grad_norm: Float[jax.Array | np.ndarray, ""]
    learning_rate: Float[jax.Array | np.ndarray, ""]


def make_train_step(
    config: ExperimentConfig,
    definition: ModelDefinition,
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
) -> jax.stages.Wrapped:
    """The jitted step; call it under `jax.set_mesh`. It consumes the state it is given.

    With accumulation over k microbatches, the gradients of the parts of the loss are summed. All are divided by the
    number of counted tokens of the whole batch, so the result is that of the undivided batch.

    Args:
        config: of the run.
        definition: of the model.
        optimizer: of the run.
        abstract: from `abstract_state`; its shardings are those of the state that the step returns.
    """
    schedule = learning_rate(config.optimizer, config.train.num_steps)
    # Left to the compiler, the new state could come back laid out otherwise than the old one: the memory of the old
    # state could not be reused, and the next call would compile again.
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def train_step(state: TrainState, batch: LMBatch) -> tuple[TrainState, StepMetrics]:
        loss_and_gradient = functools.partial(_loss_and_gradient, config, definition, state.params)
        normalizer = jnp.sum(batch.loss_mask, dtype=jnp.float32)
        if config.train.accumulation_steps == 1:
            (cross_entropy, z_loss), gradient = loss_and_gradient(batch, normalizer)
        else:

            def accumulate(total, microbatch):
                return jax.tree.map(jnp.add, total, loss_and_gradient(microbatch, normalizer)), None

            zero = jnp.zeros((), jnp.float32)
            start = ((zero, zero), jax.tree.map(jnp.zeros_like, state.params))
            microbatches = _microbatches(batch, config.train.accumulation_steps)
            ((cross_entropy, z_loss), gradient), _ = jax.lax.scan(accumulate, start, microbatches)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        metrics = StepMetrics(
            loss=cross_entropy + z_loss,
            cross_entropy=cross_entropy,
            z_loss=z_loss,
            grad_norm=optax.tree.norm(gradient),
            learning_rate=jnp.asarray(schedule(state.step), jnp.float32),
        )
        params = optax.apply_updates(state.params, updates)
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return train_step


def _loss_and_gradient(
    config: ExperimentConfig, definition: ModelDefinition, params: Params, batch: LMBatch, normalizer: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], Params]:
    def loss_function(params: Params):
        model = definition.merge(params)
        hidden = model.hidden(batch.tokens, segment_ids=batch.segment_ids).hidden
        output = next_token_loss(
            hidden,
            model.unembedding,
            batch.targets,
            batch.loss_mask,
            normalizer=normalizer,
            z_loss=config.train.z_loss,
            chunk=config.train.loss_chunk,
        )
        return output.loss, (output.cross_entropy, output.z_loss)

    (_, parts), gradient = jax.value_and_grad(loss_function, has_aux=True)(params)
    return parts, gradient


def _microbatches(batch: LMBatch, parts: int) -> LMBatch:
    """(B, L) to (parts, B / parts, L), every `parts`-th row in one, so that no row moves to another device."""

    def split(rows_BL: jax.Array) -> jax.Array:
        batch_size, length = rows_BL.shape
        split_MBL = jnp.moveaxis(rows_BL.reshape(batch_size // parts, parts, length), 1, 0)
        return constrain(split_MBL, None, Axis.BATCH, Axis.LENGTH)

    return jax.tree.map(split, batch)
