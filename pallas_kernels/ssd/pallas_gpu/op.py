"""The core of state-space duality as Mosaic GPU kernels, for Hopper and newer: arguments in the kernels' shape.

One kernel walks through the sequence with the state in registers: forwards for y, once more forwards and once backwards
for the gradient. What these two leave, the state before every chunk and its gradient after it, lets a second kernel
compute all other gradients of a chunk at once.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.common.array_types import Arrays
from pallas_kernels.common.checks import decline_symbolic_sizes
from pallas_kernels.common.derivatives import differentiable_op, no_forward_mode
from pallas_kernels.common.devices import cuda_compute_capability, target_platform
from pallas_kernels.common.register_math import LN_2
from pallas_kernels.common.rounding import round_up
from pallas_kernels.common.segments import segment_starts
from pallas_kernels.ssd.arguments import DecayingAttentionArguments, SSDOutput
from pallas_kernels.ssd.pallas_gpu.decays import chunk_vectors, ends
from pallas_kernels.ssd.pallas_gpu.geometry import CHUNK, WIDTH, Geometry, choose_parts
from pallas_kernels.ssd.pallas_gpu.gradients import PAIR_ROWS, STATE_ROWS, gradients
from pallas_kernels.ssd.pallas_gpu.walk import Walk, walk

# Tiles of the tensor cores have rows of 64 elements; the state of more than two of them does not fit into registers.
_STATE_TILE = 64
_MOST_STATES = 2 * _STATE_TILE


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Options:
    """What is static about a call.

    Attributes:
        interpreted: run the kernels in Pallas' interpreter.
    """

    interpreted: bool


def decaying_attention(arguments: DecayingAttentionArguments) -> SSDOutput:
    """See `pallas_kernels.ssd.core`; on a CPU the kernels are interpreted, which is slow.

    Raises:
        NotImplementedError: the target is not a GPU of compute capability 9.0 or more, N is over 128, or v, k or
            q is not bfloat16.
    """
    op, name = arguments.op, "pallas_gpu"
    if target_platform() != "cpu" and (cuda_compute_capability() or 0) < 90:
        raise NotImplementedError(f"{op}: {name!r} needs an NVIDIA GPU of compute capability 9.0 or more")
    decline_symbolic_sizes(op, name, arguments.v, arguments.k)
    for argument, array in (("x", arguments.v), ("B", arguments.k), ("C", arguments.q)):
        if array.dtype != jnp.bfloat16:
            raise NotImplementedError(
                f"{op}: {name!r} multiplies bfloat16 on tensor cores, {argument} has {array.dtype}"
            )
    if (states := arguments.k.shape[3]) > _MOST_STATES:
        raise NotImplementedError(f"{op}: {name!r} takes at most {_MOST_STATES} states, got {states}")
    return _attend(_Options(interpreted=target_platform() == "cpu"), arguments)


def _outputs(options: _Options, arguments: DecayingAttentionArguments) -> SSDOutput:
    """The result alone: the forward pass costs no more for what it keeps, so it serves calls without gradients too."""
    return _forward(options, arguments)[0]


def _forward(options: _Options, arguments: DecayingAttentionArguments) -> tuple[SSDOutput, jax.Array | None]:
    """The result, and the states that the parts start from, (parts B H WIDTH, N), float32.

    None in their place is zero: there is one part and no initial state. Heads are the kernels', of WIDTH channels.
    """
    geometry = _geometry(arguments)
    vectors = _vectors(geometry, arguments, arguments.log_decay, arguments.scale)
    inputs = {name: _tokens(geometry, getattr(arguments, name)) for name in ("v", "k", "q")}
    inputs |= _rows(vectors) | _skip(geometry, arguments)
    start = None
    if arguments.initial_state is not None:
        start = _state(geometry, arguments.initial_state)
    kind = Walk(weight="leave", outputs=True)
    starts = _starts(options, geometry, kind, inputs, start)
    if starts is not None:
        inputs["initial"] = starts
    results = walk(geometry, kind, inputs, interpreted=options.interpreted)
    shape = arguments.v.shape
    y = results["y"].reshape(geometry.batch, geometry.length, shape[2], -1)[:, : shape[1], :, : shape[3]]
    final = results["final"].reshape(geometry.parts, -1)
    return SSDOutput(y=y, final_state=_public_state(geometry, arguments, final[-1])), starts


def _backward(
    options: _Options, arguments: DecayingAttentionArguments, starts: jax.Array | None, cotangents: SSDOutput
) -> Arrays:
    """Gradients of the arguments by name, from what `_forward` has kept and the cotangents of y and the final state.

    One walk computes the states before chunks again, and one backwards the cotangents of the states after chunks. With
    both at hand, the gradient kernel works on all chunks at once. It stops at the vectors of decays.py, whose
    derivatives by log_decay and scale are JAX's.
    """
    geometry = _geometry(arguments)

    def vectors_and_ends(log_decay: jax.Array, scale: jax.Array) -> tuple[Arrays, Arrays]:
        vectors = _vectors(geometry, arguments, log_decay, scale)
        return vectors | ends(vectors), vectors

    _, vectors_vjp, vectors = jax.vjp(vectors_and_ends, arguments.log_decay, arguments.scale, has_aux=True)
    v, k, q, dy = (_tokens(geometry, array) for array in (arguments.v, arguments.k, arguments.q, cotangents.y))
    flat = _rows(vectors)
    forwards = {"v": v, "k": k} | flat | ({} if starts is None else {"initial": starts})
    states = walk(geometry, Walk(weight="leave", checkpoints=True), forwards, interpreted=options.interpreted)
    backwards = {"v": dy, "k": q} | flat
    kind = Walk(weight="enter", reverse=True, checkpoints=True)
    last = _starts(options, geometry, kind, backwards, _state(geometry, cotangents.final_state))
    dstates = walk(geometry, kind, backwards | {"initial": last}, interpreted=options.interpreted)
    inputs = {"v": v, "dy": dy, "k": k, "q": q} | flat | _skip(geometry, arguments)
    inputs |= {"states": states["checkpoints"], "dstates": dstates["checkpoints"]}
    found = gradients(geometry, inputs, interpreted=options.interpreted)
    rows = _gradient_rows(geometry, found)
    dlog_decay, dscale = vectors_vjp(_vector_cotangents(geometry, rows))
    dinitial = dstates["final"].reshape(geometry.parts, -1)[0]
    result = {name: _public_tokens(geometry, found[f"d{name}"], getattr(arguments, name)) for name in ("v", "k", "q")}
    result |= {"log_decay": dlog_decay, "scale": dscale}
    result["initial_state"] = _public_state(geometry, arguments, dinitial)
    if arguments.D is not None:
        result["D"] = _skip_gradient(arguments.D, arguments.v, rows["skip"], cotangents.y)
    return result


_attend = differentiable_op(
    _outputs, forward=_forward, backward=_backward, tangent=no_forward_mode("ssd", "pallas_gpu")
)


def _geometry(arguments: DecayingAttentionArguments) -> Geometry:
    """The kernels' sizes: a head wider than WIDTH counts as several, length and states are padded to whole tiles."""
    batch, length, heads, width = arguments.v.shape
    groups, states = arguments.k.shape[2:]
    heads = heads * (round_up(width, WIDTH) // WIDTH)
    length = round_up(length, CHUNK)
    return Geometry(
        batch=batch,
        heads=heads,
        groups=groups,
        states=round_up(states, _STATE_TILE),
        length=length,
        packed=arguments.segment_ids is not None,
        parts=choose_parts(batch, heads, length // CHUNK),
    )


def _vectors(
    geometry: Geometry, arguments: DecayingAttentionArguments, log_decay: jax.Array, scale: jax.Array
) -> Arrays:
    """`chunk_vectors`; the heads of the kernels that are pieces of one head have the same."""
    repeats = geometry.heads // log_decay.shape[2]
    padding = ((0, 0), (0, geometry.length - log_decay.shape[1]))
    # Tokens that are not there leave the state as it is: no decay and no share.
    padded = (jnp.pad(array.astype(jnp.float32), (*padding, (0, 0))) for array in (log_decay, scale))
    log_decay, scale = (jnp.repeat(array, repeats, axis=2) for array in padded)
    starts = None
    if arguments.segment_ids is not None:
        starts = jnp.pad(segment_starts(arguments.segment_ids), padding)
    return chunk_vectors(geometry, log_decay, scale, starts)


def _rows(vectors: Arrays) -> Arrays:
    """Each of the vectors as a matrix with a row for every chunk."""
    return {name: vector.reshape(-1, CHUNK) for name, vector in vectors.items()}


def _tokens(geometry: Geometry, array: jax.Array) -> jax.Array:
    """Values, keys or queries (B, L, heads or groups, width) as a matrix of all tokens, padded to whole tiles."""
    batch, length, _, width = array.shape
    padding = ((0, 0), (0, geometry.length - length), (0, 0), (0, round_up(width, WIDTH) - width))
    return jnp.pad(array, padding).reshape(batch * geometry.length, -1)


def _public_tokens(geometry: Geometry, matrix: jax.Array, like: jax.Array) -> jax.Array:
    """The inverse of `_tokens`, for an array like `like`."""
    batch, length, count, width = like.shape
    return matrix.reshape(batch, geometry.length, count, -1)[:, :length, :, :width]


def _state(geometry: Geometry, state_BHPN: jax.Array) -> jax.Array:
    """States (B, H, P, N) as a matrix of all channels, float32, padded to whole tiles."""
    width, states = state_BHPN.shape[2:]
    padding = ((0, 0), (0, 0), (0, round_up(width, WIDTH) - width), (0, geometry.states - states))
    return jnp.pad(state_BHPN.astype(jnp.float32), padding).reshape(-1, geometry.states)


def _public_state(geometry: Geometry, arguments: DecayingAttentionArguments, state: jax.Array) -> jax.Array:
    """The inverse of `_state`."""
    batch, _, heads, width = arguments.v.shape
    states = arguments.k.shape[3]
    return state.reshape(batch, heads, -1, geometry.states)[:, :, :width, :states]


def _skip(geometry: Geometry, arguments: DecayingAttentionArguments) -> Arrays:
    """D, if there is one, by the channels of the kernels' heads."""
    if arguments.D is None:
        return {}
    heads, width = arguments.v.shape[2:]
    D = jnp.broadcast_to(arguments.D.astype(jnp.float32).reshape(heads, -1), (heads, width))
    D = jnp.pad(D, ((0, 0), (0, round_up(width, WIDTH) - width)))
    return {"D": D.reshape(geometry.heads, WIDTH)}


def _starts(
    options: _Options, geometry: Geometry, kind: Walk, inputs: Arrays, start: jax.Array | None
) -> jax.Array | None:
    """The states with which the parts start their walk, (parts B H WIDTH, N), from that of the first; None is zero."""
    parts, rows = geometry.parts, geometry.batch * geometry.heads * WIDTH
    if parts == 1:
        return start
    alone = Walk(weight=kind.weight, reverse=kind.reverse)
    inputs = {name: inputs[name] for name in ("v", "k", *geometry.vectors)}
    own = walk(geometry, alone, inputs, interpreted=options.interpreted)["final"].reshape(parts, rows, -1)
    shape = (geometry.batch, -1, geometry.chunks, CHUNK)
    last = {name: inputs[name].reshape(shape)[..., -1:] for name in ("sum", "scale")}
    if geometry.packed:
        last["start"] = inputs["start"].reshape(geometry.batch, geometry.chunks, CHUNK)[..., -1:]
    decays = ends(last)["enter"][..., 0]
    missing = parts * geometry.chunks_per_part - geometry.chunks
    decays = jnp.pad(decays, ((0, 0), (0, 0), (0, missing)), constant_values=1.0)
    decays = jnp.prod(decays.reshape(-1, parts, geometry.chunks_per_part), axis=2)
    decays = jnp.repeat(decays.T, WIDTH, axis=1)[..., None]
    order = range(parts - 1, -1, -1) if kind.reverse else range(parts)
    state = jnp.zeros_like(own[0]) if start is None else start
    starts = {}
    for part in order:
        starts[part] = state
        state = decays[part] * state + own[part]
    return jnp.stack([starts[part] for part in range(parts)]).reshape(parts * rows, -1)


def _gradient_rows(geometry: Geometry, found: Arrays) -> Arrays:
    """The rows that the gradient kernel writes, by name, (B, H, chunks, CHUNK)."""
    rows = {}
    for key, names in (("pair_rows", PAIR_ROWS), ("state_rows", STATE_ROWS)):
        array = found[key].reshape(geometry.batch, geometry.chunks, geometry.heads, len(names), CHUNK)
        rows |= {name: jnp.moveaxis(array[:, :, :, i], 2, 1) for i, name in enumerate(names)}
    return rows


def _vector_cotangents(geometry: Geometry, rows: Arrays) -> Arrays:
    """Cotangents of `chunk_vectors` and `ends`."""
    # A chunk decays the state before it by "enter" of its last token.
    enter = rows["enter"].at[..., -1].add(jnp.sum(rows["state"], axis=-1))
    # The kernel differentiates exp(s ln 2) by the whole exponent.
    cotangents = {"sum": rows["sum"] * LN_2, "scale": rows["scale"], "enter": enter, "leave": rows["leave"]}
    if geometry.packed:
        cotangents["start"] = jnp.zeros((geometry.batch, geometry.chunks, CHUNK))
    return cotangents


def _skip_gradient(D: jax.Array, v: jax.Array, rows: jax.Array, dy: jax.Array) -> jax.Array:
    """Of D: the sum of v dy over the tokens, for each head from the kernel's sums over its channels."""
    if D.ndim == 2:
        return jnp.einsum("blhp,blhp->hp", v, dy, preferred_element_type=jnp.float32)
    return jnp.sum(rows, axis=(0, 2, 3)).reshape(D.shape[0], -1).sum(axis=1)
