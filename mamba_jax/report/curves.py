"""Curves as inline SVG, thinned to what a screen can show without losing a spike."""

import dataclasses
import html
import json
import math
from collections.abc import Sequence

import numpy as np

from mamba_jax.report.run import Series

WIDTH, HEIGHT = 480, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 460, 10, 222


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """A labelled line of a chart.

    Attributes:
        label: for the legend.
        series: the numbers.
        color: index of a palette colour, from 0.
        is_marked: dots at the points and a dashed line, for numbers that are far apart.
    """

    label: str
    series: Series
    color: int
    is_marked: bool = False


def thin(positions: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Indices of the points to draw: the first, lowest, highest and last finite one of every pixel column.

    Args:
        positions: horizontal pixels, ascending.
        values: as many.

    Returns:
        Ascending indices, at most four a column.
    """
    index = np.flatnonzero(np.isfinite(values))
    columns = np.floor(positions[index]).astype(np.int64)
    _, first = np.unique(columns, return_index=True)
    last = np.append(first[1:], index.size) - 1
    by_value = np.lexsort((values[index], columns))
    return index[np.unique(np.concatenate([first, last, by_value[first], by_value[last]]))] if index.size else index


@dataclasses.dataclass(frozen=True)
class _Axis:
    """A range of numbers on a range of pixels, linear or logarithmic."""

    low: float
    high: float
    first_pixel: int
    last_pixel: int
    is_log: bool

    def pixels(self, values: np.ndarray) -> np.ndarray:
        low, high = (math.log10(self.low), math.log10(self.high)) if self.is_log else (self.low, self.high)
        scaled = np.log10(values) if self.is_log else values
        return self.first_pixel + (scaled - low) / (high - low) * (self.last_pixel - self.first_pixel)

    def ticks(self) -> list[float]:
        if self.is_log and self.high / self.low >= 10:
            powers = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            return [10.0**power for power in powers[:: max(1, math.ceil(len(powers) / 6))]]
        step = _round_up((self.high - self.low) / 5)
        count = math.floor(self.high / step + 1e-9) - math.ceil(self.low / step - 1e-9) + 1
        return [(math.ceil(self.low / step - 1e-9) + i) * step for i in range(count)]


def _round_up(value: float) -> float:
    """The next of 1, 2, 2.5, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if factor * power >= value * (1 - 1e-9))


def draw(title: str, unit: str, curves: Sequence[Curve]) -> str:
    """A chart as HTML: the picture with a linear and a logarithmic step axis, its legend, and its points for hovering.

    Args:
        title: title of the chart.
        unit: unit of the values; "" for none.
        curves: the curves, with any number of points, NaN allowed; a curve without a finite value is left out.
    """
    curves = [curve for curve in curves if np.isfinite(curve.series.values).any()]
    if not curves:
        return ""
    vertical = _vertical_axis(curves)
    pictures = "".join(_picture(title, curves, vertical, is_log=is_log) for is_log in (False, True))
    legend = "".join(
        f'<span><i class="c{curve.color}{" marked" if curve.is_marked else ""}"></i>{html.escape(curve.label)}</span>'
        for curve in curves
    )
    notes = ", ".join(filter(None, (unit, "logarithmic" if vertical.is_log else "")))
    subtitle = f"<small>{html.escape(notes)}</small>"
    return (
        f'<figure class="chart"><figcaption>{html.escape(title)} {subtitle}</figcaption>{pictures}'
        f'<div class="legend">{legend}</div><output></output></figure>'
    )


def _vertical_axis(curves: Sequence[Curve]) -> _Axis:
    """The range of all curves' values; logarithmic if the highest is more than 50 times the median."""
    values = np.concatenate([curve.series.values for curve in curves])
    values = values[np.isfinite(values)]
    low, high = float(values.min()), float(values.max())
    # One spike would otherwise press everything else onto the bottom line.
    is_log = low > 0 and high > 50 * float(np.median(values))
    if is_log:
        return _Axis(low / 1.2, high * 1.2, _BOTTOM, _TOP, True)
    margin = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    return _Axis(0.0 if 0 <= low < margin else low - margin, high + margin, _BOTTOM, _TOP, False)


