"""The final losses of a sweep against the values that it went through, as a picture."""

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mamba_jax.files import replacement

_LARGEST = 3.4e38
# From there on values are drawn by their magnitude.
_WIDE = 8.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run of a sweep came to.

    Attributes:
        values: the value of each varied field, as it was typed, by the field's dotted name.
        loss: its last training loss, nats per token; None without one.
        held_out: its last held-out loss; None without one.
    """

    values: Mapping[str, str]
    loss: float | None
    held_out: float | None


def plot_outcomes(path: Path, outcomes: Sequence[Outcome], *, title: str) -> bool:
    """Draws a panel for each varied field, with a line for each combination of the others.

    The loss is the held-out one if every run that has any loss has that, else the last of training. A field is drawn to
    scale if all its values are numbers, and by their magnitude if they are far apart; other values stand side by side.

    Args:
        path: the picture to write.
        outcomes: of all runs; those without a finite loss are left out.
        title: of the picture.

    Returns:
        Whether there was anything to draw.

    Raises:
        OSError: the picture cannot be written; an older one stays.
        Exception: errors of matplotlib itself, such as a broken cache or a wrong setting in the environment.
    """
    begun = [one for one in outcomes if one.loss is not None or one.held_out is not None]
    is_held_out = all(one.held_out is not None for one in begun)
    points = [(one.values, loss) for one in begun if (loss := one.held_out if is_held_out else one.loss) is not None]
    points = [(values, loss) for values, loss in points if abs(loss) <= _LARGEST]
    fields = list(outcomes[0].values)
    if not points or not fields:
        return False
    # Imported here: importing matplotlib reads settings of the environment, and wrong ones must not stop a sweep.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, 4.5 * len(fields)), 4.5), layout="constrained")
    for axes, field in zip(figure.subplots(1, len(fields), squeeze=False)[0], fields, strict=True):
        _draw(axes, field, points)
        axes.set(ylabel=f"{'held-out' if is_held_out else 'training'} loss (nats per token)")
    figure.suptitle(title, parse_math=False)
    with replacement(path) as temporary:
        figure.savefig(temporary, dpi=120)
    return True


def _draw(axes: Any, field: str, points: Sequence[tuple[Mapping[str, str], float]]) -> None:
    """One panel: the loss over a field."""
    texts = list(dict.fromkeys(values[field] for values, _ in points))
    numbers = {text: number for text in texts if (number := _number(text)) is not None}
    is_number = len(numbers) == len(texts)
    places = numbers if is_number else {text: float(place) for place, text in enumerate(texts)}
    lines: dict[str, list[tuple[float, float]]] = {}
    for values, loss in points:
        others = ", ".join(f"{name.rpartition('.')[2]}={value}" for name, value in values.items() if name != field)
        lines.setdefault(others, []).append((places[values[field]], loss))
    for label, found in lines.items():
        x, y = zip(*sorted(found), strict=True)
        # A name that begins with an underscore would be no part of the legend.
        axes.plot(x, y, marker="o", linewidth=1.0, label=label.lstrip("_"))
    if not is_number:
        axes.set_xticks(list(places.values()), [text.replace("$", r"\$") for text in places])
    elif min(places.values()) > 0 and max(places.values()) > _WIDE * min(places.values()):
        axes.set_xscale("log")
    axes.set_xlabel(field, parse_math=False)
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend(fontsize="small")


def _number(text: str) -> float | None:
    with contextlib.suppress(ValueError):
        number = float(text)
        return number if math.isfinite(number) and abs(number) <= _LARGEST else None
    return None
