"""The training step: loss, gradient and update as one jitted function that donates the old state."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Bool, Float

from mamba_jax.data.batch import LMBatch
from mamba_jax.models.loss import LossOutput, next_token_loss
from mamba_jax.models.parameters import ModelDefinition, Params, chosen, completed
from mamba_jax.models.state import (
    LMState,
    constrain_state,
    finite_rows,
    init_state,
    join_rows,
    reset_rows,
    split_rows,
)
from mamba_jax.sharding import Axis, batch_sharding, compiler_options, constrain
from mamba_jax.training.config import FaultsConfig, ProgramConfig
from mamba_jax.training.optimizer import learning_rate
from mamba_jax.training.train_state import SkipState, TrainState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """The metrics of a step, each a float32 scalar.

    Attributes:
        loss: cross_entropy + z_loss + balance_loss.
        cross_entropy: nats per counted token.
        z_loss: weighted log-partition penalty.
        balance_loss: weighted penalties of experts that are used unevenly; 0 without experts.
        grad_norm: global norm of the gradient before clipping.
        learning_rate: learning rate of this update; the schedule counts updates, so skipped steps do not advance it.
        skipped: number of skipped steps in the whole run so far, this one included.
        skipped_in_a_row: number of steps skipped since the last update; 0 if this step was not skipped.
    """

    loss: Float[jax.Array | np.ndarray, ""]
    cross_entropy: Float[jax.Array | np.ndarray, ""]
    z_loss: Float[jax.Array | np.ndarray, ""]
    balance_loss: Float[jax.Array | np.ndarray, ""]
    grad_norm: Float[jax.Array | np.ndarray, ""]
    learning_rate: Float[jax.Array | np.ndarray, ""]
    skipped: Float[jax.Array | np.ndarray, ""]
    skipped_in_a_row: Float[jax.Array | np.ndarray, ""]


def abstract_batch(config: ProgramConfig, mesh: Mesh) -> LMBatch:
    """Shapes, dtypes and shardings of a training batch, as `jax.ShapeDtypeStruct`."""
    sharding = batch_sharding(mesh)
    shape = config.global_batch, config.seq_len
    tokens: Any = jax.ShapeDtypeStruct(shape, np.int32, sharding=sharding)
    mask: Any = jax.ShapeDtypeStruct(shape, np.bool_, sharding=sharding)
    continues: Any = jax.ShapeDtypeStruct(shape[:1], np.bool_, sharding=batch_sharding(mesh, dims=1))
    return LMBatch(
        tokens=tokens,
        targets=tokens,
        loss_mask=mask,
        segment_ids=tokens if config.documents == "packed" else None,
        continues=continues if config.order == "streams" else None,
    )


def make_train_step(
    config: ProgramConfig,
    definition: ModelDefinition,
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
) -> jax.stages.Wrapped:
    """The jitted training step; call it under `jax.set_mesh`. It donates the state that it is given.

    With accumulation over several microbatches, their gradients are summed. The loss of each is divided by the number
    of counted tokens of the whole batch, so the sum is the gradient of the undivided batch. A penalty on experts is the
    mean over microbatches, and over windows, of the penalty of each; devices make no difference to it. It is a product
    of means over tokens, so the mean over parts of a batch is not that of the undivided batch: it asks for even shares
    in each part, which is a little more than even shares overall.

    A step whose loss or gradient is not finite, or whose gradient is a spike, leaves parameters, moments and average
    as they were; see `FaultsConfig`. A finite gradient keeps them finite: `ProgramConfig` refuses recipes whose
    updates could add up to more than float32 holds.

    With `data.order="streams"` every row starts from the recurrent state at the end of the same row in the previous
    step. Gradients reach back to the start of the step only: truncated back-propagation through time.

    Args:
        config: everything that the step depends on.
        definition: the model without its parameters.
        optimizer: the update rule, from `make_optimizer`.
        abstract: from `abstract_state`; the step returns its state with the shardings given here.

    Returns:
        A function from (`TrainState`, `LMBatch`) to (`TrainState`, `StepMetrics`).
    """
    schedule = learning_rate(config.optimizer, config.num_steps)
    # Without out_shardings the compiler could choose another layout for the new state than the old one has: then the
    # memory of the old state could not be reused, and the next call would compile again.
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)

    @functools.partial(
        jax.jit,
        donate_argnums=0,
        out_shardings=(shardings, None),
        compiler_options=compiler_options(shardings.step.mesh),
    )
    def train_step(state: TrainState, batch: LMBatch) -> tuple[TrainState, StepMetrics]:
        parts, gradient, recurrent = _whole_batch(config, definition, state, batch)
        with jax.named_scope("optimizer"):
            grad_norm = optax.tree.norm(gradient)
            accepted, skips = _judge(config.faults, state, parts.loss, grad_norm)
            updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
            trained: Any = optax.apply_updates(chosen(definition.trained, state.params), updates)
            params = completed(definition.trained, trained, state.params)
            ema = _average(config.optimizer.ema_decay, definition, state.ema, trained)
            params, opt_state, ema = jax.tree.map(
                lambda new, old: jnp.where(accepted, new, old),
                (params, opt_state, ema),
                (state.params, state.opt_state, state.ema),
            )
        metrics = StepMetrics(
            **vars(parts),
            grad_norm=grad_norm,
            learning_rate=jnp.asarray(schedule(state.step - state.skips.total), jnp.float32),
            skipped=skips.total.astype(jnp.float32),
            skipped_in_a_row=skips.in_a_row.astype(jnp.float32),
        )
        state = TrainState(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            skips=skips,
            ema=ema,
            recurrent=None if recurrent is None else finite_rows(config.model, recurrent),
        )
        return state, metrics

    return train_step


def _average(decay: float | None, definition: ModelDefinition, ema: Params | None, trained: Params) -> Params | None:
    """The moving average after an update of what is trained; None without one."""
    if decay is None or ema is None:
        return ema
    before = chosen(definition.trained, ema)
    mean = jax.tree.map(lambda mean, value: decay * mean + (1 - decay) * value, before, trained)
    return completed(definition.trained, mean, ema)


def _judge(
    config: FaultsConfig, state: TrainState, loss: jax.Array, grad_norm: jax.Array
) -> tuple[Bool[jax.Array, ""], SkipState]:
    """Decides whether the step's update is applied (see `FaultsConfig`), and updates the counters and norms."""
    skips = state.skips
    accepted = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    done = state.step - skips.total
    if config.spike_factor is not None:
        is_spike = grad_norm > config.spike_factor * jnp.mean(skips.norms)
        accepted &= ~(is_spike & (done >= config.spike_window))
    # Only norms of accepted steps are kept: with a norm that is not finite in the mean, no later step would be a spike.
    norms = jnp.where(accepted, skips.norms.at[done % config.spike_window].set(grad_norm), skips.norms)
    return accepted, SkipState(
        total=skips.total + ~accepted, in_a_row=jnp.where(accepted, 0, skips.in_a_row + 1), norms=norms
    )


