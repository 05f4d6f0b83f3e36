"""Kernels of the Mamba-1 step that stream a matrix past a few rows; import only where triton is installed.

A program owns a block of columns and all rows, at most M, and walks over the sum; what it adds up is float32. Suffixes
spell shapes: M rows, C columns of a block, which are channels in the in-projection, K terms of the sum, T taps, S
columns of the x-projection.
"""

# Triton compiles what only looks like Python, and need not be installed.
# pyrefly: ignore-errors
from typing import no_type_check

import triton
import triton.language as tl

from pallas_kernels.selective_scan.triton.equations import sigmoid


@triton.jit
@no_type_check
def load_operand(pointer, row_M, term_K, last, STRIDE: tl.constexpr, constants: tl.constexpr):
    """(M, K) of an array (ROWS, STRIDE), zeros beyond the rows and from the term `last` on."""
    mask = (row_M < constants.ROWS)[:, None] & (term_K < last)[None]
    return tl.load(pointer + row_M[:, None] * STRIDE + term_K[None], mask=mask, other=0.0)


@triton.jit
@no_type_check
def load_weight(pointer, term_K, last, column_C, exists_C, STRIDE: tl.constexpr):
    """(K, C) of a matrix whose rows are STRIDE long."""
    mask = (term_K < last)[:, None] & exists_C[None]
    return tl.load(pointer + term_K[:, None] * STRIDE + column_C[None], mask=mask, other=0.0)


