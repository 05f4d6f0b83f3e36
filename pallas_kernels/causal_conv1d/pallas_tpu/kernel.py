"""The bodies of the TPU kernels of the convolution.

A kernel walks a sequence in groups of 16 tokens, with the 8 tokens before (forward) or the gradients of the 8 after
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
    GROUP,
    LANES,
    SUBLANES,
    Refs,
    folded,
    group_tokens,
    over,
    sequence,
    sigmoid,
    tile_lanes,
)


def _mask_columns(geometry: Geometry, refs: Refs, group) -> list[jax.Array] | None:
    """The masks of a group of tokens, each in all lanes."""
    if "masks" not in refs:
        return None
    masks = refs["masks"][group_tokens(group), :]
    return [jnp.broadcast_to(masks[:, i : i + 1], (GROUP, LANES)) for i in range(2 * geometry.past)]


def _shifted_inputs(geometry: Geometry, refs: Refs, tile: int, masks: list[jax.Array] | None) -> list[jax.Array]:
    """Inputs of a group as tap k meets them, zero if of another segment."""
    found = []
    for shift in range(geometry.past, -1, -1):
        rows = refs["inputs"][tile, SUBLANES - shift : SUBLANES - shift + GROUP, :]
        found.append(rows * masks[shift - 1] if masks and shift else rows)
    return found


def _pre_activation(geometry: Geometry, refs: Refs, inputs: list[jax.Array], lanes: slice) -> jax.Array:
    """Bias plus the sum over taps."""
    pre = refs["taps"][geometry.width : geometry.width + 1, lanes] + inputs[0] * refs["taps"][0:1, lanes]
    for tap in range(1, geometry.width):
        pre = pre + inputs[tap] * refs["taps"][tap : tap + 1, lanes]
    return pre


def forward(geometry: Geometry, activation: Activation | None, refs: Refs) -> None:
    """A block of channels and a chunk of tokens."""
    tiles = [tile_lanes(tile) for tile in range(geometry.tiles)]

    @pl.when(pl.program_id(2) == 0)
    def _():
        for tile, lanes in enumerate(tiles):
            refs["inputs"][tile, :SUBLANES, :] = refs["before"][:, lanes]

    def advance(group, carry):
        masks = _mask_columns(geometry, refs, group)
        for tile, lanes in enumerate(tiles):
            x = sequence(refs, "x", group, lanes)
            refs["inputs"][tile, SUBLANES:, :] = x
            y = _pre_activation(geometry, refs, _shifted_inputs(geometry, refs, tile, masks), lanes)
            if activation == "silu":
                y = y * sigmoid(y)
            refs["y"][group_tokens(group), lanes] = y.astype(refs["y"].dtype)
            refs["inputs"][tile, :SUBLANES, :] = x[GROUP - SUBLANES :]
        return carry

    over(geometry.groups, advance)


def backward(geometry: Geometry, activation: Activation | None, refs: Refs) -> None:
    """Gradients of a block of channels and a chunk of tokens, the last chunk first."""
    tiles = [tile_lanes(tile) for tile in range(geometry.tiles)]
    step = pl.program_id(2)
    chunk = geometry.chunks - 1 - step

    @pl.when(step == 0)
    def _():
        refs["dtaps"][...] = jnp.zeros_like(refs["dtaps"])
        for tile in range(geometry.tiles):
            refs["gradients"][tile, GROUP:, :] = jnp.zeros((SUBLANES, LANES), jnp.float32)

    def go_back(index, carry):
        group = geometry.groups - 1 - index
        masks = _mask_columns(geometry, refs, group)
        for tile, lanes in enumerate(tiles):
            _go_back_tile(geometry, activation, refs, group, chunk, tile, masks)
            # What the group before it needs of this one.
            refs["gradients"][tile, GROUP:, :] = refs["gradients"][tile, :SUBLANES, :]
            refs["dfirst"][:, lanes] = refs["gradients"][tile, :SUBLANES, :]

        from_end = chunk * geometry.groups + group - (geometry.last_group - 1)

        @pl.when((from_end == 0) | (from_end == 1))
        def _():
            refs["dtail"][group_tokens(from_end), :] = refs["dx_of_group"][...]

        return carry

    over(geometry.groups, go_back)


def _go_back_tile(
    geometry: Geometry,
    activation: Activation | None,
    refs: Refs,
    group,
    chunk,
    tile: int,
    masks: list[jax.Array] | None,
) -> None:
    """Gradients of a group of tokens and a tile."""
    lanes, width = tile_lanes(tile), geometry.width
    within = sequence(refs, "x", jnp.maximum(group - 1, 0), lanes)[GROUP - SUBLANES :]
    across = refs["group_before"][GROUP - SUBLANES :, lanes].astype(jnp.float32)
    across = jnp.where(chunk == 0, refs["before"][:, lanes], across)
    refs["inputs"][tile, :SUBLANES, :] = jnp.where(group == 0, across, within)
    refs["inputs"][tile, SUBLANES:, :] = sequence(refs, "x", group, lanes)
    inputs = _shifted_inputs(geometry, refs, tile, masks)
    gradient = sequence(refs, "dy", group, lanes)
    if activation == "silu":
        pre = _pre_activation(geometry, refs, inputs, lanes)
        gate = sigmoid(pre)
        gradient = gradient * (gate * (1.0 + pre * (1.0 - gate)))
    refs["gradients"][tile, :GROUP, :] = gradient
    for tap in range(width):
        refs["dtaps"][tap, :, lanes] += folded(gradient * inputs[tap])
    refs["dtaps"][width, :, lanes] += folded(gradient)
    dx = gradient * refs["taps"][width - 1 : width, lanes]
    for shift in range(1, width):
        later = refs["gradients"][tile, shift : shift + GROUP, :]
        if masks:
            later = later * masks[geometry.past + shift - 1]
        dx = dx + later * refs["taps"][width - 1 - shift : width - shift, lanes]
    refs["dx_of_group"][:, lanes] = dx
    refs["dx"][group_tokens(group), lanes] = dx.astype(refs["dx"].dtype)