def _picture(title: str, curves: Sequence[Curve], vertical: _Axis, *, is_log: bool) -> str:
    """HTML of the curves over a linear or logarithmic axis of steps, and their points as JSON for the page's script."""
    first = min(int(curve.series.steps[0]) for curve in curves)
    last = max(int(curve.series.steps[-1]) for curve in curves)
    low = max(1.0, float(first)) if is_log else 0.0 if first < 0.05 * last else float(first)
    horizontal = _Axis(low, max(float(last), low + 1.0), _LEFT, _RIGHT, is_log)
    lines, points = [], []
    for curve in curves:
        steps, values = curve.series.steps, curve.series.values
        inside = steps >= low
        steps, values = steps[inside], values[inside]
        x = horizontal.pixels(steps)
        kept = thin(x, values)
        lines.append(_line(curve, x, values, kept, vertical))
        numbers = [float(f"{value:.5g}") for value in values[kept]]
        points.append({"label": curve.label, "color": curve.color, "x": steps[kept].tolist(), "y": numbers})
    # A "<" in a label must not end the element that holds the data.
    data = json.dumps(points, separators=(",", ":")).replace("<", "\\u003c")
    span = f'data-low="{low}" data-high="{horizontal.high}" data-left="{_LEFT}" data-right="{_RIGHT}"'
    return (
        f'<div class="{"log" if is_log else "linear"}"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{html.escape(title)} over steps" {span}>{_grid(horizontal, vertical)}{"".join(lines)}'
        f'<line class="cursor" y1="{_TOP}" y2="{_BOTTOM}" visibility="hidden"/></svg>'
        f'<script type="application/json">{data}</script></div>'
    )


def _line(curve: Curve, x: np.ndarray, values: np.ndarray, kept: np.ndarray, vertical: _Axis) -> str:
    """A path that is interrupted where values are not finite, which ticks on the lower edge show."""
    is_missing = ~np.isfinite(values)
    missing_before = np.cumsum(is_missing)[kept]
    y = vertical.pixels(values[kept])
    parts, dots, previous = [], [], -1
    for horizontal, height, missing in zip(x[kept], y, missing_before, strict=True):
        parts.append(f"{'L' if missing == previous else 'M'}{horizontal:.1f} {height:.1f}")
        previous = missing
        if curve.is_marked or kept.size == 1:
            dots.append(f'<circle cx="{horizontal:.1f}" cy="{height:.1f}" r="2.2"/>')
    columns = np.unique(np.floor(x[is_missing]))
    ticks = "".join(f"M{column:.0f} {_BOTTOM}v-7" for column in columns)
    ticks = f'<path class="missing" d="{ticks}"><title>not finite</title></path>' if ticks else ""
    marked = " marked" if curve.is_marked else ""
    return f'<g class="c{curve.color}{marked}"><path d="{"".join(parts)}"/>{"".join(dots)}{ticks}</g>'


def _grid(horizontal: _Axis, vertical: _Axis) -> str:
    """SVG of the horizontal grid lines with their values, and of the steps along the bottom."""
    parts = []
    for value, y in zip(vertical.ticks(), vertical.pixels(np.array(vertical.ticks())), strict=True):
        parts.append(
            f'<line x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(value)}</text>'
        )
    steps = [value for value in horizontal.ticks() if value.is_integer()]
    for value, x in zip(steps, horizontal.pixels(np.array(steps)), strict=True):
        parts.append(f'<text x="{x:.1f}" y="{_BOTTOM + 18}" text-anchor="middle">{short(value)}</text>')
    return f'<g class="grid">{"".join(parts)}</g>'


def short(value: float) -> str:
    """A number in four digits at most, such as 12.5k, 0.002 or 3e-05."""
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if math.isfinite(value) and abs(value) >= limit:
            return f"{value / limit:.4g}{suffix}"
    return f"{value:.4g}"
