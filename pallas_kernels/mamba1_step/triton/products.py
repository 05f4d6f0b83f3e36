"""Kernels of the Mamba-1 step that stream a matrix past a few rows; import only where triton is installed.

A program owns a block of columns and all rows, at most M. Suffixes spell shapes: M rows, C columns of a block, which
are channels in the in-projection, T taps, S columns of the x-projection.
"""

# Triton compiles what only looks like Python, and need not be installed.
# pyrefly: ignore-errors
from typing import no_type_check

import triton
import triton.language as tl

from pallas_kernels.common.triton.convolution import finish_convolution, load_window, store_window, window_sum
from pallas_kernels.common.triton.products import product_of_stream, sum_of_products


@triton.jit
@no_type_check
def project_in(
    stream,
    norm_scale,
    weight,
    weight_scale,
    conv_weight,
    conv_bias,
    window,
    x,
    z,
    new_window,
    constants: tl.constexpr,
):
    """Norm, in-projection, convolution and SiLU: programs count blocks of x first, then those of z.

    Writes x and z (ROWS, E), and the window in place of the old one.
    """
    program = tl.program_id(0)
    is_gate = program >= constants.blocks
    block = program % constants.blocks
    row_M = tl.arange(0, constants.M)
    channel_C = block * constants.COLUMNS + tl.arange(0, constants.COLUMNS)
    exists_C = channel_C < constants.E
    convolved_C = exists_C & (program < constants.blocks)
    column_C = channel_C + tl.where(is_gate, constants.E, 0)
    # Loaded long before they are needed: the sum hides the wait.
    window_MTC = load_window(window, row_M, channel_C, convolved_C, constants.E, constants)
    taps_C = window_sum(window_MTC, conv_weight, conv_bias, channel_C, convolved_C, constants.E, constants)

    dtype: tl.constexpr = x.dtype.element_ty
    sum_MC = product_of_stream(
        stream, norm_scale, weight, weight_scale, row_M, column_C, exists_C, constants.D, dtype, constants
    )
    value_MC = sum_MC.to(dtype)

    place_MC = row_M[:, None] * constants.E + channel_C[None]
    is_row_M1 = (row_M < constants.ROWS)[:, None]
    if is_gate:
        tl.store(z + place_MC, value_MC, mask=is_row_M1 & exists_C[None])
    else:
        x_MC = finish_convolution(taps_C, value_MC, conv_weight, channel_C, constants.E, constants)
        tl.store(x + place_MC, x_MC, mask=is_row_M1 & exists_C[None])
        store_window(new_window, window_MTC, value_MC, row_M, channel_C, constants.E, constants)


@triton.jit
@no_type_check
def project_selection(x, weight, weight_scale, parts, constants: tl.constexpr):
    """A part of the sum of the x-projection for a block of columns: parts is (PARTS, ROWS, R + 2 N)."""
    program = tl.program_id(0)
    part = program % constants.PARTS
    row_M = tl.arange(0, constants.M)
    column_C = program // constants.PARTS * constants.COLUMNS + tl.arange(0, constants.COLUMNS)
    exists_C = column_C < constants.selection
    first = part * constants.steps * constants.DEPTH
    sum_MC = sum_of_products(
        x, weight, weight_scale, row_M, column_C, exists_C, first, constants.E, constants.steps, constants.E, constants
    )
    place_MC = (part * constants.ROWS + row_M[:, None]) * constants.selection + column_C[None]
    tl.store(parts + place_MC, sum_MC, mask=(row_M < constants.ROWS)[:, None] & exists_C[None])


@triton.jit
@no_type_check
def project_out(residual, y, weight, weight_scale, new_residual, constants: tl.constexpr):
    """The residual stream and the out-projection, for a block of columns, in place of the residual stream."""
    row_M = tl.arange(0, constants.M)
    column_C = tl.program_id(0) * constants.COLUMNS + tl.arange(0, constants.COLUMNS)
    exists_C = column_C < constants.D
    place_MC = row_M[:, None] * constants.D + column_C[None]
    mask_MC = (row_M < constants.ROWS)[:, None] & exists_C[None]
    residual_MC = tl.load(residual + place_MC, mask=mask_MC, other=0.0)
    sum_MC = sum_of_products(
        y, weight, weight_scale, row_M, column_C, exists_C, 0, constants.E, constants.steps, constants.E, constants
    )
    # Rounded as the layer's output is.
    output_MC = sum_MC.to(y.dtype.element_ty).to(residual_MC.dtype)
    tl.store(new_residual + place_MC, residual_MC + output_MC, mask=mask_MC)
