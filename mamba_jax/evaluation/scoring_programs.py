"""The compiled programs that score continuations."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from mamba_jax.generation.decoder import Prefilled, as_before, read_prompts
from mamba_jax.models.language_model import LanguageModel
from mamba_jax.models.parameters import ModelDefinition, Params
from mamba_jax.models.state import LMState, taken_rows
from mamba_jax.sharding import compiler_options

# Positions of a row whose logits exist at the same time: 16 rows * 64 * 50,000 ids * 4 bytes = 0.2 GB in float32.
CHUNK = 64

# Log-probabilities of targets, and whether they are the likeliest tokens; both (B, S).
Scored = tuple[jax.Array, jax.Array]


# Not checked at construction: JAX also builds the class around shapes.
@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """As many tokens of each row as are read at once, and the places among them behind which a token is scored.

    Attributes:
        tokens: ids, (B, L).
        places: indices of tokens, (B, S).
        targets: the ids that follow there, (B, S).
    """

    tokens: Int[jax.Array | np.ndarray, "B L"]
    places: Int[jax.Array | np.ndarray, "B S"]
    targets: Int[jax.Array | np.ndarray, "B S"]


@functools.cache
def part_program(mesh: Mesh) -> jax.stages.Wrapped:
    """A program (definition, params, part, state) that gives `Scored` and the state behind a part.

    The state is None for the start of texts, and what it was in is given away.
    """
    return jax.jit(_score_part, static_argnums=0, donate_argnums=3, compiler_options=compiler_options(mesh))


@functools.cache
def context_program(mesh: Mesh) -> jax.stages.Wrapped:
    """A program (definition, room, params, tokens, lengths) that reads contexts, see `read_prompts`."""
    return jax.jit(_read_contexts, static_argnums=(0, 1), compiler_options=compiler_options(mesh))


@functools.cache
def choice_program(mesh: Mesh) -> jax.stages.Wrapped:
    """A program (definition, params, read, owners, first, part) that gives `Scored` of continuations.

    Each of them stands behind the context that its entry of `owners` numbers; `first` is its first token, of which the
    context's logits decide, and the part has the others.
    """
    return jax.jit(_score_choices, static_argnums=0, compiler_options=compiler_options(mesh))


def _score_part(
    definition: ModelDefinition, params: Params, part: Part, state: LMState | None
) -> tuple[Scored, LMState]:
    model = definition.merge(params)
    read = model.hidden(part.tokens, state)
    after = read.state if state is None else as_before(model, read.state, state)
    return _of_places(model, read.hidden, part), after


def _read_contexts(
    definition: ModelDefinition, room: int | None, params: Params, tokens: jax.Array, lengths: jax.Array
) -> Prefilled:
    return read_prompts(definition.merge(params), tokens, lengths, max_length=room)


def _score_choices(
    definition: ModelDefinition, params: Params, read: Prefilled, owners: jax.Array, first: jax.Array, part: Part
) -> Scored:
    """The body of `choice_program`."""
    model = definition.merge(params)
    of_first = _of_logits(read.logits[owners][:, None], first[:, None])
    rest = model.hidden(part.tokens, taken_rows(definition.config, read.state, owners))
    of_rest = _of_places(model, rest.hidden, part)
    return jax.tree.map(lambda one, others: jnp.concatenate([one, others], axis=1), of_first, of_rest)


def _of_places(model: LanguageModel, hidden_BLD: jax.Array, part: Part) -> Scored:
    """Scores of a part's targets, with the logits of a few places at a time."""
    targets_BS = jnp.asarray(part.targets)
    hidden_BSD = jnp.take_along_axis(hidden_BLD, part.places[:, :, None], axis=1)
    rows, size, dim = hidden_BSD.shape
    if size <= CHUNK:
        return _of_logits(model.unembed(hidden_BSD), targets_BS)
    hidden_CBTD = jnp.moveaxis(hidden_BSD.reshape(rows, -1, CHUNK, dim), 1, 0)
    targets_CBT = jnp.moveaxis(targets_BS.reshape(rows, -1, CHUNK), 1, 0)
    scored_CBT = jax.lax.map(lambda some: _of_logits(model.unembed(some[0]), some[1]), (hidden_CBTD, targets_CBT))
    return jax.tree.map(lambda array: jnp.moveaxis(array, 0, 1).reshape(rows, size), scored_CBT)


def _of_logits(logits_BTV: jax.Array, targets_BT: jax.Array) -> Scored:
    own_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    log_p_BT = own_BT - jax.nn.logsumexp(logits_BTV, axis=-1)
    return log_p_BT, jnp.argmax(logits_BTV, axis=-1) == targets_BT
