"""A model's programs for any platform, any number of rows and, of a prompt, any length."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from mamba_jax.errors import InputError
from mamba_jax.export.stablehlo.names import by_name, like
from mamba_jax.models.language_model import LanguageModel
from mamba_jax.models.parameters import ModelDefinition, Params
from mamba_jax.models.reading.prompts import (
    Prefilled,
    moved_to_the_right,
    read_part,
    read_prompts,
    read_token,
    start_of_layers,
)
from mamba_jax.models.state import is_endless, taken_rows
from pallas_kernels.common.ahead_of_time import tracing_for_any
from pallas_kernels.common.rounding import round_up

PLATFORMS = ("cpu", "cuda", "tpu")
# Tokens of a row that are read at once by a model that can only be compiled for a number of them.
PART_LENGTH = 128

Named = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Programs:
    """The functions that are exported, of dictionaries of arrays by name.

    Attributes:
        definition: the model.
        params: its parameters with an array for each layer, or their shapes.
        vocab_size: V, ids that logits are given for.
        max_length: most tokens of a row; None is any number.
        part_length: tokens of a row that are read at once, in a loop over such parts; None reads prompts whole.
    """

    definition: ModelDefinition
    params: Params
    vocab_size: int
    max_length: int | None
    part_length: int | None = None

    def prefill(self, weights: Named, tokens: jax.Array, lengths: jax.Array) -> tuple[jax.Array, Named]:
        """Reads prompts (B, L), of which each has `lengths` (B,) tokens: logits of the next, (B, V), and the state."""
        model = self._model(weights)
        if self.part_length is None:
            read = read_prompts(model, tokens, lengths, max_length=self.max_length)
        else:
            read = self._read_in_parts(model, tokens, lengths, self.part_length)
        return self._logits(read.logits), by_name(read.state)

    def decode_step(self, weights: Named, tokens: jax.Array, state: Named) -> tuple[jax.Array, Named]:
        """Reads one more token of each row, (B,): logits of the next, (B, V), and the state after it."""
        read = read_token(self._model(weights), tokens, like(jax.eval_shape(lambda: self.state(1)), state))
        return self._logits(read.logits), by_name(read.state)

    def forward(self, weights: Named, tokens: jax.Array) -> jax.Array:
        """Logits after every token of texts that are of one length, (B, L, V)."""
        model = self._model(weights)
        if self.part_length is None:
            return self._logits(model(tokens).logits)
        length, part_length = tokens.shape[1], self.part_length

        def part(state: Any, tokens_BT: jax.Array) -> tuple[Any, jax.Array]:
            read = model(tokens_BT, state)
            return read.state, self._logits(read.logits)

        padded = jnp.pad(tokens, ((0, 0), (0, round_up(length, part_length) - length)))
        _, logits_CBTV = jax.lax.scan(part, self.state(tokens.shape[0]), _in_parts(padded, part_length))
        logits_BCTV = jnp.moveaxis(logits_CBTV, 0, 1)
        return logits_BCTV.reshape(logits_BCTV.shape[0], -1, self.vocab_size)[:, :length]

    def state(self, rows: Any) -> Any:
        """The state before any token, of a number of rows that need not be known."""
        config = self.definition.config
        return taken_rows(config, start_of_layers(config, 1, self.max_length), jnp.zeros(rows, jnp.int32))

    def _read_in_parts(
        self, model: LanguageModel, tokens_BL: jax.Array, lengths_B: jax.Array, part_length: int
    ) -> Prefilled:
        """The prompts, moved to the right, in a loop over parts."""
        batch, length = tokens_BL.shape
        moved_BL, from_left_BL = moved_to_the_right(tokens_BL, lengths_B, round_up(length, part_length) - length)

        def read(before: tuple[Any, jax.Array], part: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
            after = read_part(model, *part, before[0])
            return (after.state, after.hidden[:, -1:]), None

        hidden = jnp.zeros((batch, 1, model.config.d_model), model.config.compute_dtype)
        parts = (_in_parts(moved_BL, part_length), _in_parts(from_left_BL, part_length))
        (state, hidden), _ = jax.lax.scan(read, (self.state(batch), hidden), parts)
        return Prefilled(logits=model.unembed(hidden)[:, 0], state=state)

    def _model(self, weights: Named) -> LanguageModel:
        return self.definition.merge(like(self.params, weights))

    def _logits(self, logits: jax.Array) -> jax.Array:
        return logits[..., : self.vocab_size]


def _in_parts(array_BL: jax.Array, length: int) -> jax.Array:
    """Parts of rows, (C, B, T), for a loop over them."""
    return jnp.moveaxis(array_BL.reshape(array_BL.shape[0], -1, length), 1, 0)


def exported(programs: Programs) -> dict[str, export.Exported]:
    """The programs by name, lowered for all platforms at once from any machine.

    A model that cannot be compiled for any length, as one with attention, reads prompts in parts.

    Raises:
        InputError: the model has attention without a window and no `max_length` is given, or a part of it cannot be
            compiled for any number of rows.
    """
    if programs.max_length is None and not is_endless(programs.definition.config):
        raise InputError(
            "the model's attention has no window, so its state needs room for every token: give the most tokens of a "
            "row, prompt included (--max-length)"
        )
    unknown = (jax.errors.InconclusiveDimensionOperation, NotImplementedError)
    try:
        return _lowered(programs)
    except unknown:
        pass
    try:
        return _lowered(dataclasses.replace(programs, part_length=PART_LENGTH))
    except unknown as error:
        text = str(error).partition("\n")[0]
        raise InputError(
            f"the model cannot be compiled for any number of rows ({text}): export it in another layout"
        ) from None


def _lowered(programs: Programs) -> dict[str, export.Exported]:
    """`exported`, as the programs are; raises what JAX does where a size would have to be known."""
    limit = () if programs.max_length is None else (f"l <= {programs.max_length}",)
    (rows,), (batch, length) = export.symbolic_shape("b"), export.symbolic_shape("b, l", constraints=limit)
    weights = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in by_name(programs.params).items()}
    text = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    with tracing_for_any():
        state = by_name(jax.eval_shape(lambda: programs.state(rows)))
        given = {
            "prefill": (programs.prefill, (weights, text, jax.ShapeDtypeStruct((batch,), jnp.int32))),
            "decode_step": (programs.decode_step, (weights, jax.ShapeDtypeStruct((rows,), jnp.int32), state)),
            "forward": (programs.forward, (weights, text)),
        }
        return {
            name: export.export(jax.jit(function), platforms=PLATFORMS)(*arguments)
            for name, (function, arguments) in given.items()
        }
