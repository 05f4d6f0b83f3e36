"""Registers of a TPU's vector unit in Pallas kernels.

A register holds 8 rows of 128 lanes. In blocks of sequences tokens lie along rows and channels along lanes: 128
channels are a tile, and 16 tokens, the rows of a bfloat16 register, are a span.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.register_math import LOG2_E
from pallas_kernels.common.rounding import ceil_div

# A register of the vector unit.
LANES = 128
SUBLANES = 8
# Consecutive tokens that a kernel's stage takes together: the rows of a bfloat16 register.
SPAN = 16
# What a step over a span of tokens costs besides its tiles, in the time of a tile. The schedules of a scan with blocks
# of 12 and 6 tiles say 1.1 (4.741 and 5.146 million cycles, `benchmarks/results/tpu_static_2026-11-24.md`). A number
# below 1 never pads by a tile to save a step, and so moves no more bytes than it must; 0.5 chooses the
# same for up to 64 tiles in blocks of 12.
_OVERHEAD = 0.7

Refs = dict[str, Any]


def choose_tiles(count: int, *, most: int) -> int:
    """Chooses how many tiles a block has, at most `most`, so that `count` tiles need few blocks and little padding."""
    candidates = range(1, min(most, count) + 1)
    return min(candidates, key=lambda tiles: (ceil_div(count, tiles) * (tiles + _OVERHEAD), -tiles))


def span_tokens(span) -> pl.Slice:
    """Rows of a span of tokens in a block."""
    # The compiler must know that the rows start at a whole register, or it shifts them into place.
    return pl.ds(pl.multiple_of(span * SPAN, SPAN), SPAN)


def tile_lanes(tile: int) -> slice:
    """Lanes of a tile in a block."""
    return slice(tile * LANES, (tile + 1) * LANES)


def sequence(refs: Refs, name: str, span, lanes: slice) -> jax.Array:
    """A span of tokens of a tile, in float32."""
    return refs[name][span_tokens(span), lanes].astype(jnp.float32)


def over(count: int, body: Callable[[Any, Any], Any], carry: Any = 0) -> Any:
    """`jax.lax.fori_loop` from 0; a single pass is not a loop, and its index is static."""
    return body(0, carry) if count == 1 else jax.lax.fori_loop(0, count, body, carry)


def folded(rows: jax.Array) -> jax.Array:
    """Adds 16 rows to 8 that have the same sum; 8 rows stay as they are."""
    parts = [rows[first : first + SUBLANES] for first in range(0, rows.shape[0], SUBLANES)]
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def reciprocal(value: jax.Array) -> jax.Array:
    """1 / value for normal numbers."""
    return pltpu.reciprocal(value, full_range=False)


def sigmoid(value: jax.Array) -> jax.Array:
    """1 / (1 + exp(-value)); below -69, 2^-100."""
    # The reciprocal is for normal numbers, so the power stays at 2^100 or below.
    return reciprocal(1.0 + jnp.exp2(jnp.minimum(value * -LOG2_E, 100.0)))
