"""Division and rounding of sizes upwards."""

from pallas_kernels.common.array_types import Size


def ceil_div(size: Size, divisor: int) -> Size:
    """`size / divisor`, rounded up to a whole number."""
    return -(-size // divisor)


def round_up(size: Size, multiple: int) -> Size:
    """The smallest multiple of `multiple` that is at least `size`."""
    return ceil_div(size, multiple) * multiple
