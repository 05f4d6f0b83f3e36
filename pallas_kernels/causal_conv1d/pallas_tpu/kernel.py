"""The bodies of the TPU kernels of the convolution.

A kernel walks a sequence in spans of 16 tokens, with the 8 tokens before (forward) or the gradients of the 8 after
(backward) next to them in memory on the chip, so that a shift by some tokens is a read from some rows further on. The
backward kernel computes the sum over taps again. The gradients of weight and bias stay on the chip for a whole
sequence.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.causal_conv1d.arguments import Activation
from pallas_kernels.causal_conv1d.pallas_tpu.geometry import Geometry
from pallas_kernels.common.tpu_tiles import (
    LANES,
    SPAN,
    SUBLANES,
    Refs,
    folded,
    over,
    sequence,
    sigmoid,
    span_tokens,
    tile_lanes,
)


def _mask_columns(geometry: Geometry, refs: Refs, span) -> list[jax.Array] | None:
    """The masks of a span of tokens, each in all lanes."""
    if "masks" not in refs:
        return None
    # 1 where the token so many places before (or after) is of the same segment, else 0.
    masks = refs["masks"][span_tokens(span), :]
    return [jnp.broadcast_to(masks[:, i : i + 1], (SPAN, LANES)) for i in range(2 * geometry.past)]


def _shifted_inputs(geometry: Geometry, refs: Refs, tile: int, masks: list[jax.Array] | None) -> list[jax.Array]:
    """Inputs of a span as tap k meets them, zero if of another segment."""
    # A read at an offset of rows is a shift in time; 8 rows of the past in front are enough for K up to 9.
    found = []
    for shift in range(geometry.past, -1, -1):
        rows = refs["inputs"][tile, SUBLANES - shift : SUBLANES - shift + SPAN, :]
        found.append(rows * masks[shift - 1] if masks and shift else rows)
    return found


def _pre_activation(geometry: Geometry, refs: Refs, inputs: list[jax.Array], lanes: slice) -> jax.Array:
    """Bias plus the sum over taps."""
    # "taps" has the K weights, and the bias as its last row.
    pre = refs["taps"][geometry.width : geometry.width + 1, lanes] + inputs[0] * refs["taps"][0:1, lanes]
    for tap in range(1, geometry.width):
        pre = pre + inputs[tap] * refs["taps"][tap : tap + 1, lanes]
    return pre


def forward(geometry: Geometry, activation: Activation | None, refs: Refs) -> None:
    """y_t = act(bias + sum_k weight_k x_{t - K + 1 + k}) for a block of channels and a chunk of tokens."""
    tiles = [tile_lanes(tile) for tile in range(geometry.tiles)]

    # The first chunk is preceded by the window; later ones find the past that the chunk before has left.
    @pl.when(pl.program_id(2) == 0)
    def _():
        for tile, lanes in enumerate(tiles):
            refs["inputs"][tile, :SUBLANES, :] = refs["before"][:, lanes]

    def advance(span, carry):
        masks = _mask_columns(geometry, refs, span)
        for tile, lanes in enumerate(tiles):
            x = sequence(refs, "x", span, lanes)
            refs["inputs"][tile, SUBLANES:, :] = x
            y = _pre_activation(geometry, refs, _shifted_inputs(geometry, refs, tile, masks), lanes)
            if activation == "silu":
                y = y * sigmoid(y)
            refs["y"][span_tokens(span), lanes] = y.astype(refs["y"].dtype)
            # The past of the next span.
            refs["inputs"][tile, :SUBLANES, :] = x[SPAN - SUBLANES :]
        return carry

    over(geometry.spans, advance)


def backward(geometry: Geometry, activation: Activation | None, refs: Refs) -> None:
    """Gradients of a block of channels and a chunk of tokens, the last chunk first."""
    tiles = [tile_lanes(tile) for tile in range(geometry.tiles)]
    step = pl.program_id(2)
    chunk = geometry.chunks - 1 - step

    # Nothing comes after the last chunk. Sums for the taps stay on the chip from chunk to chunk.
    @pl.when(step == 0)
    def _():
        refs["dtaps"][...] = jnp.zeros_like(refs["dtaps"])
        for tile in range(geometry.tiles):
            refs["gradients"][tile, SPAN:, :] = jnp.zeros((SUBLANES, LANES), jnp.float32)

    def go_back(index, carry):
        span = geometry.spans - 1 - index
        masks = _mask_columns(geometry, refs, span)
        for tile, lanes in enumerate(tiles):
            _go_back_tile(geometry, activation, refs, span, chunk, tile, masks)
            # The span before needs the gradients of this one's first tokens; so does the window, at the very start.
            refs["gradients"][tile, SPAN:, :] = refs["gradients"][tile, :SUBLANES, :]
            refs["dfirst"][:, lanes] = refs["gradients"][tile, :SUBLANES, :]

        # The last inputs are also the final window: their gradients are kept in float32 for it. They lie in the last
        # two spans that have tokens.
        from_end = chunk * geometry.spans + span - (geometry.last_span - 1)

        @pl.when((from_end == 0) | (from_end == 1))
        def _():
            refs["dtail"][span_tokens(from_end), :] = refs["dx_of_span"][...]

        return carry

    over(geometry.spans, go_back)


def _go_back_tile(
    geometry: Geometry,
    activation: Activation | None,
    refs: Refs,
    span,
    chunk,
    tile: int,
    masks: list[jax.Array] | None,
) -> None:
    """Gradients of a span of tokens and a tile."""
    lanes, width = tile_lanes(tile), geometry.width
    # The past of the first span lies in the chunk before, which the grid brings as "span_before", or in the window.
    within = sequence(refs, "x", jnp.maximum(span - 1, 0), lanes)[SPAN - SUBLANES :]
    across = refs["span_before"][SPAN - SUBLANES :, lanes].astype(jnp.float32)
    across = jnp.where(chunk == 0, refs["before"][:, lanes], across)
    refs["inputs"][tile, :SUBLANES, :] = jnp.where(span == 0, across, within)
    refs["inputs"][tile, SUBLANES:, :] = sequence(refs, "x", span, lanes)
    inputs = _shifted_inputs(geometry, refs, tile, masks)
    gradient = sequence(refs, "dy", span, lanes)
    # silu'(p) = s (1 + p (1 - s)) with s = sigmoid(p), and p computed again.
    if activation == "silu":
        pre = _pre_activation(geometry, refs, inputs, lanes)
        gate = sigmoid(pre)
        gradient = gradient * (gate * (1.0 + pre * (1.0 - gate)))
    refs["gradients"][tile, :SPAN, :] = gradient
    # With r the gradient by the pre-activation: dweight_k = sum_t r_t x_{t - K + 1 + k}, dbias = sum_t r_t.
    for tap in range(width):
        refs["dtaps"][tap, :, lanes] += folded(gradient * inputs[tap])
    refs["dtaps"][width, :, lanes] += folded(gradient)
    # dx_s = sum_k weight_k r_{s + K - 1 - k}: a shift to later tokens, whose gradients are known already.
    dx = gradient * refs["taps"][width - 1 : width, lanes]
    for shift in range(1, width):
        later = refs["gradients"][tile, shift : shift + SPAN, :]
        if masks:
            later = later * masks[geometry.past + shift - 1]
        dx = dx + later * refs["taps"][width - 1 - shift : width - shift, lanes]
    refs["dx_of_span"][:, lanes] = dx
    refs["dx"][span_tokens(span), lanes] = dx.astype(refs["dx"].dtype)
