"""Two ways to run the linear recurrence h_t = a_t h_{t-1} + u_t, and its adjoint, over the tokens of a chunk."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recurrence:
    """One way to scan a chunk.

    Attributes:
        name: as it appears in lowered modules.
        chunk_length: T, tokens per chunk. The backward pass keeps one state per chunk, N / T times the memory of x, and
            works on about eight arrays of one chunk's states. 16 keeps these within a CPU core's cache, where the scan
            takes half the time of 64; 64 gives an accelerator enough work per operation, where it takes half the time
            of 16.
        time_axis: 0 or 1, the axis of time in a chunk's arrays; the other one is the batch.
        forward: (state, tokens, masks, inject, emit) to the next chunk's state and the outputs, where
            inject(tokens, masks) gives (a, u) and emit(h, tokens) the output of independent tokens on one leading axis.
        states: (a, u, state) to the states before and after every token.
        adjoint: (a, dh, dstate), the cotangents of the states after every token and of the chunk's last state, to the
            cotangents of u and of the chunk's first state.
    """

    name: str
    chunk_length: int
    time_axis: int
    forward: Callable
    states: Callable
    adjoint: Callable


def over_chunk(function: Callable, *trees):
    """Calls a function of independent tokens, (tokens, ...), on a chunk, whose first two axes are time and batch."""
    leading = jax.tree.leaves(trees)[0].shape[:2]
    flat = jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), trees)
    return jax.tree.map(lambda array: array.reshape(*leading, *array.shape[1:]), function(*flat))


def _sequential_forward(state, tokens, masks, inject, emit):
    def step(state, inputs):
        tokens, masks = inputs
        a, u = inject(tokens, masks)
        state = a * state + u
        return state, emit(state, tokens)

    return jax.lax.scan(step, state, (tokens, masks))


def _sequential_states(a, u, state):
    def step(state, inputs):
        a, u = inputs
        return a * state + u, state

    last, before = jax.lax.scan(step, state, (a, u))
    return before, jnp.concatenate([before[1:], last[None]])


def _sequential_adjoint(a, dh, dstate):
    def step(dstate, inputs):
        a, dh = inputs
        du = dh + dstate
        return a * du, du

    dstate, du = jax.lax.scan(step, dstate, (a, dh), reverse=True)
    return du, dstate


def _associative(time_axis: int) -> Recurrence:
    """The parallel prefix along axis 0 or 1 of a chunk's arrays."""

    def at(position: int | slice) -> tuple[int | slice, ...]:
        return (slice(None),) * time_axis + (position,)

    def prefix(a, u, *, reverse: bool):
        """All h_t = a_t h_{t-1} + u_t from h = 0, in log T steps."""

        def compose(first, second):
            return first[0] * second[0], second[0] * first[1] + second[1]

        return jax.lax.associative_scan(compose, (a, u), reverse=reverse, axis=time_axis)[1]

    def forward(state, tokens, masks, inject, emit):
        a, u = over_chunk(inject, tokens, masks)
        _, after = states(a, u, state)
        return after[at(-1)], over_chunk(emit, after, tokens)

    def states(a, u, state):
        after = prefix(a, u.at[at(0)].add(a[at(0)] * state), reverse=False)
        before = [jnp.expand_dims(state, time_axis), after[at(slice(-1))]]
        return jnp.concatenate(before, axis=time_axis), after

    def adjoint(a, dh, dstate):
        next_a = jnp.concatenate([a[at(slice(1, None))], jnp.ones_like(a[at(slice(1))])], axis=time_axis)
        du = prefix(next_a, dh.at[at(-1)].add(dstate), reverse=True)
        return du, a[at(0)] * du[at(0)]

    return Recurrence(
        name="associative", chunk_length=64, time_axis=time_axis, forward=forward, states=states, adjoint=adjoint
    )


SEQUENTIAL = Recurrence(
    name="sequential",
    chunk_length=16,
    time_axis=0,
    forward=_sequential_forward,
    states=_sequential_states,
    adjoint=_sequential_adjoint,
)
# On an H100 the prefix along the second axis needs no transposes, and the backward pass takes 0.7 of the time and half
# the memory. The TPU compiler (libtpu 0.0.52) aborts on it.
ASSOCIATIVE = _associative(time_axis=1)
ASSOCIATIVE_TIME_FIRST = _associative(time_axis=0)
