"""The bodies of the Mosaic GPU kernels of the convolution.

A thread owns a few neighbouring channels and walks a run of tokens with the last K - 1 inputs in registers, so every
input is read once but for the tokens before a run. The backward kernel computes the sum over taps again on its way: a
token's gradient by the pre-activation enters the gradients of the weights at once and those of x over the next K - 1
tokens. The gradients of weight and bias are summed over a run in registers.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.causal_conv1d.arguments import Activation
from pallas_kernels.common.register_math import Registers, loop, sigmoid, total
from pallas_kernels.common.rounding import ceil_div
from pallas_kernels.common.warpgroup import THREADS, Warpgroup, widen

# Neighbouring threads that walk the same tokens of neighbouring channels.
COLUMNS = 16
RUNS = THREADS // COLUMNS
_COLUMN_BITS = COLUMNS.bit_length() - 1
assert COLUMNS == 1 << _COLUMN_BITS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Walk:
    """How a kernel's work is spread.

    Attributes:
        channels: number of channels of a thread, such that it reads 4 to 16 bytes at once.
        tokens: number of tokens in a run.
        ahead: number of tokens that are loaded together, before they are used.
    """

    channels: int
    tokens: int
    ahead: int


FORWARD = Walk(channels=8, tokens=64, ahead=4)
BACKWARD = Walk(channels=4, tokens=64, ahead=4)


def runs_of_row(walk: Walk, tokens: int) -> int:
    """Number of runs that `tokens` tokens of a batch row are cut into."""
    return ceil_div(tokens, walk.tokens)


class Thread:
    """Where each thread works (its channels and its run of tokens), and its access to memory."""

    def __init__(self, w: Warpgroup, walk: Walk, shape, extra_tokens: int, inputs: dict, outputs: dict):
        self.w, self.walk, self.inputs, self.outputs = w, walk, inputs, outputs
        self.batch, self.length, _ = shape
        self.pitch = inputs["x"].shape[1]
        self.width = inputs["weight"].shape[0]
        # A scalar becomes an array with one value a thread by adding it to this zero.
        thread = w.thread_index()
        self.zero = thread & 0
        runs_of_a_row = runs_of_row(walk, self.length + extra_tokens)
        run = (self.zero + jax.lax.axis_index("run")) * RUNS + (thread >> _COLUMN_BITS)
        column = (self.zero + jax.lax.axis_index("column")) * (COLUMNS * walk.channels)
        column = column + (thread & (COLUMNS - 1)) * walk.channels
        # Threads past the last run or channel repeat the last one, so that they read what exists; they write nothing.
        last = self.batch * runs_of_a_row - 1
        self.is_inside = (run <= last) & (column < self.pitch)
        self.run = jnp.minimum(run, self.zero + last)
        self.column = jnp.minimum(column, self.zero + (self.pitch - walk.channels))
        # Runs are numbered through all batch rows; each row has equally many.
        self.row = jax.lax.div(self.run, self.zero + runs_of_a_row)
        self.start = (self.run - self.row * runs_of_a_row) * walk.tokens
        self.is_first = self.start == 0

    def load(self, name: str, row: jax.Array) -> Registers:
        """Words of the thread's channels in a row of an input."""
        return self.w.load(self.inputs[name], self.column, self.walk.channels, row=row, pitch=self.pitch)

    def values(self, name: str, words: Registers) -> Registers:
        return widen(words, self.inputs[name].dtype)

    def token_row(self, token: jax.Array) -> jax.Array:
        """Row of a token, or of the nearest that exists."""
        token = jnp.minimum(jnp.maximum(token, self.zero), self.zero + (self.length - 1))
        return self.row * self.length + token

    def load_token(self, names: tuple[str, ...], token: jax.Array) -> dict[str, Registers]:
        """Words of a token in sequences, and the number of its segment."""
        row = self.token_row(token)
        words = {name: self.load(name, row) for name in names}
        if "segments" in self.inputs:
            words["segments"] = self.w.load(self.inputs["segments"], self.zero, 1, row=row, pitch=1)
        return words

    def past_input(self, distance: int) -> tuple[Registers, jax.Array | None]:
        """The input `distance` tokens before the run, which may lie in the window, and its segment."""
        # Both places are read and one is chosen: threads of a warp need not branch.
        words = self.load_token(("x",), self.start - distance)
        values = self.values("x", words["x"])
        window = self.window_input(-distance)
        values = [jnp.where(self.is_first, w, v) for w, v in zip(window, values, strict=True)]
        return values, words["segments"][0] if "segments" in words else None

    def window_input(self, token: int) -> Registers:
        """The input of a token before the sequence; zero before the window."""
        # The window holds the last K - 1 inputs; the backward kernel asks for earlier ones, which no output needs.
        past = self.width - 1
        if -token > past:
            return [self.w.full(0.0)] * self.walk.channels
        return self.values("window", self.load("window", self.row * past + (past + token)))

    def store(self, name: str, row: jax.Array, values: Registers, mask: jax.Array) -> None:
        self.w.store(self.outputs[name], self.column, values, row=row, pitch=self.pitch, mask=self.is_inside & mask)

    def pre_activation(self, inputs, segments, weight, bias) -> list[jax.Array]:
        """Bias plus the sum over taps; `inputs` and `segments` are those of the last K tokens."""
        taps = [self.masked(inputs[k], segments[k], segments[-1]) for k in range(self.width)]
        return [
            total([bias[c], *(weight[k][c] * taps[k][c] for k in range(self.width))]) for c in range(self.walk.channels)
        ]

    def masked(self, values: Registers, segment, other) -> Registers:
        """Values of a token, zero if it is not of the other's segment."""
        # The newest token is in its own segment: no comparison is compiled for it.
        if segment is None or segment is other:
            return values
        return [jnp.where(segment == other, value, self.w.full(0.0)) for value in values]


