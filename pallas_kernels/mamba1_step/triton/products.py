"""Kernels of the Mamba-1 step that stream a matrix past rows; import only where triton is installed.

A program owns a block of columns and M rows. Suffixes spell shapes: M rows, C columns of a block, which are channels in
the in-projection, T taps, K terms of a sum.
"""

# Triton compiles what only looks like Python, and need not be installed.
# pyrefly: ignore-errors
from typing import no_type_check

import triton
import triton.language as tl

from pallas_kernels.common.triton import convolution
from pallas_kernels.common.triton.products import own_block, product_of_stream, sum_of_products


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
    row_M, block, _column_C = own_block(tl.program_id(0), constants)
    is_gate = block >= constants.blocks
    channel_C = block % constants.blocks * constants.COLUMNS + tl.arange(0, constants.COLUMNS)
    exists_C = channel_C < constants.E
    convolved_C = exists_C & (block < constants.blocks)
    column_C = channel_C + tl.where(is_gate, constants.E, 0)
    if not constants.IS_WINDOW_LATE:
        # Loaded long before they are needed: the sum hides the wait.
        window_MTC = convolution.load_window(window, row_M, channel_C, convolved_C, constants.E, constants)
        taps_MC = convolution.window_sum(window_MTC, conv_weight, channel_C, convolved_C, constants.E, constants)

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
        if constants.IS_WINDOW_LATE:
            taps_MC = convolution.sum_and_shift(
                new_window, value_MC, conv_weight, row_M, channel_C, constants.E, constants
            )
        else:
            convolution.store_window(new_window, window_MTC, value_MC, row_M, channel_C, constants.E, constants)
        x_MC = convolution.finish_convolution(
            taps_MC, value_MC, conv_weight, conv_bias, channel_C, constants.E, constants
        )
        tl.store(x + place_MC, x_MC, mask=is_row_M1 & exists_C[None])


@triton.jit
@no_type_check
def project_dt(selection, weight, weight_scale, dt, constants: tl.constexpr):
    """The dt-projection (ROWS, E), for a block of channels, of the first R columns of the x-projection."""
    row_M, _block, channel_C = own_block(tl.program_id(0), constants)
    exists_C = channel_C < constants.E
    sum_MC = sum_of_products(
        selection,
        weight,
        weight_scale,
        row_M,
        channel_C,
        exists_C,
        0,
        constants.R,
        constants.ranks,
        constants.selection,
        constants.R,
        constants,
    )
    mask_MC = (row_M < constants.ROWS)[:, None] & exists_C[None]
    tl.store(dt + row_M[:, None] * constants.E + channel_C[None], sum_MC.to(dt.dtype.element_ty), mask=mask_MC)


@triton.jit
@no_type_check
def project_out(residual, y, weight, weight_scale, new_residual, constants: tl.constexpr):
    """The residual stream and the out-projection, for a block of columns, in place of the residual stream."""
    row_M, _block, column_C = own_block(tl.program_id(0), constants)
    exists_C = column_C < constants.D
    place_MC = row_M[:, None] * constants.D + column_C[None]
    mask_MC = (row_M < constants.ROWS)[:, None] & exists_C[None]
    residual_MC = tl.load(residual + place_MC, mask=mask_MC, other=0.0)
    E: tl.constexpr = constants.E
    sum_MC = sum_of_products(y, weight, weight_scale, row_M, column_C, exists_C, 0, E, constants.steps, E, E, constants)
    # Rounded as the layer's output is.
    output_MC = sum_MC.to(y.dtype.element_ty).to(residual_MC.dtype)
    tl.store(new_residual + place_MC, residual_MC + output_MC, mask=mask_MC)
