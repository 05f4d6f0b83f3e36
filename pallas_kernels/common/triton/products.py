"""Parts of kernels that stream a matrix past a few rows; import only where triton is installed.

A program owns a block of columns and all rows, at most M, and walks over the sum; what it adds up is float32. A matrix
may lie by rows, (terms, columns), or by columns, (columns, terms): then a program reads one piece of memory. Suffixes
spell shapes: M rows, C columns of a block, K terms of the sum.
"""

# Triton compiles what only looks like Python, and need not be installed.
# pyrefly: ignore-errors
from typing import no_type_check

import triton
import triton.language as tl

# Terms of a column that a thread loads at once: 16 bytes of bfloat16. It adds them up before it keeps the sum.
VECTOR = tl.constexpr(8)


@triton.jit
@no_type_check
def load_operand(pointer, row_M, term_K, last, STRIDE: tl.constexpr, constants: tl.constexpr):
    """(M, K) of an array (ROWS, STRIDE), zeros beyond the rows and from the term `last` on."""
    mask = (row_M < constants.ROWS)[:, None] & (term_K < last)[None]
    return tl.load(pointer + row_M[:, None] * STRIDE + term_K[None], mask=mask, other=0.0)


@triton.jit
@no_type_check
def load_weight(
    pointer, term_K, last, column_C, exists_C, TERMS: tl.constexpr, TOTAL: tl.constexpr, constants: tl.constexpr
):
    """(C, K) of a matrix of TOTAL columns that lies by columns, (K, C) of one that lies by rows.

    By columns it is read as what no other program will read, which leaves the cache to what all of them do.
    """
    if constants.BY_COLUMN:
        mask = exists_C[:, None] & (term_K < last)[None]
        place = column_C[:, None] * TERMS + term_K[None]
        loaded = tl.load(pointer + place, mask=mask, other=0.0, eviction_policy="evict_first")
    else:
        mask = (term_K < last)[:, None] & exists_C[None]
        loaded = tl.load(pointer + term_K[:, None] * TOTAL + column_C[None], mask=mask, other=0.0)
    return loaded


@triton.jit
@no_type_check
def begin_sum(constants: tl.constexpr):
    """Zeros for `add_products`: (C, K / 8) if products of one row are added term by term, and else (M, C)."""
    if constants.BY_COLUMN and constants.M == 1:
        zeros = tl.full((constants.COLUMNS, constants.DEPTH // VECTOR), 0.0, tl.float32)
    else:
        zeros = tl.full((constants.M, constants.COLUMNS), 0.0, tl.float32)
    return zeros


@triton.jit
@no_type_check
def add_products(x_MK, weight, total, constants: tl.constexpr):
    """`total` from `begin_sum` and the products of these terms, with a weight from `load_weight`."""
    if constants.BY_COLUMN and constants.M == 1:
        products = weight.to(tl.float32) * x_MK.to(tl.float32)
        products = tl.reshape(products, (constants.COLUMNS, constants.DEPTH // VECTOR, VECTOR))
        total += tl.sum(products, axis=2)
    elif constants.BY_COLUMN:
        total = tl.dot(x_MK, tl.trans(weight), total, input_precision="ieee")
    else:
        total = tl.dot(x_MK, weight, total, input_precision="ieee")
    return total


@triton.jit
@no_type_check
def finish_sum(total, constants: tl.constexpr):
    """(M, C)."""
    if constants.BY_COLUMN and constants.M == 1:
        total = tl.sum(total, axis=1)[None]
    return total


@triton.jit
@no_type_check
def sum_of_products(
    x,
    weight,
    row_M,
    column_C,
    first,
    last,
    steps,
    TERMS: tl.constexpr,
    TOTAL: tl.constexpr,
    constants: tl.constexpr,
):
    """(M, C): the terms from `first` to `last` of the product of x (ROWS, TERMS) with a matrix of TOTAL columns."""
    total = begin_sum(constants)
    for step in tl.range(0, steps, num_stages=constants.STAGES):
        term_K = first + step * constants.DEPTH + tl.arange(0, constants.DEPTH)
        x_MK = load_operand(x, row_M, term_K, last, TERMS, constants)
        weight_ = load_weight(weight, term_K, last, column_C, column_C < TOTAL, TERMS, TOTAL, constants)
        total = add_products(x_MK, weight_, total, constants)
    return finish_sum(total, constants)


@triton.jit
@no_type_check
def product_of_normalized(
    residual,
    norm_scale,
    weight,
    row_M,
    column_C,
    exists_C,
    TERMS: tl.constexpr,
    TOTAL: tl.constexpr,
    constants: tl.constexpr,
):
    """(M, C) in float32: the residual stream over its root mean square, scaled, times a matrix (TERMS, TOTAL).

    The scaled stream is rounded before it is divided by its root mean square, which is known only once the sum is
    complete.
    """
    total = begin_sum(constants)
    squares_MK = tl.full((constants.M, constants.DEPTH), 0.0, tl.float32)
    for first in tl.range(0, TERMS, constants.DEPTH, num_stages=constants.STAGES):
        term_K = first + tl.arange(0, constants.DEPTH)
        residual_MK = load_operand(residual, row_M, term_K, TERMS, TERMS, constants).to(tl.float32)
        scale_K = tl.load(norm_scale + term_K, mask=term_K < TERMS, other=0.0).to(tl.float32)
        weight_ = load_weight(weight, term_K, TERMS, column_C, exists_C, TERMS, TOTAL, constants)
        squares_MK += residual_MK * residual_MK
        scaled_MK = (residual_MK * scale_K[None]).to(weight_.dtype)
        total = add_products(scaled_MK, weight_, total, constants)
    reciprocal_M = tl.rsqrt(tl.sum(squares_MK, axis=1) / TERMS + constants.EPS)
    return finish_sum(total, constants) * reciprocal_M[:, None]