def forward(thread: Thread, activation: Activation | None) -> None:
    """y_t = act(bias + sum_k weight_k x_{t - K + 1 + k}) for a run, one token after the other."""
    w, walk, past = thread.w, thread.walk, thread.width - 1
    # Weights, bias and the last K - 1 inputs stay in registers: an input is read once for its K outputs.
    weight = [thread.load("weight", thread.zero + k) for k in range(thread.width)]
    bias = thread.load("bias", thread.zero)
    history = [thread.past_input(distance) for distance in range(past, 0, -1)]

    def fetch(step):
        return [thread.load_token(("x",), thread.start + step * walk.ahead + i) for i in range(walk.ahead)]

    def advance(step, carry):
        # `ahead` tokens are on their way from memory while the ones before are computed.
        words, history = carry
        following = fetch(step + 1)
        for i in range(walk.ahead):
            segment = words[i]["segments"][0] if "segments" in words[i] else None
            history = [*history, (thread.values("x", words[i]["x"]), segment)]
            inputs, segments = zip(*history, strict=True)
            y = thread.pre_activation(inputs, segments, weight, bias)
            if activation == "silu":
                y = [value * sigmoid(w, value) for value in y]
            # The last run of a row may reach past its end.
            token = thread.start + step * walk.ahead + i
            thread.store("y", thread.token_row(token), y, token < thread.length)
            history = history[1:]
        return following, history

    loop(0, walk.tokens // walk.ahead, advance, (fetch(jnp.int32(0)), history))


def backward(thread: Thread, activation: Activation | None) -> None:
    """dx_{t - K + 1}, and the sums for weight and bias, while t walks through a run.

    Runs cover K - 1 tokens after the sequence, whose gradients are zero, so that every dx gets all its terms.
    """
    w, walk, past = thread.w, thread.walk, thread.width - 1
    weight = [thread.load("weight", thread.zero + k) for k in range(thread.width)]
    bias = thread.load("bias", thread.zero)

    def gradient(history, words, token):
        """The gradient by the pre-activation of the newest token of the history, zero if it does not exist."""
        # silu'(p) = s (1 + p (1 - s)) with s = sigmoid(p), and p computed again from the inputs.
        inputs, segments = zip(*history, strict=True)
        dy = thread.values("dy", words["dy"])
        if activation == "silu":
            pre = thread.pre_activation(inputs, segments, weight, bias)
            gates = [sigmoid(w, value) for value in pre]
            dy = [a * (b * (1.0 + c * (1.0 - b))) for a, b, c in zip(dy, gates, pre, strict=True)]
        exists = (token >= 0) & (token < thread.length)
        return [jnp.where(exists, value, w.full(0.0)) for value in dy]

    # The K - 1 tokens before the run come first, for their gradients; 2 K - 2 inputs are needed for that.
    history = [thread.past_input(distance) for distance in range(2 * past, past, -1)]
    gradients = []
    for distance in range(past, 0, -1):
        history = [*history, thread.past_input(distance)]
        token = thread.start - distance
        gradients.append(gradient(history, thread.load_token(("dy",), token), token))
        history = history[1:]

    def fetch(step):
        return [thread.load_token(("x", "dy"), thread.start + step * walk.ahead + i) for i in range(walk.ahead)]

    def advance(step, carry):
        words, history, gradients, dweight, dbias = carry
        following = fetch(step + 1)
        for i in range(walk.ahead):
            token = thread.start + step * walk.ahead + i
            segment = words[i]["segments"][0] if "segments" in words[i] else None
            history = [*history, (thread.values("x", words[i]["x"]), segment)]
            gradients = [*gradients, gradient(history, words[i], token)]
            inputs, segments = zip(*history, strict=True)
            # With r_t the gradient by the pre-activation: dbias = sum_t r_t, dweight_k = sum_t r_t x_{t - K + 1 + k}.
            newest = gradients[-1]
            dbias = [a + b for a, b in zip(dbias, newest, strict=True)]
            taps = [thread.masked(inputs[k], segments[k], segments[-1]) for k in range(thread.width)]
            dweight = [
                [a + b * c for a, b, c in zip(dweight[k], newest, taps[k], strict=True)] for k in range(thread.width)
            ]
            # dx_s = sum_k weight_k r_{s + K - 1 - k}: tap k of the token K - 1 back meets the gradient k tokens back.
            later = [thread.masked(gradients[past - k], segments[past - k], segments[0]) for k in range(thread.width)]
            dx = [total(weight[k][c] * later[k][c] for k in range(thread.width)) for c in range(walk.channels)]
            # Only now has that token all its terms. Before the sequence it is an input of the window.
            target = token - past
            is_token = (target >= 0) & (target < thread.length)
            thread.store("dx", thread.token_row(target), dx, is_token)
            if past:
                row = thread.row * past + jnp.minimum(jnp.maximum(target + past, thread.zero), thread.zero + (past - 1))
                thread.store("dwindow", row, dx, target < 0)
                # The last K - 1 inputs are also the final window, whose gradient XLA adds in float32.
                tail = target - (thread.length - past)
                row = thread.row * past + jnp.minimum(jnp.maximum(tail, thread.zero), thread.zero + (past - 1))
                thread.store("dtail", row, dx, (tail >= 0) & is_token)
            history, gradients = history[1:], gradients[1:]
        return following, history, gradients, dweight, dbias

    zeros = [w.full(0.0)] * walk.channels
    carry = fetch(jnp.int32(0)), history, gradients, [zeros] * thread.width, zeros
    *_, dweight, dbias = loop(0, walk.tokens // walk.ahead, advance, carry)
    always = thread.zero == 0
    # One row a run, which XLA adds up in a fixed order.
    for k in range(thread.width):
        thread.store("dweight", thread.run * thread.width + k, dweight[k], always)
    thread.store("dbias", thread.run, dbias, always)
