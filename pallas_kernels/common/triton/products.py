"""Kernels that stream a matrix past rows, and parts of such; import only where triton is installed.

A program owns a block of columns and M rows, and walks over the sum or a part of it; what it adds up is float32.
Matrices lie by columns, (columns, terms), so that a program reads one piece of memory. Suffixes spell shapes: M rows, C
columns of a block, K terms of the sum.
"""

# Triton compiles what only looks like Python, and need not be installed.
# pyrefly: ignore-errors
from typing import no_type_check

import triton
import triton.language as tl

# Bits that a thread loads of a column at once. It adds the products of these terms up before it keeps the sum.
VECTOR_BITS = tl.constexpr(128)


@triton.jit
@no_type_check
def own_block(program, constants: tl.constexpr):
    """Rows (M,), the block of columns and these (C,) of a program: those of the same columns follow each other."""
    row_M = program % constants.row_blocks * constants.M + tl.arange(0, constants.M)
    block = program // constants.row_blocks
    return row_M, block, block * constants.COLUMNS + tl.arange(0, constants.COLUMNS)


@triton.jit
@no_type_check
def load_operand(pointer, row_M, term_K, last, STRIDE: tl.constexpr, constants: tl.constexpr):
    """(M, K) of an array (ROWS, STRIDE), zeros beyond the rows and from the term `last` on."""
    mask = (row_M < constants.ROWS)[:, None] & (term_K < last)[None]
    return tl.load(pointer + row_M[:, None] * STRIDE + term_K[None], mask=mask, other=0.0)


