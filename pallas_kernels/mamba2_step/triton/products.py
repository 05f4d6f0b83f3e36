"""Kernels of the Mamba-2 step that stream matrices past rows; import only where triton is installed.

A program owns a block of columns and M rows. Suffixes spell shapes: M rows, C columns of a block, T taps,
U sums of squares of a group of channels.
"""

# Triton compiles what only looks like Python, and need not be installed.
# pyrefly: ignore-errors
from typing import no_type_check

import triton
import triton.language as tl

from pallas_kernels.common.triton import convolution
from pallas_kernels.common.triton.products import own_block, product_of_stream, store_part, sum_of_products


@triton.jit
@no_type_check
def project_in(
    stream,
    norm_scale,
    in_proj,
    in_proj_scale,
    BC_proj,
    BC_proj_scale,
    dt_proj,
    dt_proj_scale,
    conv_weight,
    conv_bias,
    BC_conv_weight,
    BC_conv_bias,
    window,
    BC_window,
    z,
    x,
    BC,
    dt,
    new_window,
    new_BC_window,
    constants: tl.constexpr,
):
    """Norm, in-projections, convolutions and SiLU: programs count blocks of z, of x, of B and C, and of dt.

    Writes z and x (ROWS, E), B and C (ROWS, 2 G N) and dt (ROWS, H), and the windows in place of the old ones.
    """
    row_M, block, _column_C = own_block(tl.program_id(0), constants)
    if block < constants.blocks:
        project(stream, norm_scale, in_proj, in_proj_scale, z, row_M, block, constants.E, constants)
    elif block < 2 * constants.blocks:
        project_and_convolve(
            stream,
            norm_scale,
            conv_weight,
            conv_bias,
            window,
            in_proj,
            in_proj_scale,
            x,
            new_window,
            row_M,
            block - constants.blocks,
            constants.E,
            constants.E,
            constants,
        )
    elif block < 2 * constants.blocks + constants.BC_blocks:
        project_and_convolve(
            stream,
            norm_scale,
            BC_conv_weight,
            BC_conv_bias,
            BC_window,
            BC_proj,
            BC_proj_scale,
            BC,
            new_BC_window,
            row_M,
            block - 2 * constants.blocks,
            0,
            constants.BC,
            constants,
        )
    else:
        block = block - 2 * constants.blocks - constants.BC_blocks
        project(stream, norm_scale, dt_proj, dt_proj_scale, dt, row_M, block, constants.H, constants)


@triton.jit
@no_type_check
def project(
    stream, norm_scale, weight, weight_scale, output, row_M, block, CHANNELS: tl.constexpr, constants: tl.constexpr
):
    """A block of the first CHANNELS columns of a matrix: output is (ROWS, CHANNELS)."""
    channel_C = block * constants.COLUMNS + tl.arange(0, constants.COLUMNS)
    exists_C = channel_C < CHANNELS
    dtype: tl.constexpr = output.dtype.element_ty
    sum_MC = product_of_stream(
        stream, norm_scale, weight, weight_scale, row_M, channel_C, exists_C, constants.D, dtype, constants
    )
    mask_MC = (row_M < constants.ROWS)[:, None] & exists_C[None]
    tl.store(output + row_M[:, None] * CHANNELS + channel_C[None], sum_MC.to(dtype), mask=mask_MC)


