"""Several sources at once: which one each window of training is taken from, at any step without the steps before."""

import bisect
import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from mamba_jax.data.config import MixturePart
from mamba_jax.data.shards import TokenDataset


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenPart:
    """A part of a mixture, open for reading.

    Attributes:
        part: its name, weight and schedule.
        dataset: its tokens.
    """

    part: MixturePart
    dataset: TokenDataset


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A mixture whose sources are open, in the order of its config."""

    parts: tuple[OpenPart, ...]

    @property
    def weights(self) -> list[float]:
        """Of the parts."""
        return [part.part.weight for part in self.parts]

    @property
    def identity(self) -> dict[str, Any]:
        """The identity of every source, by its name."""
        return {part.part.name: part.dataset.identity for part in self.parts}


class Draws:
    """Gives each window of the endless sequence of training to a part of the mixture.

    With B windows a step and p_i(t) the share of part i at step t, part i is due T_i(s) = B sum_{t < s} p_i(t) windows
    before step s. Shares are weights over their sum at each step that a schedule names, and run linearly between these
    steps, so T_i is quadratic in s there, and exact as a fraction. Window j of part i belongs to the step in which T_i
    passes j + 1/2; the windows of a step are spread evenly, and the sequence is that of the steps one after the other.

    So s batches hold T_i(s) windows of each of k parts, but for at most (k + 1) / 2: rounding moves the sum of all T_i
    by at most k / 2, and the windows in between may all be of one part.

    Args:
        parts: the parts, whose weights have been checked.
        windows: B.

    Source: the order of deadlines is Webster's (Sainte-Lague's) rule of apportionment, extended to shares that change.
    """

    def __init__(self, parts: Sequence[MixturePart], windows: int) -> None:
        self._windows = windows
        self._steps = sorted({0, *(step for part in parts for step, _ in part.schedule)})
        weights = [[part.weight_at(step) for part in parts] for step in self._steps]
        self._shares = [[weight / sum(row) for weight in row] for row in weights]
        # Sums of shares before each of these steps.
        self._sums = [[Fraction(0)] * len(parts)]
        for place, step in enumerate(self._steps[1:]):
            self._sums.append(self._sum(place, step))

    def _sum(self, place: int, step: int) -> list[Fraction]:
        """Sums of the shares of all steps before `step`, which lies behind the schedules' step number `place`."""
        count = step - self._steps[place]
        shares = self._shares[place]
        later = self._shares[min(place + 1, len(self._steps) - 1)]
        distance = self._steps[place + 1] - self._steps[place] if place + 1 < len(self._steps) else 1
        return [
            total + count * share + (end - share) * Fraction(count * (count - 1), 2 * distance)
            for total, share, end in zip(self._sums[place], shares, later, strict=True)
        ]

    def _due(self, step: int) -> list[int]:
        """How many windows of each part belong to the steps before `step`."""
        sums = self._sum(bisect.bisect_right(self._steps, step) - 1, step)
        return [math.floor(self._windows * total + Fraction(1, 2)) for total in sums]

    def at(self, first: int, count: int) -> list[tuple[int, int]]:
        """Windows `first`, `first` + 1, ... of the sequence, each as (part, number among those of the part)."""
        step = self._step_of(first)
        skipped = first - sum(self._due(step))
        found: list[tuple[int, int]] = []
        while len(found) < skipped + count:
            found += self._windows_of(step)
            step += 1
        return found[skipped : skipped + count]

    def counts(self, first: int) -> list[int]:
        """How many of the first `first` windows of the sequence are of each part."""
        step = self._step_of(first)
        counts = self._due(step)
        for part, _ in self._windows_of(step)[: first - sum(counts)]:
            counts[part] += 1
        return counts

    def _step_of(self, window: int) -> int:
        """The step that a window belongs to, which is near the batch that it stands in."""
        step = window // self._windows
        while sum(self._due(step)) > window:
            step -= 1
        while sum(self._due(step + 1)) <= window:
            step += 1
        return step

    def _windows_of(self, step: int) -> list[tuple[int, int]]:
        """The windows that belong to a step, as (part, number among those of the part), spread evenly."""
        spans = list(zip(self._due(step), self._due(step + 1), strict=True))
        places = [
            ((number - start + 0.5) / (end - start), part, number)
            for part, (start, end) in enumerate(spans)
            for number in range(start, end)
        ]
        return [(part, number) for _, part, number in sorted(places)]