def _whole_batch(
    config: ProgramConfig, definition: ModelDefinition, state: TrainState, batch: LMBatch
) -> tuple[LossOutput, Params, LMState | None]:
    """Loss, gradient and the recurrent state after the batch, computed one microbatch after the other.

    The recurrent state is None unless `data.order` is "streams".
    """
    loss_and_gradient = functools.partial(_loss_and_gradient, config, definition, state.params)
    normalizer = jnp.sum(batch.loss_mask, dtype=jnp.float32)
    recurrent = state.recurrent
    if recurrent is not None:
        recurrent = reset_rows(config.model, recurrent, ~jnp.asarray(batch.continues))
    parts = config.accumulation_steps
    if parts == 1:
        return loss_and_gradient(batch, recurrent, normalizer)

    def accumulate(total: Any, part: tuple[LMBatch, LMState | None]) -> tuple[Any, LMState | None]:
        losses, gradient, recurrent = loss_and_gradient(*part, normalizer)
        return jax.tree.map(jnp.add, total, (losses, gradient)), recurrent

    start = (LossOutput.zero(), jax.tree.map(jnp.zeros_like, chosen(definition.trained, state.params)))
    split = _microbatches(batch, parts), None if recurrent is None else split_rows(config.model, recurrent, parts)
    (losses, gradient), recurrent = jax.lax.scan(accumulate, start, split)
    return losses, gradient, None if recurrent is None else join_rows(config.model, recurrent)


