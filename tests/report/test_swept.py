"""The picture of a sweep: a panel for each field, a line for each combination of the others."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from mamba_jax.report.swept import Outcome, plot_outcomes


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Draws outcomes; returns the panels of the picture, None if there is none."""
    figures = []
    real = Figure.savefig

    def save(self: Figure, *args: Any, **options: Any) -> None:
        figures.append(self)
        real(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", save)

    def draw(*outcomes: Outcome) -> Any:
        figures.clear()
        path = tmp_path / "sweep.png"
        assert plot_outcomes(path, outcomes, title="a $ sweep") == bool(figures)
        if not figures:
            return None
        assert path.read_bytes().startswith(b"\x89PNG")
        return figures[0].axes

    return draw


def outcome(loss: float | None, held_out: float | None = None, **values: str) -> Outcome:
    return Outcome(
        values={name.replace("__", "."): value for name, value in values.items()}, loss=loss, held_out=held_out
    )


def points(axes: Any) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}


def test_a_line_for_each_combination_of_the_others(drawn: Any) -> None:
    rate, seed = drawn(
        outcome(9.0, 2.0, optimizer__peak_lr="1e-3", seed="0"),
        outcome(9.0, 1.5, optimizer__peak_lr="1e-2", seed="0"),
        outcome(9.0, 2.5, optimizer__peak_lr="1e-3", seed="1"),
        outcome(None, None, optimizer__peak_lr="1e-2", seed="1"),
    )
    assert points(rate) == {"seed=0": [(1e-3, 2.0), (1e-2, 1.5)], "seed=1": [(1e-3, 2.5)]}
    assert points(seed) == {"peak_lr=1e-3": [(0.0, 2.0), (1.0, 2.5)], "peak_lr=1e-2": [(0.0, 1.5)]}
    assert (rate.get_xlabel(), rate.get_xscale(), seed.get_xscale()) == ("optimizer.peak_lr", "log", "linear")
    assert rate.get_ylabel() == "held-out loss (nats per token)"
    assert [text.get_text() for text in rate.get_legend().get_texts()] == ["seed=0", "seed=1"]


def test_words_stand_side_by_side_and_training_loss_stands_in(drawn: Any) -> None:
    (axes,) = drawn(
        outcome(3.0, 1.0, optimizer__algorithm="muon"),
        outcome(2.0, None, optimizer__algorithm="adamw"),
        outcome(float("inf"), None, optimizer__algorithm="$x"),
    )
    assert points(axes) == {"_child0": [(0.0, 3.0), (1.0, 2.0)]}
    assert [text.get_text() for text in axes.get_xticklabels()] == ["muon", "adamw"]
    assert axes.get_ylabel() == "training loss (nats per token)"


def test_without_losses_or_fields_there_is_no_picture(drawn: Any) -> None:
    assert drawn(outcome(None, None, seed="0")) is None
    assert drawn(outcome(1.0, 1.0)) is None
