"""Division and rounding of whole numbers upwards."""


def ceil_div(number: int, divisor: int) -> int:
    """`number / divisor`, rounded up to a whole number."""
    return -(-number // divisor)


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `number`."""
    return ceil_div(number, multiple) * multiple