def _loss_and_gradient(
    config: ProgramConfig,
    definition: ModelDefinition,
    params: Params,
    batch: LMBatch,
    recurrent: LMState | None,
    normalizer: jax.Array,
) -> tuple[LossOutput, Params, LMState | None]:
    """Loss, its gradient by the trained parameters (None for others), and the recurrent state after one microbatch.

    Args:
        config: the config of the step.
        definition: the model without its parameters.
        params: its parameters.
        batch: the microbatch.
        recurrent: state that each row starts from; None is zero.
        normalizer: number that the summed loss is divided by, the counted tokens of the whole batch.
    """

    def loss_of(params: Params, batch: LMBatch, recurrent: LMState | None) -> tuple[LossOutput, LMState]:
        model = definition.merge(params)
        output = model.hidden(batch.tokens, recurrent, segment_ids=batch.segment_ids)
        loss = next_token_loss(
            output.hidden,
            model.head,
            batch.targets,
            batch.loss_mask,
            normalizer=normalizer,
            z_loss=config.z_loss,
            chunk=config.loss_chunk,
        )
        if output.penalty is not None:
            loss = loss.with_penalty(output.penalty / (config.accumulation_steps * config.windows))
        return loss, output.state

    def loss_function(trained: Params) -> tuple[jax.Array, tuple[LossOutput, LMState | None]]:
        whole = completed(definition.trained, trained, params)
        if config.windows == 1:
            parts, after = loss_of(whole, batch, recurrent)
        else:
            parts, after = _over_windows(config, functools.partial(loss_of, whole), batch, recurrent)
        return parts.loss, (parts, after if config.order == "streams" else None)

    trained = chosen(definition.trained, params)
    (_, (parts, after)), gradient = jax.value_and_grad(loss_function, has_aux=True)(trained)
    return parts, gradient, after


def _over_windows(
    config: ProgramConfig, loss_of: Any, batch: LMBatch, recurrent: LMState | None
) -> tuple[LossOutput, LMState]:
    """Sums the loss over windows of the sequence, and returns it with the recurrent state after the last one.

    The forward pass keeps only the state at the start of each window; the backward pass recomputes the windows from the
    last to the first. So activations of only one window are in memory at a time.
    """
    windows = _windows(batch, config.windows)
    if recurrent is None:
        recurrent = init_state(config.model, batch.tokens.shape[0], max_length=config.seq_len)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(carry: tuple[LMState, LossOutput], window: LMBatch) -> tuple[tuple[LMState, LossOutput], None]:
        state, total = carry
        if config.window_gradient == "truncated":
            state = jax.lax.stop_gradient(state)
        parts, state = loss_of(
            dataclasses.replace(window, continues=None), reset_rows(config.model, state, ~jnp.asarray(window.continues))
        )
        return (constrain_state(config.model, state), jax.tree.map(jnp.add, total, parts)), None

    start = (constrain_state(config.model, recurrent), LossOutput.zero())
    (state, parts), _ = jax.lax.scan(step, start, windows)
    return parts, state


def _windows(batch: LMBatch, count: int) -> LMBatch:
    """Cuts a batch of (B, L) arrays into windows, (count, B, L / count).

    `continues` becomes (count, B): whether a window continues the document of the window before. It is True for the
    first window, whose state has been reset already.
    """

    def split(rows_BL: jax.Array) -> jax.Array:
        batch_size, length = rows_BL.shape
        split_WBL = jnp.moveaxis(rows_BL.reshape(batch_size, count, length // count), 1, 0)
        return constrain(split_WBL, None, Axis.BATCH, Axis.LENGTH)

    rows = jax.tree.map(split, dataclasses.replace(batch, continues=None))
    continues_WB = jnp.ones(rows.tokens.shape[:2], bool)
    if rows.segment_ids is not None:
        ids_WBL = rows.segment_ids
        continues_WB = continues_WB.at[1:].set(ids_WBL[1:, :, 0] == ids_WBL[:-1, :, -1])
    return dataclasses.replace(rows, continues=continues_WB)


def _microbatches(batch: LMBatch, parts: int) -> LMBatch:
    """Cuts a batch of (B, L) arrays into microbatches, (parts, B / parts, L).

    A microbatch takes every `parts`-th row, so that each device finds its share of every microbatch among its own rows.
    """

    def split(rows: jax.Array) -> jax.Array:
        split_MB = jnp.moveaxis(rows.reshape(rows.shape[0] // parts, parts, *rows.shape[1:]), 1, 0)
        return constrain(split_MB, None, Axis.BATCH, *(Axis.LENGTH,) * (rows.ndim - 1))

    return jax.tree.map(split, batch)