@triton.jit
@no_type_check
def load_weight(pointer, term_K, last, column_C, exists_C, TERMS: tl.constexpr):
    """(C, K) of a matrix of TERMS terms, read as what no other program will read: the cache is for what all do."""
    mask = exists_C[:, None] & (term_K < last)[None]
    place = column_C[:, None] * TERMS + term_K[None]
    return tl.load(pointer + place, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
@no_type_check
def begin_sum(weight, constants: tl.constexpr):
    """Zeros for `add_products`: (C, K / V) if products of one row are added V terms at a time, and else (M, C)."""
    if constants.M == 1:
        VECTOR: tl.constexpr = VECTOR_BITS // weight.dtype.element_ty.primitive_bitwidth
        zeros = tl.full((constants.COLUMNS, constants.DEPTH // VECTOR), 0.0, tl.float32)
    else:
        zeros = tl.full((constants.M, constants.COLUMNS), 0.0, tl.float32)
    return zeros


@triton.jit
@no_type_check
def add_products(x_MK, weight_CK, total, constants: tl.constexpr):
    """`total` from `begin_sum` and the products of these terms."""
    if constants.M == 1:
        products = weight_CK.to(tl.float32) * x_MK.to(tl.float32)
        VECTOR: tl.constexpr = VECTOR_BITS // weight_CK.dtype.primitive_bitwidth
        products = tl.reshape(products, (constants.COLUMNS, constants.DEPTH // VECTOR, VECTOR))
        total += tl.sum(products, axis=2)
    else:
        total = tl.dot(x_MK, tl.trans(as_factor(weight_CK, x_MK.dtype)), total, input_precision="ieee")
    return total


@triton.jit
@no_type_check
def as_factor(weight, dtype: tl.constexpr):
    """Weights as matrix units take them: integers of 8 bits are exact in any float."""
    if weight.dtype == tl.int8:
        weight = weight.to(tl.float32).to(dtype)
    return weight


@triton.jit
@no_type_check
def finish_sum(total, weight, scale, column_C, exists_C, constants: tl.constexpr):
    """(M, C), times the scales of a matrix in int8."""
    if constants.M == 1:
        total = tl.sum(total, axis=1)[None]
    return scaled(total, weight, scale, column_C, exists_C)


@triton.jit
@no_type_check
def scaled(sum_MC, weight, scale, column_C, exists_C):
    """A product with a matrix, times the scales of its columns if it is int8."""
    if weight.dtype.element_ty == tl.int8:
        sum_MC *= tl.load(scale + column_C, mask=exists_C, other=0.0)[None]
    return sum_MC


@triton.jit
@no_type_check
def sum_of_products(
    x,
    weight,
    scale,
    row_M,
    column_C,
    exists_C,
    first,
    last,
    steps,
    STRIDE: tl.constexpr,
    TERMS: tl.constexpr,
    constants: tl.constexpr,
):
    """(M, C): the terms from `first` to `last` of the product of x (ROWS, STRIDE) with columns of a matrix of TERMS."""
    total = begin_sum(weight, constants)
    for step in tl.range(0, steps, num_stages=constants.STAGES):
        term_K = first + step * constants.DEPTH + tl.arange(0, constants.DEPTH)
        x_MK = load_operand(x, row_M, term_K, last, STRIDE, constants)
        weight_CK = load_weight(weight, term_K, last, column_C, exists_C, TERMS)
        total = add_products(x_MK, weight_CK, total, constants)
    return finish_sum(total, weight, scale, column_C, exists_C, constants)


@triton.jit
@no_type_check
def product_of_stream(
    stream,
    norm_scale,
    weight,
    scale,
    row_M,
    column_C,
    exists_C,
    TERMS: tl.constexpr,
    dtype: tl.constexpr,
    constants: tl.constexpr,
):
    """(M, C) in float32: the normalised residual stream times columns of a matrix.

    One row comes as it is, (1, TERMS), and is normalised on the way; it is scaled and rounded before it is divided by
    its root mean square, which is known only once the sum is complete. More rows come from `normalize`. dtype is what
    is rounded to.
    """
    if constants.M == 1:
        total = begin_sum(weight, constants)
        squares_MK = tl.full((constants.M, constants.DEPTH), 0.0, tl.float32)
        for first in tl.range(0, TERMS, constants.DEPTH, num_stages=constants.STAGES):
            term_K = first + tl.arange(0, constants.DEPTH)
            residual_MK = load_operand(stream, row_M, term_K, TERMS, TERMS, constants).to(tl.float32)
            scale_K = tl.load(norm_scale + term_K, mask=term_K < TERMS, other=0.0).to(tl.float32)
            weight_CK = load_weight(weight, term_K, TERMS, column_C, exists_C, TERMS)
            squares_MK += residual_MK * residual_MK
            scaled_MK = (residual_MK * scale_K[None]).to(dtype)
            total = add_products(scaled_MK, weight_CK, total, constants)
        reciprocal_M = tl.rsqrt(tl.sum(squares_MK, axis=1) / TERMS + constants.EPS)
        product_MC = finish_sum(total, weight, scale, column_C, exists_C, constants) * reciprocal_M[:, None]
    else:
        STEPS: tl.constexpr = (TERMS + constants.DEPTH - 1) // constants.DEPTH
        product_MC = sum_of_products(
            stream, weight, scale, row_M, column_C, exists_C, 0, TERMS, STEPS, TERMS, TERMS, constants
        )
    return product_MC


@triton.jit
@no_type_check
def normalize(residual, norm_scale, normalized, constants: tl.constexpr):
    """The residual stream (ROWS, D) over its root mean square, scaled and rounded, a row a program."""
    row = tl.program_id(0)
    term_K = tl.arange(0, constants.WIDTH)
    exists_K = term_K < constants.D
    residual_K = tl.load(residual + row * constants.D + term_K, mask=exists_K, other=0.0)
    scale_K = tl.load(norm_scale + term_K, mask=exists_K, other=0.0).to(tl.float32)
    reciprocal = tl.rsqrt(tl.sum(residual_K * residual_K) / constants.D + constants.EPS)
    normalized_K = (residual_K * reciprocal * scale_K).to(normalized.dtype.element_ty)
    tl.store(normalized + row * constants.D + term_K, normalized_K, mask=exists_K)


@triton.jit
@no_type_check
def multiply_in_parts(x, weight, weight_scale, parts, constants: tl.constexpr):
    """A part of the sum of a product of x (ROWS, TERMS), for a block of columns: parts is (PARTS, ROWS, CHANNELS)."""
    program = tl.program_id(0)
    part = program % constants.PARTS
    row_M, _block, column_C = own_block(program // constants.PARTS, constants)
    exists_C = column_C < constants.CHANNELS
    first = part * constants.steps * constants.DEPTH
    sum_MC = sum_of_products(
        x,
        weight,
        weight_scale,
        row_M,
        column_C,
        exists_C,
        first,
        constants.TERMS,
        constants.steps,
        constants.TERMS,
        constants.TERMS,
        constants,
    )
    store_part(parts, sum_MC, part, row_M, column_C, exists_C, constants.CHANNELS, constants)


@triton.jit
@no_type_check
def store_part(parts, sum_MC, part, row_M, column_C, exists_C, CHANNELS: tl.constexpr, constants: tl.constexpr):
    """Stores a block of a part of a product into (PARTS, ROWS, CHANNELS)."""
    place_MC = (part * constants.ROWS + row_M[:, None]) * CHANNELS + column_C[None]
    tl.store(parts + place_MC, sum_MC, mask=(row_M < constants.ROWS)[:, None] & exists_C[None])


@triton.jit
@no_type_check
def sum_parts(parts, total, constants: tl.constexpr):
    """A product (ROWS, CHANNELS) of its parts, rounded, for a row and a block of columns a program."""
    place_C, exists_C = own_columns(constants)
    sum_C = sum_of_parts(parts, place_C, exists_C, constants)
    tl.store(total + place_C, sum_C.to(total.dtype.element_ty), mask=exists_C)


@triton.jit
@no_type_check
def add_to_residual(residual, parts, new_residual, constants: tl.constexpr):
    """The residual stream (ROWS, CHANNELS) and a product in parts, in place of the residual stream."""
    place_C, exists_C = own_columns(constants)
    residual_C = tl.load(residual + place_C, mask=exists_C, other=0.0)
    sum_C = sum_of_parts(parts, place_C, exists_C, constants)
    # Rounded as the layer's output is.
    if constants.IS_BFLOAT16:
        sum_C = sum_C.to(tl.bfloat16).to(tl.float32)
    tl.store(new_residual + place_C, residual_C + sum_C, mask=exists_C)


@triton.jit
@no_type_check
def own_columns(constants: tl.constexpr):
    """Places (C,) of this program's columns in an array (ROWS, CHANNELS), and which of them exist."""
    program = tl.program_id(0)
    column_C = program % constants.blocks * constants.COLUMNS + tl.arange(0, constants.COLUMNS)
    return program // constants.blocks * constants.CHANNELS + column_C, column_C < constants.CHANNELS


@triton.jit
@no_type_check
def sum_of_parts(parts, place_C, exists_C, constants: tl.constexpr):
    """(C,), the sum of parts (PARTS, ROWS, CHANNELS), first to last."""
    sum_C = tl.full((constants.COLUMNS,), 0.0, tl.float32)
    PARTS: tl.constexpr = constants.PARTS
    for part in tl.static_range(PARTS):
        sum_C += tl.load(parts + part * constants.ROWS * constants.CHANNELS + place_C, mask=exists_C, other=0.0)
    return sum_C
