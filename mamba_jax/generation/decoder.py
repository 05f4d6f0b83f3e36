"""Token-by-token generation: reads whole prompts at once, then draws one token per step."""

import dataclasses
import functools
import typing
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, PRNGKeyArray

from mamba_jax.errors import InputError
from mamba_jax.generation.penalties import History
from mamba_jax.generation.sampling import Sampling, sample
from mamba_jax.models.parameters import ModelDefinition, Params
from mamba_jax.models.reading.prompts import (
    Prefilled,
    as_before,
    at_the_end,
    moved_to_the_right,
    read_part,
    read_prompts,
    read_token,
    start_of_layers,
)
from mamba_jax.models.state import LMState, constrain_state, init_state


# Not checked at construction: JAX also builds this class around shapes and shardings.
@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoded:
    """Result of one step.

    Attributes:
        tokens: the token drawn for each row, (B,); -1 where no token could be drawn, see `sample`.
        logits: the logits that the tokens were drawn from, (B, V) in float32.
        state: recurrent state after the tokens that were passed to the step.
    """

    tokens: Int[jax.Array, " B"]
    logits: Float[jax.Array, "B V"]
    state: LMState


class Decoder:
    """Reads prompts and draws tokens, one step at a time, for callers with a loop of their own, such as servers.

    Each method is compiled once for each shape of its arrays. Sampling settings, lengths and keys are arrays, so new
    values of them do not compile anything. Each token takes the same time and memory however many came before, for
    attention without a window that of `max_length` tokens. Prompts are read in parts of `part_length` tokens, so that
    the memory for it does not grow with them either.

    Example:
        decoder = Decoder(definition, params, max_length=4096)
        sampling = Sampling.of([SamplingConfig(temperature=0.7), SamplingConfig(top_k=40)])
        read = decoder.prefill(prompts, lengths)
        token = decoder.draw(read.logits, sampling, key)
        while not done(token):
            key = jax.random.fold_in(key, 1)
            step = decoder.step(state, token, sampling, key)
            token, state = step.tokens, step.state

    Attributes:
        definition: the model to run.
        params: its parameters, with an array for each layer.
        max_length: see below.
        part_length: see below.
        state_dtype: see below.

    Args:
        definition: the model to run.
        params: its parameters, stacked or per layer.
        max_length: most tokens of a row, prompt included. A model with attention needs it; where more of a row would
            have to be remembered, logits are NaN. None is any number.
        part_length: most tokens of a row that are read at once.
        state_dtype: what recurrent states are kept in from token to token; "bfloat16" halves what a step of many rows
            reads and writes. They are computed in float32.

    Raises:
        InputError: attention without a window, and no `max_length`; a part of no tokens.
    """

    def __init__(
        self,
        definition: ModelDefinition,
        params: Params,
        *,
        max_length: int | None = None,
        part_length: int = 2048,
        state_dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        if part_length < 1:
            raise InputError(f"the decoder's part_length is {part_length}, but prompts are read in parts of 1 or more")
        self.definition, self.params = definition, definition.unstacked(params)
        self.max_length, self.part_length, self.state_dtype = max_length, part_length, state_dtype
        jax.eval_shape(lambda: init_state(definition.config, 1, max_length=max_length))

    def start(self, rows: int) -> LMState:
        """The state of this many rows before any token."""
        return start_state(self.definition, rows, self.max_length, self.state_dtype)

    def prefill(
        self, tokens: Int[jax.Array | np.ndarray, "B L"], lengths: Int[jax.Array | np.ndarray, " B"] | None = None
    ) -> Prefilled:
        """Reads a batch of prompts; each row gets the result that it would get alone.

        Args:
            tokens: token ids, (B, L); those behind a row's length are ignored.
            lengths: number of tokens in each prompt, (B,), from 1 to L; None means L for all.

        Raises:
            InputError: L is 0 or more than `max_length`, or a length is outside of 1 .. L.
        """
        if tokens.shape[1] == 0:
            raise InputError("the prompt has no tokens: give at least one")
        if lengths is not None:
            check_lengths(np.asarray(lengths), tokens.shape[1])
        if self.max_length is not None and tokens.shape[1] > self.max_length:
            raise InputError(
                f"the prompts have {tokens.shape[1]} tokens, but the decoder's max_length is {self.max_length}: raise "
                "it"
            )
        if tokens.shape[1] <= self.part_length:
            return _prefill(self.definition, self.max_length, self.state_dtype, self.params, tokens, lengths)
        return self._prefill_in_parts(jnp.asarray(tokens), lengths)

    def _prefill_in_parts(self, tokens_BL: jax.Array, lengths: jax.Array | np.ndarray | None) -> Prefilled:
        """`prefill` of prompts that are longer than a part, all of which end where the last part does."""
        batch, length = tokens_BL.shape
        lengths_B = np.full(batch, length) if lengths is None else np.asarray(lengths)
        moved_BL, from_left_BL = moved_to_the_right(tokens_BL, lengths_B, -length % self.part_length)
        read = Prefilled(logits=jnp.zeros((batch, 0)), state=self.start(batch))
        for begin in range(0, from_left_BL.shape[1], self.part_length):
            part = slice(begin, begin + self.part_length)
            read = _read_part(self.definition, self.params, moved_BL[:, part], from_left_BL[:, part], read.state)
        return read

    def extend(self, state: LMState, tokens: Int[jax.Array | np.ndarray, "B L"]) -> Prefilled:
        """Reads more tokens of each row, as many of all of them.

        They are read in parts whose lengths are powers of two, so that few programs serve all lengths.

        Args:
            state: of the rows after all previous tokens.
            tokens: token ids, (B, L), L at least 1.

        Raises:
            InputError: there are no tokens.
        """
        tokens = np.asarray(tokens)
        if tokens.shape[1] == 0:
            raise InputError("there are no tokens to read: give at least one")
        read, begin = Prefilled(logits=jnp.zeros((tokens.shape[0], 0)), state=state), 0
        while begin < tokens.shape[1]:
            length = min(1 << ((tokens.shape[1] - begin).bit_length() - 1), self.part_length)
            read = _extend(self.definition, self.params, tokens[:, begin : begin + length], read.state)
            begin += length
        return read

    def verify(self, state: LMState, tokens: Int[jax.Array | np.ndarray, "B L"]) -> Float[jax.Array, "B L V"]:
        """Logits after each of some tokens that may turn out not to be those of the text: the state stays as it is.

        Args:
            state: of the rows after all previous tokens.
            tokens: token ids, (B, L).
        """
        return _verify(self.definition, self.params, tokens, state)

    def draw(
        self,
        logits: Float[jax.Array, "B V"],
        sampling: Sampling,
        key: PRNGKeyArray,
        *,
        history: History | None = None,
    ) -> Int[jax.Array, " B"]:
        """Draws a token for every row from logits (B, V); see `sample`."""
        return _draw(self.definition, logits, sampling, key, history)

    def step(
        self,
        state: LMState,
        tokens: Int[jax.Array | np.ndarray, " B"],
        sampling: Sampling,
        key: PRNGKeyArray,
        *,
        history: History | None = None,
    ) -> Decoded:
        """Reads one more token of each row and draws the next.

        Args:
            state: recurrent state after all previous tokens.
            tokens: token ids to read, (B,).
            sampling: how to draw, with one setting per row.
            key: a `jax.random.key`; use another one for every step.
            history: the tokens of each row so far, these included, for penalties.
        """
        return _step(self.definition, self.params, state, tokens, sampling, key, history)


def check_lengths(lengths: Int[np.ndarray, " B"], longest: int) -> None:
    """Raises an InputError unless all lengths lie in 1 .. longest."""
    if wrong := [length for length in lengths.tolist() if not 1 <= length <= longest]:
        raise InputError(f"a prompt has {wrong[0]} tokens, but rows hold 1 to {longest}: mend its length")


def _kept(state: LMState, dtype: str) -> LMState:
    """The state with float32 arrays as they are kept from token to token."""
    return jax.tree.map(lambda array: array.astype(dtype) if array.dtype == jnp.float32 else array, state)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def start_state(definition: ModelDefinition, rows: int, max_length: int | None, dtype: str) -> LMState:
    """The state of rows before any token, with an array for each layer; float32 ones as they are kept, in `dtype`."""
    return constrain_state(definition.config, _kept(start_of_layers(definition.config, rows, max_length), dtype))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _prefill(
    definition: ModelDefinition,
    max_length: int | None,
    state_dtype: str,
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array | None,
) -> Prefilled:
    """The compiled part of `Decoder.prefill`, for prompts that are no longer than a part."""
    read = read_prompts(definition.merge(params), tokens, lengths, max_length=max_length)
    return dataclasses.replace(read, state=_kept(read.state, state_dtype))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def _read_part(
    definition: ModelDefinition, params: Params, tokens: jax.Array, from_left: jax.Array, state: LMState
) -> Prefilled:
    """`read_part`, with the logits at its end."""
    model = definition.merge(params)
    read = read_part(model, tokens, from_left, state)
    return at_the_end(model, read, read.state)


@functools.partial(jax.jit, static_argnums=0)
def _extend(definition: ModelDefinition, params: Params, tokens: jax.Array, state: LMState) -> Prefilled:
    model = definition.merge(params)
    # As one document of several, a last single token leaves a state that a context may keep; see `is_passing`.
    ids = jnp.zeros_like(tokens) if tokens.shape[1] == 1 else None
    read = model.hidden(tokens, state, segment_ids=ids)
    return at_the_end(model, read, as_before(model, read.state, state))


@functools.partial(jax.jit, static_argnums=0)
def _verify(definition: ModelDefinition, params: Params, tokens: jax.Array, state: LMState) -> jax.Array:
    return definition.merge(params)(tokens, state).logits


@functools.partial(jax.jit, static_argnums=0)
def _draw(
    definition: ModelDefinition, logits: jax.Array, sampling: Sampling, key: jax.Array, history: History | None
) -> jax.Array:
    return sample(logits, key, sampling, vocab_size=definition.config.vocab_size, history=history)


@functools.partial(jax.jit, static_argnums=0)
def _step(
    definition: ModelDefinition,
    params: Params,
    state: LMState,
    tokens: jax.Array,
    sampling: Sampling,
    key: jax.Array,
    history: History | None,
) -> Decoded:
    """The compiled part of `Decoder.step`: reads a token of each row, (B,), and draws the next one."""
    read = read_token(definition.merge(params), tokens, state)
    drawn = sample(read.logits, key, sampling, vocab_size=definition.config.vocab_size, history=history)
    return Decoded(tokens=drawn, logits=read.logits, state=read.state)