@triton.jit
@no_type_check
def project_in(
    residual,
    norm_scale,
    weight,
    conv_weight,
    conv_bias,
    window,
    x_proj,
    x,
    z,
    new_window,
    parts,
    constants: tl.constexpr,
):
    """Norm, in-projection, convolution and SiLU: programs count blocks of x first, then those of z.

    Writes x and z (ROWS, E), and the window in place of the old one. The scaled residual stream is rounded before it is
    divided by its root mean square, which is known only once the sum is complete. With HAS_SELECTION parts is
    (blocks, ROWS, R + 2 N), the x-projection of each block's channels.
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
    window_MTC = load_window(window, row_M, channel_C, convolved_C, constants)
    taps_C = window_sum(window_MTC, conv_weight, conv_bias, channel_C, convolved_C, constants)
    if constants.HAS_SELECTION:
        selection_S = tl.arange(0, constants.SELECTION)
        mask_CS = convolved_C[:, None] & (selection_S < constants.selection)[None]
        matrix_CS = x_proj + channel_C[:, None] * constants.selection + selection_S[None]
        x_proj_CS = tl.load(matrix_CS, mask=mask_CS, other=0.0)

    sum_MC = tl.full((constants.M, constants.COLUMNS), 0.0, tl.float32)
    squares_MK = tl.full((constants.M, constants.DEPTH), 0.0, tl.float32)
    for first in tl.range(0, constants.D, constants.DEPTH):
        term_K = first + tl.arange(0, constants.DEPTH)
        residual_MK = load_operand(residual, row_M, term_K, constants.D, constants.D, constants).to(tl.float32)
        scale_K = tl.load(norm_scale + term_K, mask=term_K < constants.D, other=0.0).to(tl.float32)
        weight_KC = load_weight(weight, term_K, constants.D, column_C, exists_C, 2 * constants.E)
        squares_MK += residual_MK * residual_MK
        scaled_MK = (residual_MK * scale_K[None]).to(weight_KC.dtype)
        sum_MC = tl.dot(scaled_MK, weight_KC, sum_MC, input_precision="ieee")
    reciprocal_M = tl.rsqrt(tl.sum(squares_MK, axis=1) / constants.D + constants.EPS)
    value_MC = (sum_MC * reciprocal_M[:, None]).to(x.dtype.element_ty)

    place_MC = row_M[:, None] * constants.E + channel_C[None]
    is_row_M1 = (row_M < constants.ROWS)[:, None]
    if is_gate:
        tl.store(z + place_MC, value_MC, mask=is_row_M1 & exists_C[None])
    else:
        x_MC = finish_convolution(taps_C, value_MC, conv_weight, channel_C, exists_C, constants)
        tl.store(x + place_MC, x_MC, mask=is_row_M1 & exists_C[None])
        store_window(new_window, window_MTC, value_MC, row_M, channel_C, exists_C, constants)
        if constants.HAS_SELECTION:
            part_MS = tl.dot(x_MC, x_proj_CS, input_precision="ieee")
            place_MS = (block * constants.ROWS + row_M[:, None]) * constants.selection + selection_S[None]
            tl.store(parts + place_MS, part_MS, mask=is_row_M1 & (selection_S < constants.selection)[None])


@triton.jit
@no_type_check
def convolve(xz, conv_weight, conv_bias, window, x, new_window, constants: tl.constexpr):
    """Convolution and SiLU of the first half of xz (ROWS, 2 E), for M rows and a block of channels a program."""
    program = tl.program_id(0)
    row_M = program // constants.blocks * constants.M + tl.arange(0, constants.M)
    channel_C = program % constants.blocks * constants.COLUMNS + tl.arange(0, constants.COLUMNS)
    exists_C = channel_C < constants.E
    mask_MC = (row_M < constants.ROWS)[:, None] & exists_C[None]
    value_MC = tl.load(xz + row_M[:, None] * (2 * constants.E) + channel_C[None], mask=mask_MC, other=0.0)
    window_MTC = load_window(window, row_M, channel_C, exists_C, constants)
    taps_MC = window_sum(window_MTC, conv_weight, conv_bias, channel_C, exists_C, constants)
    x_MC = finish_convolution(taps_MC, value_MC, conv_weight, channel_C, exists_C, constants)
    tl.store(x + row_M[:, None] * constants.E + channel_C[None], x_MC, mask=mask_MC)
    store_window(new_window, window_MTC, value_MC, row_M, channel_C, exists_C, constants)


@triton.jit
@no_type_check
def load_window(window, row_M, channel_C, exists_C, constants: tl.constexpr):
    """(M, T, C), the last K - 1 inputs of the convolution, oldest first."""
    place_MTC, mask_MTC, tap_1T1 = window_place(row_M, channel_C, exists_C, constants)
    return tl.load(window + place_MTC, mask=mask_MTC & (tap_1T1 < constants.K - 1), other=0.0)


@triton.jit
@no_type_check
def window_place(row_M, channel_C, exists_C, constants: tl.constexpr):
    """Offsets into a window (ROWS, K - 1, E), whether row and channel exist, and the taps (1, T, 1)."""
    tap_1T1 = tl.arange(0, constants.TAPS)[None, :, None]
    place_MTC = (row_M[:, None, None] * (constants.K - 1) + tap_1T1) * constants.E + channel_C[None, None]
    return place_MTC, (row_M < constants.ROWS)[:, None, None] & exists_C[None, None], tap_1T1


@triton.jit
@no_type_check
def window_sum(window_MTC, conv_weight, conv_bias, channel_C, exists_C, constants: tl.constexpr):
    """(M, C): the bias, and what the convolution adds up of the window."""
    tap_T = tl.arange(0, constants.TAPS)
    mask_TC = (tap_T < constants.K - 1)[:, None] & exists_C[None]
    weight_TC = tl.load(conv_weight + tap_T[:, None] * constants.E + channel_C[None], mask=mask_TC, other=0.0)
    bias_C = tl.load(conv_bias + channel_C, mask=exists_C, other=0.0).to(tl.float32)
    return tl.sum(window_MTC.to(tl.float32) * weight_TC.to(tl.float32)[None], axis=1) + bias_C[None]


@triton.jit
@no_type_check
def finish_convolution(taps_MC, value_MC, conv_weight, channel_C, exists_C, constants: tl.constexpr):
    """SiLU of the convolution, with the current token's input `value_MC`."""
    last = conv_weight + (constants.K - 1) * constants.E
    weight_C = tl.load(last + channel_C, mask=exists_C, other=0.0).to(tl.float32)
    sum_MC = taps_MC + value_MC.to(tl.float32) * weight_C[None]
    return (sum_MC * sigmoid(sum_MC)).to(value_MC.dtype)


