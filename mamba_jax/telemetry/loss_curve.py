"""The loss curve of a run as a picture."""

import math
from pathlib import Path

from mamba_jax.files import replacement
from mamba_jax.telemetry.metrics import read_metrics

# Of float32; matplotlib cannot draw what lies far beyond.
_LARGEST = 3.4e38


def plot_loss_curve(run_dir: Path, *, title: str) -> Path | None:
    """Draws training and validation loss over the steps into `loss_curve.png`, all or nothing.

    Args:
        run_dir: holds `metrics.jsonl`; values that are not finite are gaps.
        title: of the picture.

    Returns:
        Path of the picture; None if nothing was logged.

    Raises:
        OSError: it cannot be written.
        Exception: matplotlib has its own, such as of a cache or a setting in the environment that is of no use.
    """
    # Importing it reads settings of the environment, which may be wrong and must not keep a run from starting.
    from matplotlib.figure import Figure

    records = read_metrics(run_dir)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for kind, field, label, marker in (
        ("train", "cross_entropy", "training", ""),
        ("validation", "loss", "held-out", "o"),
    ):
        points = [(record["step"], record[field]) for record in records if record["kind"] == kind and field in record]
        if points:
            steps, losses = zip(*points, strict=True)
            drawn = [loss if abs(loss) <= _LARGEST else math.nan for loss in losses]
            axes.plot(steps, drawn, label=label, marker=marker, linewidth=1.0)
    if not axes.lines:
        return None
    # A dollar sign in a name begins no formula.
    axes.set_title(title, parse_math=False)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    path = run_dir / "loss_curve.png"
    with replacement(path) as temporary:
        figure.savefig(temporary, dpi=120)
    return path
