"""The causal convolution as Mosaic GPU kernels, for Hopper and newer.

A thread owns a few neighbouring channels and walks a run of tokens with the last K - 1 inputs in registers, so every
input is read once but for the tokens before a run. The backward kernel computes the sum over taps again on its way: a
token's gradient by the pre-activation enters the gradients of the weights at once and those of x over the next K - 1
tokens. The gradients of weight and bias are summed over a run in registers; XLA adds up the runs.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.causal_conv1d.arguments import OP, Activation, ConvOutput
from pallas_kernels.causal_conv1d.windows import (
    add_gradient_of_final_window,
    decline_unusual,
    final_window,
    with_defaults,
)
from pallas_kernels.causal_conv1d.xla import op as xla
from pallas_kernels.common.derivatives import differentiable, no_forward_mode
from pallas_kernels.common.devices import cuda_compute_capability, target_platform
from pallas_kernels.common.register_math import Registers, loop, sigmoid, total
from pallas_kernels.common.warpgroup import THREADS, Warpgroup, launch, widen

# Neighbouring threads that walk the same tokens of neighbouring channels.
_COLUMNS = 16
_RUNS = THREADS // _COLUMNS

Arrays = dict[str, jax.Array]
# x, window, weight and bias.
Operands = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Walk:
    """How a kernel's work is spread.

    Attributes:
        channels: of a thread, so many that it reads 4 to 16 bytes at once.
        tokens: of a run.
        ahead: tokens that are read together.
    """

    channels: int
    tokens: int
    ahead: int


FORWARD = Walk(channels=8, tokens=64, ahead=4)
BACKWARD = Walk(channels=4, tokens=64, ahead=4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Options:
    """What is static about a convolution."""

    activation: Activation | None
    interpreted: bool
    forward: Walk
    backward: Walk


def causal_conv1d(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    *,
    activation: Activation | None,
    initial_window: jax.Array | None,
    segment_ids: jax.Array | None,
    walks: tuple[Walk, Walk] = (FORWARD, BACKWARD),
) -> ConvOutput:
    """See `pallas_kernels.causal_conv1d.api.causal_conv1d`; on a CPU the kernels are interpreted, which is slow.

    `walks` says how the work of the forward and the backward pass is spread.

    Raises:
        NotImplementedError: the target is no GPU of compute capability 9.0 or more, the filter has more than 8 taps, or
            a dtype is neither float32 nor bfloat16.
    """
    if target_platform() != "cpu" and (cuda_compute_capability() or 0) < 90:
        raise NotImplementedError(f"{OP}: 'pallas_gpu' needs an NVIDIA GPU of compute capability 9.0 or more")
    decline_unusual("pallas_gpu", x, weight, bias, initial_window)
    window, bias = with_defaults(x, weight, bias, initial_window)
    options = _Options(
        activation=activation, interpreted=target_platform() == "cpu", forward=walks[0], backward=walks[1]
    )
    y, last_inputs = _convolve(options, (x, window, weight, bias), segment_ids)
    return ConvOutput(y=y, final_window=last_inputs)


def _convolve_outputs(
    options: _Options, arrays: Operands, segment_ids: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    return _convolve_forward(options, arrays, segment_ids)[0]


def _convolve_forward(options: _Options, arrays: Operands, segment_ids: jax.Array | None):
    x, window, weight, bias = arrays
    inputs = _prepare(options.forward, x, window, weight, bias, segment_ids)
    walk = options.forward
    outputs = {"y": jax.ShapeDtypeStruct(inputs["x"].shape, x.dtype)}
    results = _call(options, _forward, walk, x.shape, inputs, outputs, extra_tokens=0)
    y = results["y"][:, : x.shape[2]].reshape(x.shape)
    return (y, final_window(x, window, segment_ids)), (arrays, segment_ids)


def _convolve_backward(options: _Options, residuals, cotangents):
    (x, window, weight, bias), segment_ids = residuals
    dy, dfinal_window = cotangents
    walk, past = options.backward, weight.shape[0] - 1
    inputs = _prepare(walk, x, window, weight, bias, segment_ids)
    inputs["dy"] = _padded_rows(walk, dy)
    runs = x.shape[0] * _runs(walk, x.shape[1] + past)
    columns = inputs["x"].shape[1]
    outputs = {
        "dx": jax.ShapeDtypeStruct(inputs["x"].shape, x.dtype),
        "dweight": jax.ShapeDtypeStruct((runs * weight.shape[0], columns), jnp.float32),
        "dbias": jax.ShapeDtypeStruct((runs, columns), jnp.float32),
    }
    if past:
        edge = jax.ShapeDtypeStruct((x.shape[0] * past, columns), jnp.float32)
        outputs |= {"dwindow": edge, "dtail": edge}
    results = _call(options, _backward, walk, x.shape, inputs, outputs, extra_tokens=past)
    channels = x.shape[2]
    dx = results["dx"][:, :channels].reshape(x.shape)
    dwindow = jnp.zeros(window.shape, jnp.float32)
    if past:
        dwindow, dtail = (results[name][:, :channels].reshape(window.shape) for name in ("dwindow", "dtail"))
        dx, dwindow = add_gradient_of_final_window(dx, dtail, dwindow, dfinal_window, segment_ids)
    dweight = results["dweight"].reshape(runs, weight.shape[0], columns).sum(axis=0)[:, :channels]
    dbias = results["dbias"].sum(axis=0)[:channels]
    return dx, dwindow.astype(window.dtype), dweight.astype(weight.dtype), dbias.astype(bias.dtype)


_convolve = differentiable(
    _convolve_outputs,
    forward=_convolve_forward,
    backward=_convolve_backward,
    tangent=no_forward_mode(OP, "pallas_gpu"),
)


def _runs(walk: Walk, tokens: int) -> int:
    """Runs of a batch row."""
    return -(-tokens // walk.tokens)


def _padded_rows(walk: Walk, array: jax.Array) -> jax.Array:
    """(..., E) to (rows, E), with zero channels up to a multiple of a thread's."""
    padding = -array.shape[-1] % walk.channels
    array = jnp.pad(array, ((0, 0),) * (array.ndim - 1) + ((0, padding),))
    return array.reshape(-1, array.shape[-1])


