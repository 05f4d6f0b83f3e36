"""Draws the next token from logits: temperature, top-k, top-p, min-p, penalties and biases."""

import dataclasses
import math
import typing
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Integer, Key

from mamba_jax.errors import InputError
from mamba_jax.generation.penalties import History, Penalties, penalised

# One key for all rows, or one for each.
Keys = Key[jax.Array, ""] | Key[jax.Array, " B"]

# Temperatures are limited to this range. Outside of it, the temperature or its inverse is not a normal float32 number,
# and dividing logits of 0 or -inf by it would give NaN.
_LOWEST_TEMPERATURE = float(jnp.finfo(jnp.float32).tiny)
_HIGHEST_TEMPERATURE = 1 / _LOWEST_TEMPERATURE
# The value of `top_k` that stands for all tokens, larger than any vocabulary.
_ALL = 2**31 - 1
# The largest bias and penalty: sums and products of a few of them and of logits stay far from the end of float32.
_LARGEST = 1e30


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How tokens are drawn.

    The settings act in this order: repetition penalty, presence and frequency penalty, biases, temperature, top-k,
    top-p, min-p. Temperature 0 takes the likeliest token after penalties and biases.

    Attributes:
        temperature: number that the logits are divided by; 0 takes the likeliest token.
        top_k: draw among the k likeliest tokens only; None, or more than there are, means all.
        top_p: draw among the fewest likeliest tokens whose probabilities add up to at least p (arXiv 1904.09751); None
            or 1 means all.
        min_p: draw among the tokens that are at least min_p times as likely as the likeliest (arXiv 2407.01082); None
            or 0 means all.
        repetition_penalty: logits of tokens that occur in prompt or continuation are divided by this if positive, and
            multiplied by it if negative (arXiv 1909.05858); 1 is none, more makes repetition rarer.
        presence_penalty: subtracted from the logits of tokens that the continuation holds.
        frequency_penalty: subtracted from the logits of the continuation's tokens, once for each time they occur.
        logit_bias: pairs of a token id and a number that is added to its logit; -inf forbids the token.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"sampling temperature must be finite and not negative, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"sampling top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"sampling top_p must lie in (0, 1], got {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise InputError(f"sampling min_p must lie in [0, 1], got {self.min_p}")
        if not 1 / _LARGEST <= self.repetition_penalty <= _LARGEST:
            raise InputError(
                f"sampling repetition_penalty must be positive, from {1 / _LARGEST:g} to {_LARGEST:g} (1 is none), "
                f"got {self.repetition_penalty}"
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not abs(value := getattr(self, name)) <= _LARGEST:
                raise InputError(f"sampling {name} must lie in -{_LARGEST:g} .. {_LARGEST:g}, got {value}")
        _check_bias(self.logit_bias)

    @property
    def has_penalties(self) -> bool:
        """Whether the tokens so far change the distribution of the next."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


def _check_bias(logit_bias: tuple[tuple[int, float], ...]) -> None:
    """Refuses ids that no model has or that occur twice, and biases that are NaN, +inf or too large."""
    ids = [token for token, _ in logit_bias]
    for token, bias in logit_bias:
        if token < 0:
            raise InputError(f"sampling logit_bias has the token id {token}; ids are 0 or more")
        if not (abs(bias) <= _LARGEST or bias == -math.inf):
            raise InputError(
                f"sampling logit_bias of token {token} must be -inf or lie in -{_LARGEST:g} .. {_LARGEST:g}, got {bias}"
            )
    if len(set(ids)) < len(ids):
        twice = next(token for token in ids if ids.count(token) > 1)
        raise InputError(f"sampling logit_bias names the token id {twice} more than once: give one bias for it")


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """`SamplingConfig` as arrays with one value per row, so that one compiled program serves all settings.

    What no row uses is None, and costs nothing; a program is compiled for each set of parts that are there.

    Attributes:
        temperature: (B,) float32; 0 takes the likeliest token.
        top_k: (B,) int32; V or more is all tokens.
        top_p: (B,) float32; 1 is all tokens.
        min_p: (B,) float32; 0 is all tokens.
        penalties: arrays (B,); they need a `History` wherever tokens are drawn.
        logit_bias: (B, V) float32, V the vocabulary without padding.
    """

    temperature: Float[jax.Array | np.ndarray, " B"]
    top_k: Int[jax.Array | np.ndarray, " B"]
    top_p: Float[jax.Array | np.ndarray, " B"]
    min_p: Float[jax.Array | np.ndarray, " B"] | None = None
    penalties: Penalties | None = None
    logit_bias: Float[jax.Array | np.ndarray, "B V"] | None = None

    @classmethod
    def of(cls, configs: Sequence[SamplingConfig], *, vocab_size: int | None = None) -> "Sampling":
        """The arrays for the given configs, one config per row.

        Args:
            configs: the settings of each row.
            vocab_size: V, number of the model's ids; only biases need it.

        Raises:
            InputError: a bias for an id that the model does not have, or biases without `vocab_size`.
        """
        temperatures = [
            min(max(config.temperature, _LOWEST_TEMPERATURE), _HIGHEST_TEMPERATURE) if config.temperature else 0.0
            for config in configs
        ]
        min_p = np.asarray([config.min_p or 0.0 for config in configs], np.float32)
        penalties = Penalties(
            repetition=np.asarray([config.repetition_penalty for config in configs], np.float32),
            presence=np.asarray([config.presence_penalty for config in configs], np.float32),
            frequency=np.asarray([config.frequency_penalty for config in configs], np.float32),
        )
        return cls(
            temperature=np.asarray(temperatures, np.float32),
            top_k=np.asarray([min(config.top_k or _ALL, _ALL) for config in configs], np.int32),
            top_p=np.asarray([config.top_p or 1.0 for config in configs], np.float32),
            min_p=min_p if min_p.any() else None,
            penalties=penalties if any(config.has_penalties for config in configs) else None,
            logit_bias=_bias_table(configs, vocab_size) if any(config.logit_bias for config in configs) else None,
        )


def _bias_table(configs: Sequence[SamplingConfig], vocab_size: int | None) -> np.ndarray:
    """The biases of each row, (B, vocab_size) float32."""
    if vocab_size is None:
        raise InputError("sampling logit_bias is an array with a number for every id: give vocab_size")
    table_BV = np.zeros((len(configs), vocab_size), np.float32)
    for row, config in enumerate(configs):
        for token, bias in config.logit_bias:
            if token >= vocab_size:
                raise InputError(
                    f"sampling logit_bias has the token id {token}, but the model's ids are 0 to {vocab_size - 1}"
                )
            table_BV[row, token] = bias
    return table_BV


def allowed_ids(allowed: np.ndarray | jax.Array | None, vocab_size: int) -> np.ndarray:
    """Whether each id of a model may be drawn, (vocab_size,), from what is known of some of them.

    Args:
        allowed: of the first ids, such as `Tokenizer.known`; those behind may not be drawn. None allows all.
        vocab_size: the model's ids.

    Raises:
        InputError: none may be drawn.
    """
    allowed_V = np.ones(vocab_size, bool)
    if allowed is not None:
        given = np.asarray(allowed)[:vocab_size]
        allowed_V = np.pad(given, (0, vocab_size - len(given)))
    if not allowed_V.any():
        raise InputError(f"none of the model's ids 0 to {vocab_size - 1} may be drawn: allow at least one")
    return allowed_V


def row_keys(
    seeds: Integer[jax.Array | np.ndarray, " B"], positions: Integer[jax.Array | np.ndarray, " B"]
) -> Key[jax.Array, " B"]:
    """A key for each row, from its own seed and the position of the token to draw: fold_in(key(seed), position).

    Args:
        seeds: (B,), in 0 .. 2**32 - 1.
        positions: (B,), not negative; another one for every token of a row.
    """
    # Only draws of this generator are the same in every batch, whatever the process's own default is.
    return jax.vmap(lambda seed, position: jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position))(
        jnp.asarray(seeds), jnp.asarray(positions)
    )


def sample(
    logits: Float[jax.Array, "B V"],
    keys: Keys,
    sampling: SamplingConfig | Sampling,
    *,
    vocab_size: int,
    allowed: Bool[jax.Array | np.ndarray, " vocab_size"] | None = None,
    history: History | None = None,
) -> Int[jax.Array, " B"]:
    """Draws a token for every row, from `log_distribution`.

    A row's token depends on its own logits, settings and key, and on nothing else of the batch. If logits are equal,
    those of lower ids count as likelier.

    Args:
        logits: (B, V), V the padded vocabulary; ids with -inf are never drawn.
        keys: a `jax.random.key` for each row, see `row_keys`; one for all stands for fold_in(key, row). Not used at
            temperature 0.
        sampling: how to draw: one config for all rows, or arrays with a setting per row.
        vocab_size: ids from here on are padding and never drawn.
        allowed: (vocab_size,), whether each id may be drawn; None allows all.
        history: the tokens of each row so far, for penalties.

    Returns:
        Token ids, (B,) int32; -1 for rows where no token can be drawn: a logit is NaN or +inf, or all are -inf.

    Raises:
        InputError: penalties without a history.
    """
    if isinstance(sampling, SamplingConfig):
        sampling = Sampling.of([sampling] * logits.shape[0], vocab_size=vocab_size)
    if keys.ndim == 0:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(keys, jnp.arange(logits.shape[0]))
    shifted = _shifted(logits[:, :vocab_size], sampling, allowed, history)
    temperature = jnp.asarray(sampling.temperature)
    likeliest = jnp.argmax(shifted, axis=-1)
    # If every row takes the likeliest token, no random numbers (one per id) need to be made.
    drawn = jax.lax.cond(
        jnp.any(temperature > 0),
        lambda: jax.vmap(jax.random.categorical)(keys, _scaled_and_cut(shifted, sampling)),
        lambda: likeliest,
    )
    tokens = jnp.where(temperature == 0, likeliest, drawn)
    return jnp.where(jnp.isnan(shifted[:, 0]), -1, tokens).astype(jnp.int32)


def log_distribution(
    logits: Float[jax.Array, "B V"],
    sampling: SamplingConfig | Sampling,
    *,
    vocab_size: int,
    allowed: Bool[jax.Array | np.ndarray, " vocab_size"] | None = None,
    history: History | None = None,
) -> Float[jax.Array, "B vocab_size"]:
    """The log-probabilities that `sample` draws from, for the same arguments.

    Returns:
        (B, vocab_size) float32; -inf for ids that are never drawn. At temperature 0 the likeliest token has 0. Rows
        where no token can be drawn are NaN.

    Raises:
        InputError: penalties without a history.
    """
    if isinstance(sampling, SamplingConfig):
        sampling = Sampling.of([sampling] * logits.shape[0], vocab_size=vocab_size)
    shifted = _shifted(logits[:, :vocab_size], sampling, allowed, history)
    is_likeliest = jnp.arange(vocab_size)[None] == jnp.argmax(shifted, axis=-1)[:, None]
    certain = jnp.where(jnp.isnan(shifted), jnp.nan, jnp.where(is_likeliest, 0, -jnp.inf))
    spread = jax.nn.log_softmax(_scaled_and_cut(shifted, sampling), axis=-1)
    return jnp.where(jnp.asarray(sampling.temperature)[:, None] == 0, certain, spread)


def log_probabilities(
    logits: Float[jax.Array, "B V"], tokens: Int[jax.Array | np.ndarray, " B"], *, vocab_size: int
) -> Float[jax.Array, " B"]:
    """The log-probabilities of tokens in the model's own distribution, whatever settings they were drawn with.

    Args:
        logits: (B, V), V the padded vocabulary.
        tokens: ids, (B,).
        vocab_size: ids from here on are padding, without probability.

    Returns:
        (B,) float32; NaN for tokens outside of the vocabulary, such as -1 for none.
    """
    tokens = jnp.asarray(tokens)
    logits = logits[:, :vocab_size].astype(jnp.float32)
    is_inside = (tokens >= 0) & (tokens < vocab_size)
    own = jnp.take_along_axis(logits, jnp.where(is_inside, tokens, 0)[:, None], axis=-1)[:, 0]
    return jnp.where(is_inside, own - jax.nn.logsumexp(logits, axis=-1), jnp.nan)


def _shifted(
    logits: jax.Array, sampling: Sampling, allowed: jax.Array | np.ndarray | None, history: History | None
) -> jax.Array:
    """Logits (B, vocab_size) after all that acts before the temperature, shifted so that the highest of a row is 0.

    Rows where no token can be drawn are NaN.
    """
    logits = logits.astype(jnp.float32)
    if sampling.penalties is not None:
        if history is None:
            raise InputError("sampling penalties depend on the tokens so far: give their history")
        logits = penalised(logits, sampling.penalties, history)
    if sampling.logit_bias is not None:
        logits = logits + sampling.logit_bias
    if allowed is not None:
        logits = jnp.where(allowed[None], logits, -jnp.inf)
    peak = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.where(jnp.isfinite(peak), logits - peak, jnp.nan)


def _scaled_and_cut(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Divides logits (B, vocab_size) with peak 0 by the temperatures (0 counts as 1), and cuts what is excluded."""
    temperature = jnp.asarray(sampling.temperature)[:, None]
    logits = logits / jnp.where(temperature == 0, 1, temperature)
    is_cut = jnp.any((sampling.top_k < logits.shape[-1]) | (sampling.top_p < 1))
    # Sorting the vocabulary takes longer than all else, and most settings do not need it.
    logits = jax.lax.cond(is_cut, _cut, lambda logits, sampling: logits, logits, sampling)
    if sampling.min_p is None:
        return logits
    # The likeliest token has logit 0, and no setting cuts it.
    return jnp.where(logits < jnp.log(sampling.min_p)[:, None], -jnp.inf, logits)


def _cut(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Sets the logits of all tokens that `top_k` and `top_p` exclude to -inf; (B, vocab_size) in and out."""
    top_k, top_p = jnp.asarray(sampling.top_k)[:, None], jnp.asarray(sampling.top_p)[:, None]
    # Sorted by position, so exactly k remain even if several are equal; `top_k` puts the lower of equal ids first.
    likeliest, ids = jax.lax.top_k(logits, logits.shape[-1])
    likeliest = jnp.where(jnp.arange(logits.shape[-1])[None] < top_k, likeliest, -jnp.inf)
    likeliest = jnp.where((top_p < 1) & (_mass_before(likeliest) >= top_p), -jnp.inf, likeliest)
    # Back in the order of ids: each id gets the same random number even if rounding changes the order of two logits.
    return jnp.put_along_axis(jnp.full_like(logits, -jnp.inf), ids, likeliest, axis=-1, inplace=False)


def _mass_before(logits: jax.Array) -> jax.Array:
    """For logits in descending order, the total probability of the tokens in front of each one; 0 for the first."""
    mass = jnp.cumsum(jax.nn.softmax(logits, axis=-1), axis=-1)
    return jnp.pad(mass[:, :-1], ((0, 0), (1, 0)))
