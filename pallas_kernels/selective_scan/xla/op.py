"""The selective scan in plain JAX, in chunks of time, with a hand-written backward pass.

Only the arguments and the state at the start of every chunk are kept for the backward pass, which recomputes a chunk's
states from there. Chunks are sliced from the arguments as they lie in memory, never from a rearranged copy of them, and
states are (B, G, N, F) inside, so that operations run along channels. README.md derives the equations.

Within a chunk the recurrence runs token by token ("sequential": least work, best where an operation is cheap to start)
or as a parallel prefix ("associative": more work in log T steps, best on wide machines). Which one is decided when the
computation is lowered for its platform.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels.common.array_types import Arrays
from pallas_kernels.common.channels import group_count
from pallas_kernels.common.checks import decline_double_precision
from pallas_kernels.common.derivatives import differentiable_op
from pallas_kernels.common.devices import target_platform
from pallas_kernels.common.segments import chunk_of, padded, segment_starts, with_chunk
from pallas_kernels.selective_scan.arguments import Discretization, ScanArguments, ScanOutput
from pallas_kernels.selective_scan.xla.pointwise import emit, inject
from pallas_kernels.selective_scan.xla.recurrence import (
    ASSOCIATIVE,
    ASSOCIATIVE_TIME_FIRST,
    SEQUENTIAL,
    Recurrence,
    over_chunk,
)

# "by_platform" is sequential on the CPU and associative elsewhere.
RecurrenceName = Literal["by_platform", "sequential", "associative"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Options:
    """What is static about a scan."""

    dt_softplus: bool
    discretization: Discretization
    recurrence: RecurrenceName
    chunk_length: int


def selective_scan(arguments: ScanArguments, *, recurrence: RecurrenceName) -> ScanOutput:
    """See `pallas_kernels.selective_scan.api.selective_scan`; `recurrence` chooses how a chunk is scanned.

    Raises:
        NotImplementedError: an argument is float64 or complex128.
    """
    decline_double_precision("xla", arguments)
    length, chunk_length = arguments.x.shape[1], _chunk_length(recurrence)
    options = _Options(
        dt_softplus=arguments.dt_softplus,
        discretization=arguments.discretization,
        recurrence=recurrence,
        chunk_length=min(length, chunk_length) if isinstance(length, int) else chunk_length,
    )
    if arguments.initial_state is None:
        x, dtype = arguments.x, jnp.result_type(jnp.float32, arguments.A.dtype)
        zero = jnp.zeros_like(x, dtype, (x.shape[0], x.shape[2], arguments.A.shape[1]))
        arguments = dataclasses.replace(arguments, initial_state=zero)
    return _scan(options, arguments)


def _chunk_length(recurrence: RecurrenceName) -> int:
    """Chunk length of the recurrence; "by_platform" takes the platform of the trace, and another one costs only speed.

    Unlike the recurrence it cannot wait until lowering, because it is part of the shapes.
    """
    if recurrence == "by_platform":
        recurrence = "sequential" if target_platform() == "cpu" else "associative"
    return {r.name: r.chunk_length for r in (SEQUENTIAL, ASSOCIATIVE)}[recurrence]


def _scan_outputs(options: _Options, arguments: ScanArguments) -> ScanOutput:
    """The result alone; JAX differentiates this for the forward-mode derivative (see `differentiable_op`)."""
    return _scan_forward(options, arguments)[0]


def _scan_forward(options: _Options, arguments: ScanArguments) -> tuple[ScanOutput, jax.Array]:
    """The result, and the state at the start of every chunk."""
    sequences, constants, state_BGNF = _split(options, arguments.arrays())
    masks = _masks(options, arguments)
    run = functools.partial(_run_forward, options)
    final_state_BGNF, starts_CBGNF, y_BLE = _on_platform(options, run, sequences, masks, constants, state_BGNF)
    y_BLE = y_BLE[:, : arguments.x.shape[1]]
    return ScanOutput(y=y_BLE, final_state=_unpacked_state(final_state_BGNF)), starts_CBGNF


def _scan_backward(
    options: _Options, arguments: ScanArguments, starts_CBGNF: jax.Array, cotangents: ScanOutput
) -> Arrays:
    """Gradients of the arguments by name, from the state at the start of every chunk, which `_scan_forward` has kept.

    `_run_backward` differentiates what `_split` has made of the arguments; JAX's transpose of `_split` makes gradients
    of the arguments themselves out of its results.
    """
    operands, _ = arguments.operands()
    (sequences, constants, state_BGNF), split_vjp = jax.vjp(functools.partial(_split, options), operands.arrays())
    masks = _masks(options, arguments)
    dy_BLE = padded(cotangents.y, options.chunk_length)
    dstate_BGNF = _packed_state(cotangents.final_state, groups=state_BGNF.shape[1])
    run = functools.partial(_run_backward, options)
    gradients = _on_platform(options, run, sequences, masks, constants, starts_CBGNF, (dy_BLE, dstate_BGNF))
    return split_vjp(gradients)[0]


_scan = differentiable_op(_scan_outputs, forward=_scan_forward, backward=_scan_backward)


def _on_platform(options: _Options, run, *args):
    """Calls `run` with the recurrence that is asked for, or with that of the platform it is lowered for."""
    sequential = functools.partial(run, SEQUENTIAL)
    associative = functools.partial(run, ASSOCIATIVE)
    time_first = functools.partial(run, ASSOCIATIVE_TIME_FIRST)
    match options.recurrence:
        case "sequential":
            return sequential(*args)
        case "associative":
            return jax.lax.platform_dependent(*args, tpu=time_first, default=associative)
        case "by_platform":
            return jax.lax.platform_dependent(*args, cpu=sequential, tpu=time_first, default=associative)


def _run_forward(
    options: _Options,
    recurrence: Recurrence,
    sequences: Arrays,
    masks: Arrays,
    constants: Arrays,
    state_BGNF: jax.Array,
):
    """Final state, state at the start of every chunk, and output."""
    inject_token = functools.partial(
        inject, constants=constants, dt_softplus=options.dt_softplus, discretization=options.discretization
    )
    emit_token = functools.partial(emit, constants=constants)
    arrange = functools.partial(_arranged, groups=state_BGNF.shape[1], time_axis=recurrence.time_axis)

    def chunk(carry, index):
        state_BGNF, y_BLE = carry
        tokens = arrange(chunk_of(sequences, index, options.chunk_length))
        token_masks = arrange(chunk_of(masks, index, options.chunk_length))
        with jax.named_scope(recurrence.name):
            next_state_BGNF, y = recurrence.forward(state_BGNF, tokens, token_masks, inject_token, emit_token)
        y_BTGF = jnp.moveaxis(y, recurrence.time_axis, 1)
        y_BTE = y_BTGF.reshape(*y_BTGF.shape[:2], -1)
        return (next_state_BGNF, with_chunk(y_BLE, y_BTE, index)), state_BGNF

    num_chunks = sequences["x"].shape[1] // options.chunk_length
    carry = state_BGNF, jnp.zeros_like(sequences["x"])
    (final_state_BGNF, y_BLE), starts_CBGNF = jax.lax.scan(chunk, carry, jnp.arange(num_chunks))
    return final_state_BGNF, starts_CBGNF, y_BLE


def _run_backward(
    options: _Options,
    recurrence: Recurrence,
    sequences: Arrays,
    masks: Arrays,
    constants: Arrays,
    starts_CBGNF: jax.Array,
    cotangents: tuple[jax.Array, jax.Array],
):
    """Cotangents of the sequences, of the constants and of the initial state, from those of y and the final state."""
    dy_BLE, dstate_BGNF = cotangents
    arrange = functools.partial(_arranged, groups=dstate_BGNF.shape[1], time_axis=recurrence.time_axis)

    def inject_chunk(slices: Arrays, constants: Arrays, masks: Arrays):
        static = {"dt_softplus": options.dt_softplus, "discretization": options.discretization}
        inject_token = functools.partial(inject, constants=constants, **static)
        return over_chunk(inject_token, arrange(slices), arrange(masks))

    def emit_chunk(states: jax.Array, slices: Arrays, constants: Arrays):
        return over_chunk(functools.partial(emit, constants=constants), states, arrange(slices))

    def chunk(carry, inputs):
        dstate_BGNF, dconstants, dsequences = carry
        index, start_BGNF = inputs
        # Contributions to one gradient add up in float32 before they are rounded to the argument's dtype.
        slices = jax.tree.map(_widened, chunk_of(sequences, index, options.chunk_length))
        token_masks = chunk_of(masks, index, options.chunk_length)
        dy = arrange(chunk_of({"y": dy_BLE}, index, options.chunk_length))["y"].astype(jnp.float32)
        (a, u), inject_vjp = jax.vjp(functools.partial(inject_chunk, masks=token_masks), slices, constants)
        with jax.named_scope(recurrence.name):
            before, after = recurrence.states(a, u, start_BGNF)
        _, emit_vjp = jax.vjp(emit_chunk, after, slices, constants)
        dafter, dslices_out, dconstants_out = emit_vjp(dy)
        with jax.named_scope(recurrence.name):
            du, dstate_BGNF = recurrence.adjoint(a, dafter, dstate_BGNF)
        dslices_in, dconstants_in = inject_vjp((du * before, du))
        dconstants = jax.tree.map(lambda *terms: sum(terms), dconstants, dconstants_in, dconstants_out)
        dslices = jax.tree.map(jnp.add, dslices_in, dslices_out)
        dsequences = {k: with_chunk(dsequences[k], dslices[k], index) for k in dsequences}
        return (dstate_BGNF, dconstants, dsequences), None

    carry = dstate_BGNF, jax.tree.map(jnp.zeros_like, constants), jax.tree.map(jnp.zeros_like, sequences)
    chunks = jnp.arange(starts_CBGNF.shape[0]), starts_CBGNF
    (dstate_BGNF, dconstants, dsequences), _ = jax.lax.scan(chunk, carry, chunks, reverse=True)
    return dsequences, dconstants, dstate_BGNF


def _split(options: _Options, arrays: Arrays) -> tuple[Arrays, Arrays, jax.Array]:
    """The arguments as sequences, padded to whole chunks, constants, and the state; F = E / G channels a group.

    Returns:
        sequences: "x", "dt", "z" (B, L, E) and, unless constant over time, "B" and "C" (B, L, G or 1, N), in their
            own dtypes.
        constants: "A" and, if constant over time, "B" and "C" (1, G, N, F), float32 or complex64; "D" and "dt_bias"
            (1, G, F), float32. The first dimension stands for the batch.
        state: (B, G, N, F), in the dtype of the constant "A".
    """
    groups = group_count(arrays["B"], arrays["C"])
    constants = {"A": _grouped_matrix(arrays["A"], groups)}
    sequences = {}
    for name in ("x", "dt", "z"):
        if name in arrays:
            sequences[name] = padded(arrays[name], options.chunk_length)
    for name in ("D", "dt_bias"):
        if name in arrays:
            constants[name] = arrays[name].astype(jnp.float32).reshape(1, groups, -1)
    for name in ("B", "C"):
        matrix = arrays[name]
        if matrix.ndim == 2:
            constants[name] = _grouped_matrix(matrix, groups)
        else:
            matrix_BLGN = matrix[:, :, None] if matrix.ndim == 3 else matrix
            sequences[name] = padded(matrix_BLGN, options.chunk_length)
    return sequences, constants, _packed_state(arrays["initial_state"].astype(constants["A"].dtype), groups)


def _masks(options: _Options, arguments: ScanArguments) -> Arrays:
    """(B, L): `is_valid`, only if the length is padded, and `is_start` of a new segment, if there are any."""
    masks, shape = {}, arguments.x.shape[:2]
    if shape[1] % options.chunk_length:
        masks["is_valid"] = padded(jnp.ones(shape, bool), options.chunk_length)
    if arguments.segment_ids is not None:
        masks["is_start"] = padded(segment_starts(arguments.segment_ids), options.chunk_length)
    return masks


def _arranged(slices: Arrays, *, groups: int, time_axis: int) -> Arrays:
    """A chunk as a recurrence wants it, here for time axis 0.

    Channels (B, T, E) become (T, B, G, F); matrices (B, T, G, N) or (B, T, 1, N) become (T, B, G, N); masks (B, T)
    become (T, B).
    """
    arranged = {}
    for name, array in slices.items():
        array = jnp.moveaxis(array, 1, time_axis)
        if array.ndim == 3:
            array = array.reshape(*array.shape[:2], groups, -1)
        elif array.ndim == 4:
            array = jnp.broadcast_to(array, (*array.shape[:2], groups, array.shape[3]))
        arranged[name] = array
    return arranged


def _widened(array: jax.Array) -> jax.Array:
    """In float32 or complex64."""
    return array.astype(jnp.result_type(jnp.float32, array.dtype))


def _grouped_matrix(matrix_EN: jax.Array, groups: int) -> jax.Array:
    """(E, N) to (1, G, N, F) in float32 or complex64."""
    return _packed_state(_widened(matrix_EN)[None], groups)


def _packed_state(state_BEN: jax.Array, groups: int) -> jax.Array:
    """(B, E, N) to (B, G, N, F)."""
    batch, _, states = state_BEN.shape
    return jnp.swapaxes(state_BEN.reshape(batch, groups, -1, states), 2, 3)


def _unpacked_state(state_BGNF: jax.Array) -> jax.Array:
    """The inverse of `_packed_state`."""
    batch, _, states, _ = state_BGNF.shape
    return jnp.swapaxes(state_BGNF, 2, 3).reshape(batch, -1, states)
