"""Sets the last two results of every program on the same hardware side by side, and says what became slower.

    python benchmarks/compare.py
    python benchmarks/compare.py --op selective_scan --workload mamba_130m --threshold 1.2

Exits with status 1 if something did.
"""

import collections
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import harness
from harness import Measurement
from mamba_jax.cli import one_line_errors, parse, print_result
from mamba_jax.errors import InputError

# Eighteen programs stand both in results/ops_gpu_edge_states_2026-11-24.md and in results/ops_gpu_scan_2026-11-24.md,
# from two runs on H100s: their times differ by less than 3%. More than 5% is a change.
THRESHOLD = 1.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to compare.

    Attributes:
        results: file of results.
        op: only this one.
        workload: only those that are this, or whose name is.
        threshold: ratio of the last result to the one before above which a program has become slower. Give more on a
            machine that others use as well.
    """

    results: Path = harness.RESULTS / harness.FILE_NAME
    op: str | None = None
    workload: str | None = None
    threshold: float = THRESHOLD

    def __post_init__(self) -> None:
        """Checks the threshold."""
        if not self.threshold >= 1:
            raise InputError(f"--threshold {self.threshold} must be at least 1: it is a ratio of times")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """The last two timed results of a program."""

    before: Measurement
    after: Measurement

    @property
    def ratio(self) -> float:
        """Time of the later over that of the earlier."""
        assert self.before.milliseconds is not None
        assert self.after.milliseconds is not None
        return self.after.milliseconds / self.before.milliseconds


def pairs(measurements: Sequence[Measurement]) -> list[Pair]:
    """The last two results of every program that has two, in the order of their first ones."""
    timed: dict[tuple[str, ...], list[Measurement]] = collections.defaultdict(list)
    for measurement in measurements:
        if measurement.milliseconds:
            timed[measurement.program].append(measurement)
    return [Pair(before=last[-2], after=last[-1]) for last in timed.values() if len(last) > 1]


def choose(measurements: Sequence[Measurement], *, op: str | None, workload: str | None) -> list[Measurement]:
    """The results of an op and a workload; None is any.

    Raises:
        InputError: there are none of this op, or of it none of this workload.
    """
    for name, wanted in (("op", op), ("workload", workload)):
        known = dict.fromkeys(getattr(measurement, name) for measurement in measurements)
        fitting = {text for text in known if wanted in (None, text, text.split(" ")[0])}
        if wanted is not None and not fitting:
            raise InputError(f"no results of {name} {wanted!r}; there are {', '.join(known) or 'none at all'}")
        measurements = [measurement for measurement in measurements if getattr(measurement, name) in fitting]
    return list(measurements)


def table(compared: Sequence[Pair], *, threshold: float) -> str:
    """Lines of a table; the last column marks what became slower."""
    lines = [
        "| hardware | op | workload | implementation | pass | commits | before ms | after ms | ratio | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for pair in compared:
        cells = [*pair.after.program, f"{pair.before.setting.commit}, {pair.after.setting.commit}"]
        cells += [f"{pair.before.milliseconds:.4g}", f"{pair.after.milliseconds:.4g}", f"{pair.ratio:.3f}"]
        lines.append(f"| {' | '.join(cells)} | {'slower' if pair.ratio > threshold else ''} |")
    return "\n".join(lines)


def main() -> None:
    """Command-line entry."""
    with one_line_errors():
        options = parse(Options, prog="benchmarks/compare.py")
        chosen = choose(harness.read(options.results), op=options.op, workload=options.workload)
        compared = pairs(chosen)
        if not compared:
            raise InputError(f"{options.results} has no program with two timed results: run its benchmark again")
        print_result(table(compared, threshold=options.threshold))
        slower = sum(pair.ratio > options.threshold for pair in compared)
        print_result(f"{slower} of {len(compared)} programs are slower by more than {options.threshold:g} times.")
    raise SystemExit(1 if slower else 0)


if __name__ == "__main__":
    main()