@triton.jit
@no_type_check
def store_window(new_window, window_MTC, value_MC, row_M, channel_C, exists_C, constants: tl.constexpr):
    """The window a token later, in place of the window it was loaded from."""
    place_MTC, mask_MTC, tap_1T1 = window_place(row_M, channel_C, exists_C, constants)
    # A place is written by another thread than the one that read it.
    tl.debug_barrier()
    is_kept_MTC = mask_MTC & (tap_1T1 >= 1) & (tap_1T1 < constants.K - 1)
    tl.store(new_window + place_MTC - constants.E, window_MTC, mask=is_kept_MTC)
    if constants.K > 1:
        place_MC = (row_M[:, None] * (constants.K - 1) + constants.K - 2) * constants.E + channel_C[None]
        tl.store(new_window + place_MC, value_MC, mask=(row_M < constants.ROWS)[:, None] & exists_C[None])


@triton.jit
@no_type_check
def sum_of_products(x, weight, row_M, column_C, first, STRIDE: tl.constexpr, constants: tl.constexpr):
    """(M, C): the terms of a part, from `first` on, of the product of x (ROWS, E) with a matrix (E, STRIDE)."""
    sum_MC = tl.full((constants.M, constants.COLUMNS), 0.0, tl.float32)
    for step in tl.range(0, constants.steps):
        term_K = first + step * constants.DEPTH + tl.arange(0, constants.DEPTH)
        x_MK = load_operand(x, row_M, term_K, constants.E, constants.E, constants)
        weight_KC = load_weight(weight, term_K, constants.E, column_C, column_C < STRIDE, STRIDE)
        sum_MC = tl.dot(x_MK, weight_KC, sum_MC, input_precision="ieee")
    return sum_MC


@triton.jit
@no_type_check
def project_selection(x, weight, parts, constants: tl.constexpr):
    """A part of the sum of the x-projection for a block of columns: parts is (PARTS, ROWS, R + 2 N)."""
    program = tl.program_id(0)
    part = program % constants.PARTS
    row_M = tl.arange(0, constants.M)
    column_C = program // constants.PARTS * constants.COLUMNS + tl.arange(0, constants.COLUMNS)
    first = part * constants.steps * constants.DEPTH
    sum_MC = sum_of_products(x, weight, row_M, column_C, first, constants.selection, constants)
    place_MC = (part * constants.ROWS + row_M[:, None]) * constants.selection + column_C[None]
    mask_MC = (row_M < constants.ROWS)[:, None] & (column_C < constants.selection)[None]
    tl.store(parts + place_MC, sum_MC, mask=mask_MC)


@triton.jit
@no_type_check
def project_out(residual, y, weight, new_residual, constants: tl.constexpr):
    """The residual stream and the out-projection, for a block of columns, in place of the residual stream."""
    row_M = tl.arange(0, constants.M)
    column_C = tl.program_id(0) * constants.COLUMNS + tl.arange(0, constants.COLUMNS)
    place_MC = row_M[:, None] * constants.D + column_C[None]
    mask_MC = (row_M < constants.ROWS)[:, None] & (column_C < constants.D)[None]
    residual_MC = tl.load(residual + place_MC, mask=mask_MC, other=0.0)
    sum_MC = sum_of_products(y, weight, row_M, column_C, 0, constants.D, constants)
    # Rounded as the layer's output is.
    output_MC = sum_MC.to(weight.dtype.element_ty).to(residual_MC.dtype)
    tl.store(new_residual + place_MC, residual_MC + output_MC, mask=mask_MC)