def _prepare(walk: Walk, x, window, weight, bias, segment_ids) -> Arrays:
    """The kernels' inputs: rows of channels, and the number of segment starts up to each token."""
    inputs = {"x": _padded_rows(walk, x), "weight": _padded_rows(walk, weight.astype(jnp.float32))}
    inputs["bias"] = _padded_rows(walk, bias.astype(jnp.float32)[None])
    if window.shape[1]:
        inputs["window"] = _padded_rows(walk, window)
    if segment_ids is not None:
        inputs["segments"] = xla.count_segments(segment_ids, 0).reshape(-1, 1)
    return inputs


def _call(
    options: _Options,
    kernel: Callable[..., None],
    walk: Walk,
    shape: tuple[int, ...],
    inputs: Arrays,
    outputs: dict[str, jax.ShapeDtypeStruct],
    *,
    extra_tokens: int,
) -> Arrays:
    """Runs a kernel over every run of tokens."""
    runs = shape[0] * _runs(walk, shape[1] + extra_tokens)
    columns = -(-inputs["x"].shape[1] // (_COLUMNS * walk.channels))

    def body(w: Warpgroup, inputs, outputs, scratch):
        del scratch
        kernel(_Thread(w, walk, shape, extra_tokens, inputs, outputs), options.activation)

    return launch(
        body,
        inputs=inputs,
        outputs=outputs,
        scratch={},
        grid={"column": columns, "run": -(-runs // _RUNS)},
        name=f"causal_conv1d{kernel.__name__}",
        interpreted=options.interpreted,
    )


class _Thread:
    """A thread's place, and its access to memory."""

    def __init__(self, w: Warpgroup, walk: Walk, shape, extra_tokens: int, inputs: dict, outputs: dict):
        self.w, self.walk, self.inputs, self.outputs = w, walk, inputs, outputs
        self.batch, self.length, _ = shape
        self.pitch = inputs["x"].shape[1]
        self.width = inputs["weight"].shape[0]
        thread = w.thread_index()
        self.zero = thread & 0
        runs_of_a_row = _runs(walk, self.length + extra_tokens)
        run = (self.zero + jax.lax.axis_index("run")) * _RUNS + (thread >> 4)
        column = (self.zero + jax.lax.axis_index("column")) * (_COLUMNS * walk.channels)
        column = column + (thread & (_COLUMNS - 1)) * walk.channels
        last = self.batch * runs_of_a_row - 1
        self.is_inside = (run <= last) & (column < self.pitch)
        self.run = jnp.minimum(run, self.zero + last)
        self.column = jnp.minimum(column, self.zero + (self.pitch - walk.channels))
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
        words = self.load_token(("x",), self.start - distance)
        values = self.values("x", words["x"])
        window = self.window_input(-distance)
        values = [jnp.where(self.is_first, w, v) for w, v in zip(window, values, strict=True)]
        return values, words["segments"][0] if "segments" in words else None

    def window_input(self, token: int) -> Registers:
        """The input of a token before the sequence; zero before the window."""
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
        if segment is None or segment is other:
            return values
        return [jnp.where(segment == other, value, self.w.full(0.0)) for value in values]


def _forward(thread: _Thread, activation: Activation | None) -> None:
    """y_t of a run, one token after the other."""
    w, walk, past = thread.w, thread.walk, thread.width - 1
    weight = [thread.load("weight", thread.zero + k) for k in range(thread.width)]
    bias = thread.load("bias", thread.zero)
    history = [thread.past_input(distance) for distance in range(past, 0, -1)]

    def fetch(step):
        return [thread.load_token(("x",), thread.start + step * walk.ahead + i) for i in range(walk.ahead)]

    def advance(step, carry):
        words, history = carry
        following = fetch(step + 1)
        for i in range(walk.ahead):
            segment = words[i]["segments"][0] if "segments" in words[i] else None
            history = [*history, (thread.values("x", words[i]["x"]), segment)]
            inputs, segments = zip(*history, strict=True)
            y = thread.pre_activation(inputs, segments, weight, bias)
            if activation == "silu":
                y = [value * sigmoid(w, value) for value in y]
            token = thread.start + step * walk.ahead + i
            thread.store("y", thread.token_row(token), y, token < thread.length)
            history = history[1:]
        return following, history

    loop(0, walk.tokens // walk.ahead, advance, (fetch(jnp.int32(0)), history))


def _backward(thread: _Thread, activation: Activation | None) -> None:
    """dx_{t - K + 1}, and the sums for weight and bias, while t walks through a run.

    Runs cover K - 1 tokens after the sequence, whose gradients are zero, so that every dx gets all its terms.
    """
    w, walk, past = thread.w, thread.walk, thread.width - 1
    weight = [thread.load("weight", thread.zero + k) for k in range(thread.width)]
    bias = thread.load("bias", thread.zero)

    def gradient(history, words, token):
        """The gradient by the pre-activation of the newest token of the history, zero if it does not exist."""
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
            newest = gradients[-1]
            dbias = [a + b for a, b in zip(dbias, newest, strict=True)]
            taps = [thread.masked(inputs[k], segments[k], segments[-1]) for k in range(thread.width)]
            dweight = [
                [a + b * c for a, b, c in zip(dweight[k], newest, taps[k], strict=True)] for k in range(thread.width)
            ]
            # Tap k of the token K - 1 back meets the gradient of the token k back.
            later = [thread.masked(gradients[past - k], segments[past - k], segments[0]) for k in range(thread.width)]
            dx = [total(weight[k][c] * later[k][c] for k in range(thread.width)) for c in range(walk.channels)]
            target = token - past
            is_token = (target >= 0) & (target < thread.length)
            thread.store("dx", thread.token_row(target), dx, is_token)
            if past:
                row = thread.row * past + jnp.minimum(jnp.maximum(target + past, thread.zero), thread.zero + (past - 1))
                thread.store("dwindow", row, dx, target < 0)
                tail = target - (thread.length - past)
                row = thread.row * past + jnp.minimum(jnp.maximum(tail, thread.zero), thread.zero + (past - 1))
                thread.store("dtail", row, dx, (tail >= 0) & is_token)
            history, gradients = history[1:], gradients[1:]
        return following, history, gradients, dweight, dbias

    zeros = [w.full(0.0)] * walk.channels
    carry = fetch(jnp.int32(0)), history, gradients, [zeros] * thread.width, zeros
    *_, dweight, dbias = loop(0, walk.tokens // walk.ahead, advance, carry)
    always = thread.zero == 0
    for k in range(thread.width):
        thread.store("dweight", thread.run * thread.width + k, dweight[k], always)
    thread.store("dbias", thread.run, dbias, always)