@triton.jit
@no_type_check
def project_and_convolve(
    stream,
    norm_scale,
    conv_weight,
    conv_bias,
    window,
    weight,
    weight_scale,
    output,
    new_window,
    row_M,
    block,
    FIRST: tl.constexpr,
    CHANNELS: tl.constexpr,
    constants: tl.constexpr,
):
    """A block of CHANNELS columns of a matrix, from FIRST on, convolved: output is (ROWS, CHANNELS)."""
    channel_C = block * constants.COLUMNS + tl.arange(0, constants.COLUMNS)
    exists_C = channel_C < CHANNELS
    if not constants.IS_WINDOW_LATE:
        # Loaded long before they are needed: the sum hides the wait.
        window_MTC = convolution.load_window(window, row_M, channel_C, exists_C, CHANNELS, constants)
        taps_MC = convolution.window_sum(window_MTC, conv_weight, channel_C, exists_C, CHANNELS, constants)
    dtype: tl.constexpr = output.dtype.element_ty
    column_C = FIRST + channel_C
    sum_MC = product_of_stream(
        stream, norm_scale, weight, weight_scale, row_M, column_C, exists_C, constants.D, dtype, constants
    )
    value_MC = sum_MC.to(dtype)
    if constants.IS_WINDOW_LATE:
        taps_MC = convolution.sum_and_shift(new_window, value_MC, conv_weight, row_M, channel_C, CHANNELS, constants)
    else:
        convolution.store_window(new_window, window_MTC, value_MC, row_M, channel_C, CHANNELS, constants)
    output_MC = convolution.finish_convolution(
        taps_MC, value_MC, conv_weight, conv_bias, channel_C, CHANNELS, constants
    )
    mask_MC = (row_M < constants.ROWS)[:, None] & exists_C[None]
    tl.store(output + row_M[:, None] * CHANNELS + channel_C[None], output_MC, mask=mask_MC)


@triton.jit
@no_type_check
def project_out(residual, y, squares, weight, weight_scale, new_residual, constants: tl.constexpr):
    """The residual stream and the out-projection, for a block of columns, in place of the residual stream.

    See `normalized_product`.
    """
    row_M, _block, column_C = own_block(tl.program_id(0), constants)
    exists_C = column_C < constants.D
    place_MC = row_M[:, None] * constants.D + column_C[None]
    mask_MC = (row_M < constants.ROWS)[:, None] & exists_C[None]
    residual_MC = tl.load(residual + place_MC, mask=mask_MC, other=0.0)
    output_MC = normalized_product(y, squares, weight, weight_scale, 0, row_M, column_C, exists_C, constants)
    # Rounded as the layer's output is.
    output_MC = output_MC.to(y.dtype.element_ty).to(residual_MC.dtype)
    tl.store(new_residual + place_MC, residual_MC + output_MC, mask=mask_MC)


@triton.jit
@no_type_check
def project_out_in_parts(y, squares, weight, weight_scale, parts, constants: tl.constexpr):
    """A part of the out-projection for a block of columns: parts is (PARTS, ROWS, D). See `normalized_product`."""
    program = tl.program_id(0)
    part = program % constants.PARTS
    row_M, _block, column_C = own_block(program // constants.PARTS, constants)
    exists_C = column_C < constants.D
    output_MC = normalized_product(y, squares, weight, weight_scale, part, row_M, column_C, exists_C, constants)
    store_part(parts, output_MC, part, row_M, column_C, exists_C, constants.D, constants)


@triton.jit
@no_type_check
def normalized_product(y, squares, weight, weight_scale, part, row_M, column_C, exists_C, constants: tl.constexpr):
    """(M, C), a part of the product of y with columns of a matrix: it takes its part of each group of channels.

    y (ROWS, E) is scaled and rounded already, and here divided by the root mean square of each group of channels, whose
    squares come in sums (ROWS, SQUARES) for parts of heads.
    """
    is_row_M1 = (row_M < constants.ROWS)[:, None]
    unit_U = tl.arange(0, constants.U)
    output_MC = tl.full((constants.M, constants.COLUMNS), 0.0, tl.float32)
    for group in tl.range(0, constants.groups):
        place_MU = row_M[:, None] * constants.SQUARES + group * constants.squares + unit_U[None]
        mask_MU = is_row_M1 & (unit_U < constants.squares)[None]
        squares_M = tl.sum(tl.load(squares + place_MU, mask=mask_MU, other=0.0), axis=1)
        reciprocal_M = tl.rsqrt(squares_M / constants.GROUP + constants.EPS)
        first = group * constants.GROUP
        sum_MC = sum_of_products(
            y,
            weight,
            weight_scale,
            row_M,
            column_C,
            exists_C,
            first + part * constants.steps * constants.DEPTH,
            first + constants.GROUP,
            constants.steps,
            constants.E,
            constants.E,
            constants,
        )
        output_MC += sum_MC * reciprocal_M[:, None]
    return output_MC
