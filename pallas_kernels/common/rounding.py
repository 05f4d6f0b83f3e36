"""Division and rounding of sizes upwards."""

from pallas_kernels.common.array_types import Size


def ceil_div(size: Size, divisor: int) -> Size:
    """`size / divisor`, rounded up to a whole number."""
    return -(-size // divisor)


def round_up(size: Size, multiple: int) -> Size:
    """The smallest multiple of `multiple` that is at least `size`."""
    return ceil_div(size, multiple) * multiple


def round_to_few(size: int, *, least: int) -> int:
    """The first of least, 1.5 least, 2 least, 3 least, 4 least, ... that is at least `size`: two for each doubling.

    Rows that are padded to these sizes need few programs, and are at most half as long again as they were.

    Args:
        size: of a row.
        least: the first size, an even number.
    """
    power = least
    while power < size:
        power *= 2
    return power // 4 * 3 if power > least and size <= power // 4 * 3 else power
