"""Patterns of layers: what "(MMMA)*6" spells out, and the units that repeat in a list of layers."""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from mamba_jax.config_base import require
from mamba_jax.errors import short

_TOKEN = re.compile(r"\s*([A-Za-z]|\(|\)|\*\s*\d+)")
# More letters than the deepest models have layers: longer than this, a pattern is a slip in a number.
_MOST_LETTERS = 10_000


def spelled_out[T](pattern: str, layers: Mapping[str, T]) -> list[T]:
    """The layers that a pattern stands for, in order.

    A pattern is a row of letters and of patterns in parentheses; `*` and a number after one of them repeats it:
    "(MMMA)*6", "M*2(AF)*3".

    Args:
        pattern: the text.
        layers: what each letter stands for.

    Raises:
        InputError: the text is no pattern, or has a letter that stands for nothing; one line.
    """
    open_rows: list[list[str]] = [[]]
    last: list[str] = []
    position = 0
    while position < len(pattern.rstrip()):
        token = _TOKEN.match(pattern, position)
        require(token is not None, f"pattern {short(pattern)}: {pattern[position:].strip()[0]!r} has no meaning there")
        assert token is not None
        position, sign = token.end(), token[1]
        if sign == "(":
            open_rows.append([])
            last = []
        elif sign[0] == "*":
            require(len(last) > 0, f"pattern {short(pattern)}: {sign!r} follows neither a letter nor a parenthesis")
            times = int(sign[1:])
            require(
                0 < times * len(last) <= _MOST_LETTERS,
                f"pattern {short(pattern)}: {sign!r} makes {times * len(last)} layers, not 1 to {_MOST_LETTERS}",
            )
            open_rows[-1] += last * (times - 1)
            last = []
        else:
            require(sign != ")" or len(open_rows) > 1, f"pattern {short(pattern)}: a ')' has no '('")
            last = open_rows.pop() if sign == ")" else [sign]
            open_rows[-1] += last
    require(len(open_rows) == 1, f"pattern {short(pattern)}: a '(' has no ')'")
    (letters,) = open_rows
    unknown = sorted(set(letters) - set(layers))
    require(
        not unknown,
        f"pattern {short(pattern)}: {', '.join(unknown)} stands for no layer: give one, or use "
        f"{', '.join(sorted(layers))}",
    )
    return [layers[letter] for letter in letters]


def repeating_units[T](layers: Sequence[T]) -> list[tuple[tuple[T, ...], int]]:
    """The layers as units with their repeats, such that the units together have the fewest layers.

    Layers that repeat are compiled once. Of equal choices the one with the fewest units is taken, and of these the one
    whose last unit is the shortest.

    Args:
        layers: in order; equal ones are told by `==`.

    Returns:
        Units in order, each as its layers and how often they come.
    """
    numbers = np.array([layers.index(layer) for layer in layers])
    # For each size, how many of the last layers are equal to those that stand so many before them.
    equal = np.zeros(len(layers) + 1, int)
    # For the first `end` layers: how many layers the units have, how many units there are, and the last of them.
    best: list[tuple[int, int, tuple[int, int]]] = [(0, 0, (0, 0))]
    for end in range(1, len(layers) + 1):
        equal[1:end] = (equal[1:end] + 1) * (numbers[end - 1] == numbers[: end - 1][::-1])
        fewest, choices = end, []
        for size in range(1, end + 1):
            if size > fewest:
                break
            for start in range(end - size, end - size - int(equal[size]) - 1, -size):
                compiled, count, _ = best[start]
                if compiled + size <= fewest:
                    fewest = compiled + size
                    choices.append((fewest, count + 1, (start, size)))
        best.append(min(choices, key=lambda choice: (*choice[:2], -choice[2][0])))
    units = []
    end = len(layers)
    while end > 0:
        start, size = best[end][2]
        units.append((tuple(layers[start : start + size]), (end - start) // size))
        end = start
    return units[::-1]
