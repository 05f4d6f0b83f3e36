"""The loss curve of a run as a picture."""

from pathlib import Path

from matplotlib.figure import Figure

from mamba_jax.training.metric_writer import read_metrics
from mamba_jax.training.replacement import replacement


def plot_loss_curve(run_dir: Path, *, title: str) -> Path | None:
    """Draws training and validation loss over the steps into `loss_curve.png`, all or nothing.

    Args:
        run_dir: holds `metrics.jsonl`.
        title: of the picture.

    Returns:
        Path of the picture; None if nothing was logged.

    Raises:
        OSError: it cannot be written.
    """
    records = read_metrics(run_dir)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for kind, field, label, marker in (
        ("train", "cross_entropy", "training", ""),
        ("validation", "loss", "held-out", "o"),
    ):
        points = [(record["step"], record[field]) for record in records if record["kind"] == kind and field in record]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker=marker, linewidth=1.0)
    if not axes.lines:
        return None
    axes.set(title=title, xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    path = run_dir / "loss_curve.png"
    with replacement(path) as temporary:
        figure.savefig(temporary, dpi=120)
    return path
