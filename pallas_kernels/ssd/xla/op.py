"""The core of state-space duality in plain JAX: chunks of matrix products, with the backward pass chunk by chunk.

Only the arguments and the state before every chunk are kept for the backward pass, which computes a chunk once more and
transposes it. Chunks are sliced from the arguments as they lie in memory. README.md derives the equations.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.common.array_types import Arrays
from pallas_kernels.common.checks import decline_double_precision
from pallas_kernels.common.derivatives import differentiable_op
from pallas_kernels.common.devices import target_platform
from pallas_kernels.common.segments import chunk_of, padded, segment_starts, with_chunk
from pallas_kernels.ssd.arguments import DecayingAttentionArguments, SSDOutput
from pallas_kernels.ssd.xla.chunk import advance

# On a CPU what a chunk works on stays in cache. An accelerator wants larger products: the compiler for TPUs expects
# chunks of 64 and of 256 tokens to take half as long again as those of 128.
_CHUNK_LENGTHS = {"cpu": 64}
_CHUNK_LENGTH = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Options:
    """What is static about a call."""

    chunk_length: int
    precision: jax.lax.Precision


def decaying_attention(arguments: DecayingAttentionArguments) -> SSDOutput:
    """See `pallas_kernels.ssd.core`.

    Raises:
        NotImplementedError: an argument is float64.
    """
    decline_double_precision("xla", arguments)
    v, length = arguments.v, arguments.v.shape[1]
    chunk_length = _CHUNK_LENGTHS.get(target_platform(), _CHUNK_LENGTH)
    is_narrow = all(jnp.dtype(array.dtype).itemsize == 2 for array in (v, arguments.k, arguments.q))
    options = _Options(
        chunk_length=min(length, chunk_length) if isinstance(length, int) else chunk_length,
        # Operands of 16 bits may go through the units for such; a CPU computes in float32 either way.
        precision=jax.lax.Precision.DEFAULT if is_narrow else jax.lax.Precision.HIGHEST,
    )
    if arguments.initial_state is None:
        shape = (v.shape[0], *v.shape[2:], arguments.k.shape[3])
        arguments = dataclasses.replace(arguments, initial_state=jnp.zeros_like(v, jnp.float32, shape))
    return _attend(options, arguments)


def _outputs(options: _Options, arguments: DecayingAttentionArguments) -> SSDOutput:
    """The result alone, which is also what JAX differentiates in forward mode."""
    return _forward(options, arguments)[0]


def _forward(options: _Options, arguments: DecayingAttentionArguments) -> tuple[SSDOutput, jax.Array]:
    """The result, and the state before every chunk, (C, B, G, N, F, P)."""
    operands, _ = arguments.operands()
    sequences, D, state = _split(options, operands.arrays())
    documents = _documents(options, arguments)

    def step(carry, index):
        state, y = carry
        after, y_chunk = _advance(options, documents, index, state, chunk_of(sequences, index, options.chunk_length), D)
        return (after, with_chunk(y, y_chunk, index)), state

    chunks = jnp.arange(sequences["v"].shape[1] // options.chunk_length)
    (state, y), before = jax.lax.scan(step, (state, jnp.zeros_like(sequences["v"])), chunks)
    y = y[:, : arguments.v.shape[1]].reshape(arguments.v.shape)
    return SSDOutput(y=y, final_state=_unpacked_state(state)), before


def _backward(
    options: _Options, arguments: DecayingAttentionArguments, before: jax.Array, cotangents: SSDOutput
) -> Arrays:
    """Gradients of the arguments by name, chunk by chunk from the last, each from the state before it.

    JAX differentiates a chunk (`_advance`) and the rearrangement of the arguments (`_split`); `before` is what
    `_forward` has kept. Gradients of D and of the state are carried along in float32.
    """
    operands, _ = arguments.operands()
    (sequences, D, state), split_vjp = jax.vjp(functools.partial(_split, options), operands.arrays())
    documents = _documents(options, arguments)
    dy = padded(cotangents.y, options.chunk_length).reshape(sequences["v"].shape)
    dstate = _packed_state(cotangents.final_state, groups=state.shape[1])

    def step(carry, inputs):
        dstate, dD, dsequences = carry
        index, state = inputs
        chunks = jax.tree.map(_widened, chunk_of(sequences | {"dy": dy}, index, options.chunk_length))
        dy_chunk = chunks.pop("dy")
        _, chunk_vjp = jax.vjp(functools.partial(_advance, options, documents, index), state, chunks, D)
        dstate, dchunks, dD_chunk = chunk_vjp((dstate, dy_chunk))
        dsequences = {name: with_chunk(dsequences[name], dchunks[name], index) for name in dsequences}
        return (dstate, jax.tree.map(jnp.add, dD, dD_chunk), dsequences), None

    carry = dstate, jax.tree.map(jnp.zeros_like, D), jax.tree.map(jnp.zeros_like, sequences)
    (dstate, dD, dsequences), _ = jax.lax.scan(step, carry, (jnp.arange(before.shape[0]), before), reverse=True)
    return split_vjp((dsequences, dD, dstate))[0]


_attend = differentiable_op(_outputs, forward=_forward, backward=_backward)


def _advance(
    options: _Options, documents: Arrays, index: jax.Array, state: jax.Array, chunks: Arrays, D: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """`chunk.advance` of the chunk `index`."""
    tokens = jax.tree.map(_widened, chunks) | chunk_of(documents, index, options.chunk_length)
    if documents:
        before = jnp.maximum(index * options.chunk_length - 1, 0)
        tokens["before"] = jax.lax.dynamic_slice_in_dim(documents["document"], before, 1, axis=1)
    return advance(state, tokens, D, precision=options.precision)


def _split(options: _Options, arrays: Arrays) -> tuple[Arrays, jax.Array | None, jax.Array]:
    """Sequences of whole chunks with heads in groups, D (1, 1, G, F, 1 or P) and the state (B, G, N, F, P)."""
    groups = arrays["k"].shape[2]
    sequences = {name: padded(arrays[name], options.chunk_length) for name in ("v", "log_decay", "scale", "k", "q")}
    for name in ("v", "log_decay", "scale"):
        batch, length, heads, *rest = sequences[name].shape
        sequences[name] = sequences[name].reshape(batch, length, groups, heads // groups, *rest)
    D = arrays.get("D")
    if D is not None:
        D = _widened(D).reshape(1, 1, groups, D.shape[0] // groups, -1)
    return sequences, D, _packed_state(_widened(arrays["initial_state"]), groups)


def _documents(options: _Options, arguments: DecayingAttentionArguments) -> Arrays:
    """The number of a token's document in its row, "document", (B, L); nothing if there are no documents."""
    if arguments.segment_ids is None:
        return {}
    starts = padded(segment_starts(arguments.segment_ids), options.chunk_length)
    return {"document": jnp.cumsum(starts, axis=1, dtype=jnp.int32)}


def _widened(array: jax.Array) -> jax.Array:
    return array.astype(jnp.float32)


def _packed_state(state_BHPN: jax.Array, groups: int) -> jax.Array:
    """(B, H, P, N) to (B, G, N, F, P)."""
    batch, heads, width, states = state_BHPN.shape
    return jnp.moveaxis(state_BHPN.reshape(batch, groups, heads // groups, width, states), 4, 2)


def _unpacked_state(state_BGNFP: jax.Array) -> jax.Array:
    """The inverse of `_packed_state`."""
    state_BGFPN = jnp.moveaxis(state_BGNFP, 2, 4)
    return state_BGFPN.reshape(state_BGFPN.shape[0], -1, *state_BGFPN.shape[3:])
