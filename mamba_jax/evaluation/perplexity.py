"""Loss, perplexity and bits per byte over held-out text."""

import dataclasses
import functools
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mamba_jax.data.batch import LMBatch
from mamba_jax.errors import InputError
from mamba_jax.models.loss import next_token_loss
from mamba_jax.models.parameters import ModelDefinition, Params
from mamba_jax.sharding import put_batch, repeatable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Result of an evaluation.

    Attributes:
        loss: mean -log p of a token, in nats.
        perplexity: exp(loss).
        bits_per_byte: loss / log 2 times the tokens per UTF-8 byte of the text, end-of-document tokens included.
        num_tokens: tokens that were predicted.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    num_tokens: int


def evaluate(
    definition: ModelDefinition,
    params: Params,
    batches: Iterable[LMBatch],
    *,
    mesh: Mesh,
    tokens_per_byte: float,
    loss_chunk: int,
) -> Perplexity:
    """Averages the loss over all counted tokens of the batches, with sums in float64.

    Args:
        definition: of the model.
        params: its parameters, on the devices of `mesh`.
        batches: this process' rows.
        mesh: the devices.
        tokens_per_byte: of the text that the batches come from.
        loss_chunk: sequence positions whose logits exist at the same time.

    Raises:
        InputError: no token is counted.
    """
    sums: list[tuple[jax.Array, jax.Array]] = []
    program = _program(mesh)
    with jax.set_mesh(mesh):
        for batch in batches:
            sums.append(program(definition, loss_chunk, params, put_batch(mesh, batch)))
            # The devices have the next batch to work on while the host waits. Unread, hundreds of batches would fill
            # their memory, and processes on CPUs block each other for ever once 32 programs are in flight.
            jax.block_until_ready(sums[-2:-1])
    loss_sum = math.fsum(float(batch_sum) for batch_sum, _ in sums)
    num_tokens = sum(int(batch_tokens) for _, batch_tokens in sums)
    if num_tokens == 0:
        raise InputError("the evaluation text has no token to predict: use more text")
    loss = loss_sum / num_tokens
    return Perplexity(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=loss / math.log(2) * tokens_per_byte,
        num_tokens=num_tokens,
    )


@functools.cache
def _program(mesh: Mesh) -> jax.stages.Wrapped:
    return jax.jit(_summed_loss, static_argnums=(0, 1), compiler_options=repeatable(mesh))


def _summed_loss(
    definition: ModelDefinition, loss_chunk: int, params: Params, batch: LMBatch
) -> tuple[jax.Array, jax.Array]:
    model = definition.merge(params)
    output = next_token_loss(
        model.hidden(batch.tokens, segment_ids=batch.segment_ids).hidden,
        model.unembedding,
        batch.targets,
        batch.loss_mask,
        normalizer=jnp.ones((), jnp.float32),
        z_loss=0.0,
        chunk=loss_chunk,
    )
    return output.cross_entropy, jnp.sum(batch.loss_mask)
