"""Loss, perplexity and bits per byte over held-out text."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mamba_jax.data.batch import LMBatch
from mamba_jax.errors import InputError
from mamba_jax.models.loss import next_token_loss
from mamba_jax.models.parameters import ModelDefinition, Params
from mamba_jax.sharding import compiler_options, put_batch

# exp(709) is the largest that float64 holds. Larger losses are reported with the perplexity exp(700), not as an
# overflow.
_LARGEST_EXPONENT = 700.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Held-out loss, in three units.

    Attributes:
        loss: mean -log p of a token, in nats.
        perplexity: exp(loss).
        bits_per_byte: loss / log 2 * tokens_per_byte, which does not depend on the tokenizer.
        num_tokens: number of tokens that were predicted.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    num_tokens: int

    @classmethod
    def of(cls, sums: Mapping[str, float], *, tokens_per_byte: float) -> "Perplexity":
        """Computes the three units from the sums that `measure` returns.

        Args:
            sums: "loss", the sum of -log p in nats, and "tokens", the number of predicted tokens.
            tokens_per_byte: tokens of the text, end-of-document tokens included, per byte of its UTF-8 form.

        Raises:
            InputError: the number of tokens is 0.
        """
        if sums["tokens"] == 0:
            raise InputError("the evaluation text has no token to predict: use more text")
        loss = sums["loss"] / sums["tokens"]
        return cls(
            loss=loss,
            perplexity=exp_of(loss),
            bits_per_byte=loss / math.log(2) * tokens_per_byte,
            num_tokens=int(sums["tokens"]),
        )

    @classmethod
    def mean(cls, results: Sequence["Perplexity"], weights: Sequence[float]) -> "Perplexity":
        """The mean loss and bits per byte of several texts by weights, exp of that loss, and all their tokens.

        Args:
            results: of each text.
            weights: as many, not negative, with a positive sum.
        """
        shares = [weight / math.fsum(weights) for weight in weights]
        loss = math.fsum(share * result.loss for share, result in zip(shares, results, strict=True))
        return cls(
            loss=loss,
            perplexity=exp_of(loss),
            bits_per_byte=math.fsum(share * found.bits_per_byte for share, found in zip(shares, results, strict=True)),
            num_tokens=sum(result.num_tokens for result in results),
        )


def exp_of(loss: float) -> float:
    """exp(loss), or exp(700) for larger losses."""
    return math.exp(min(loss, _LARGEST_EXPONENT))


def evaluate(
    definition: ModelDefinition,
    params: Params,
    batches: Iterable[LMBatch],
    *,
    mesh: Mesh,
    tokens_per_byte: float,
    loss_chunk: int,
) -> Perplexity:
    """Held-out loss of a model as a `Perplexity`; see `measure` and `Perplexity.of` for the arguments."""
    sums = measure(definition, params, batches, mesh=mesh, loss_chunk=loss_chunk)
    return Perplexity.of(sums, tokens_per_byte=tokens_per_byte)


def measure(
    definition: ModelDefinition, params: Params, batches: Iterable[LMBatch], *, mesh: Mesh, loss_chunk: int
) -> dict[str, float]:
    """Sums of loss and tokens over all batches, added up in float64.

    Args:
        definition: the model to measure.
        params: its parameters, on the devices of `mesh`.
        batches: the batches, each with the rows of this process only.
        mesh: the device mesh.
        loss_chunk: sequence positions whose logits exist at the same time, which bounds the memory.

    Returns:
        "loss", the sum of -log p in nats over the tokens with `loss_mask`, and "tokens", their number.
    """
    sums: list[dict[str, jax.Array]] = []
    program = _program(mesh)
    with jax.set_mesh(mesh):
        for batch in batches:
            sums.append(program(definition, loss_chunk, params, put_batch(mesh, batch)))
            # Waits for the batch before, while the devices work on this one. Without a wait, hundreds of dispatched
            # batches would fill their memory, and processes on CPUs deadlock once 32 programs are in flight.
            jax.block_until_ready(sums[-2:-1])
    return {name: math.fsum(float(batch[name]) for batch in sums) for name in ("loss", "tokens")}


@functools.cache
def _program(mesh: Mesh) -> jax.stages.Wrapped:
    return jax.jit(_summed_loss, static_argnums=(0, 1), compiler_options=compiler_options(mesh))


def _summed_loss(definition: ModelDefinition, loss_chunk: int, params: Params, batch: LMBatch) -> dict[str, jax.Array]:
    """The sum of -log p, in nats, over the tokens of a batch with `loss_mask`, and the number of these tokens."""
    model = definition.merge(params)
    output = next_token_loss(
        model.hidden(batch.tokens, segment_ids=batch.segment_ids).hidden,
        model.head,
        batch.targets,
        batch.loss_mask,
        normalizer=jnp.ones((), jnp.float32),
        z_loss=0.0,
        chunk=loss_chunk,
    )
    return {"loss": output.cross_entropy, "tokens": jnp.sum(batch.loss_mask)}
