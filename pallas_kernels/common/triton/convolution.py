"""A short causal convolution of one token and its window, for some channels; import only where triton is installed.

Suffixes spell shapes: M rows, T taps, C channels of a block. TOTAL is the number of all channels; constants have ROWS,
the K taps, and TAPS, K - 1 of them as a power of two.
"""

# Triton compiles what only looks like Python, and need not be installed.
# pyrefly: ignore-errors
from typing import no_type_check

import triton
import triton.language as tl

from pallas_kernels.selective_scan.triton.equations import sigmoid


@triton.jit
@no_type_check
def load_window(window, row_M, channel_C, exists_C, TOTAL: tl.constexpr, constants: tl.constexpr):
    """(M, T, C), the last K - 1 inputs of the convolution, oldest first."""
    place_MTC, mask_MTC, tap_1T1 = window_place(row_M, channel_C, exists_C, TOTAL, constants)
    return tl.load(window + place_MTC, mask=mask_MTC & (tap_1T1 < constants.K - 1), other=0.0)


@triton.jit
@no_type_check
def window_place(row_M, channel_C, exists_C, TOTAL: tl.constexpr, constants: tl.constexpr):
    """Offsets into a window (ROWS, K - 1, TOTAL), whether row and channel exist, and the taps (1, T, 1)."""
    tap_1T1 = tl.arange(0, constants.TAPS)[None, :, None]
    place_MTC = (row_M[:, None, None] * (constants.K - 1) + tap_1T1) * TOTAL + channel_C[None, None]
    return place_MTC, (row_M < constants.ROWS)[:, None, None] & exists_C[None, None], tap_1T1


@triton.jit
@no_type_check
def window_sum(window_MTC, conv_weight, channel_C, exists_C, TOTAL: tl.constexpr, constants: tl.constexpr):
    """(M, C), what the convolution adds up of the window."""
    tap_T = tl.arange(0, constants.TAPS)
    mask_TC = (tap_T < constants.K - 1)[:, None] & exists_C[None]
    weight_TC = tl.load(conv_weight + tap_T[:, None] * TOTAL + channel_C[None], mask=mask_TC, other=0.0)
    return tl.sum(window_MTC.to(tl.float32) * weight_TC.to(tl.float32)[None], axis=1)


@triton.jit
@no_type_check
def finish_convolution(
    taps_MC, value_MC, conv_weight, conv_bias, channel_C, TOTAL: tl.constexpr, constants: tl.constexpr
):
    """SiLU of the convolution: of the sum of the window, the bias, and the current token's input `value_MC`."""
    exists_C = channel_C < TOTAL
    bias_C = tl.load(conv_bias + channel_C, mask=exists_C, other=0.0).to(tl.float32)
    last = conv_weight + (constants.K - 1) * TOTAL
    weight_C = tl.load(last + channel_C, mask=exists_C, other=0.0).to(tl.float32)
    sum_MC = taps_MC + bias_C[None] + value_MC.to(tl.float32) * weight_C[None]
    return (sum_MC * sigmoid(sum_MC)).to(value_MC.dtype)


@triton.jit
@no_type_check
def store_window(new_window, window_MTC, value_MC, row_M, channel_C, TOTAL: tl.constexpr, constants: tl.constexpr):
    """The window a token later, in place of the window it was loaded from."""
    exists_C = channel_C < TOTAL
    place_MTC, mask_MTC, tap_1T1 = window_place(row_M, channel_C, exists_C, TOTAL, constants)
    # A place is written by another thread than the one that read it.
    tl.debug_barrier()
    is_kept_MTC = mask_MTC & (tap_1T1 >= 1) & (tap_1T1 < constants.K - 1)
    tl.store(new_window + place_MTC - TOTAL, window_MTC, mask=is_kept_MTC)
    if constants.K > 1:
        place_MC = (row_M[:, None] * (constants.K - 1) + constants.K - 2) * TOTAL + channel_C[None]
        tl.store(new_window + place_MC, value_MC, mask=(row_M < constants.ROWS)[:, None] & exists_C[None])


@triton.jit
@no_type_check
def sum_and_shift(window, value_MC, conv_weight, row_M, channel_C, TOTAL: tl.constexpr, constants: tl.constexpr):
    """(M, C), what the convolution adds up of the window, which becomes that of a token later; a tap at a time."""
    exists_C = channel_C < TOTAL
    mask_MC = (row_M < constants.ROWS)[:, None] & exists_C[None]
    PAST: tl.constexpr = constants.K - 1
    place_MC = row_M[:, None] * (PAST * TOTAL) + channel_C[None]
    taps_MC = tl.full(value_MC.shape, 0.0, tl.float32)
    for tap in tl.static_range(PAST):
        past_MC = tl.load(window + place_MC + tap * TOTAL, mask=mask_MC, other=0.0)
        weight_C = tl.load(conv_weight + tap * TOTAL + channel_C, mask=exists_C, other=0.0).to(tl.float32)
        taps_MC += past_MC.to(tl.float32) * weight_C[None]
        if tap > 0:
            # A place may be written by another thread than the one that read it.
            tl.debug_barrier()
            tl.store(window + place_MC + (tap - 1) * TOTAL, past_MC, mask=mask_MC)
    if PAST > 0:
        tl.debug_barrier()
        tl.store(window + place_MC + (PAST - 1) * TOTAL, value_MC, mask=mask_MC)
    return taps_MC
