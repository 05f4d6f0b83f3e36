"""Reading text with a model: prompts at once or in parts, and one token more, as parts of a compiled program."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from mamba_jax.models.config import ModelConfig
from mamba_jax.models.language_model import HiddenOutput, LanguageModel
from mamba_jax.models.state import LMState, constrain_state, init_state, reset_rows, with_room
from mamba_jax.models.storage.per_layer import unstacked
from pallas_kernels.common.array_types import Size


# Not checked at construction: JAX also builds this class around shapes and shardings.
@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefilled:
    """Result of reading prompts.

    Attributes:
        logits: logits of the token after each prompt, (B, V) in float32, V the padded vocabulary.
        state: recurrent state after the last token of each prompt.
    """

    logits: Float[jax.Array, "B V"]
    state: LMState


def read_prompts(
    model: LanguageModel, tokens: jax.Array, lengths: jax.Array | None, *, max_length: int | None
) -> Prefilled:
    """`Decoder.prefill` as a function to be called inside a jitted one, for tokens (B, L) and lengths (B,) or None.

    Prompts of different lengths are moved to the right, so that all end at the same position. The padding in front of a
    prompt is marked as a document of its own (segment 0, the prompt is segment 1). Any mixer that keeps documents apart
    therefore gives exactly the result without padding.
    """
    if lengths is None:
        read = model.hidden(tokens)
    else:
        moved, from_left = moved_to_the_right(tokens, lengths, 0)
        read = model.hidden(moved, segment_ids=(from_left >= 0).astype(jnp.int32))
    return at_the_end(model, read, with_room(model.config, read.state, max_length))


def read_part(model: LanguageModel, tokens: jax.Array, from_left: jax.Array, state: LMState) -> HiddenOutput:
    """A part of prompts that are moved to the right; a row whose prompt has not begun before starts here.

    Args:
        model: the model.
        tokens: (B, T) of the moved prompts.
        from_left: each token's place in its prompt, below 0 in the padding in front of it.
        state: after the parts before.
    """
    start = reset_rows(model.config, state, from_left[:, 0] <= 0)
    read = model.hidden(tokens, start, segment_ids=(from_left >= 0).astype(jnp.int32))
    return dataclasses.replace(read, state=as_before(model, read.state, state))


def read_token(model: LanguageModel, token_B: jax.Array, state: LMState) -> Prefilled:
    """The logits and the state after one more token of each row; each array of the state keeps its dtype."""
    read = model.hidden(token_B[:, None], state)
    return at_the_end(model, read, as_before(model, read.state, state))


def at_the_end(model: LanguageModel, read: HiddenOutput, state: LMState) -> Prefilled:
    """The logits after the last token, beside a state."""
    return Prefilled(logits=model.unembed(read.hidden[:, -1:])[:, 0], state=state)


def moved_to_the_right(
    tokens_BL: jax.Array, lengths_B: jax.Array | np.ndarray, padding: Size
) -> tuple[jax.Array, jax.Array]:
    """Prompts that all end at the last position, behind padding; and each token's place in its prompt, or below 0.

    Args:
        tokens_BL: the prompts, from the left.
        lengths_B: their lengths.
        padding: positions to add.
    """
    length = tokens_BL.shape[1]
    from_left = jnp.arange(-padding, length)[None] - (length - lengths_B)[:, None]
    return jnp.take_along_axis(tokens_BL, jnp.maximum(from_left, 0), axis=1), from_left


def as_before(model: LanguageModel, state: LMState, before: LMState) -> LMState:
    """The state with the dtypes of the one before, split over devices as all states are."""
    return constrain_state(model.config, jax.tree.map(lambda new, old: new.astype(old.dtype), state, before))


def start_of_layers(config: ModelConfig, rows: int, max_length: int | None) -> LMState:
    """The state of rows before any token, with an array for each layer."""
    state = init_state(config, rows, max_length=max_length)
    return {name: unstacked(part) for name, part in state.items()}
