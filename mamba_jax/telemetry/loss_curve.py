"""The loss curve of a run as a picture."""

import math
from pathlib import Path

from mamba_jax.files import replacement
from mamba_jax.telemetry.metrics import read_metrics

# The largest float32. matplotlib fails on values far beyond it, so they become gaps.
_LARGEST = 3.4e38


def plot_loss_curve(run_dir: Path, *, title: str) -> Path | None:
    """Draws training and validation loss over the steps into `loss_curve.png` of a run directory.

    Args:
        run_dir: the run directory, with `metrics.jsonl`; losses that are not finite become gaps.
        title: title of the picture.

    Returns:
        Path of the picture; None if no loss was logged.

    Raises:
        OSError: the picture cannot be written; an older one stays.
        Exception: errors of matplotlib itself, such as a broken cache or a wrong setting in the environment.
    """
    # Imported here: importing matplotlib reads settings of the environment, and wrong ones must not stop a run.
    from matplotlib.figure import Figure

    records = read_metrics(run_dir)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    parts = sorted({record["kind"] for record in records if record["kind"].startswith("validation/")})
    for kind, field, label, marker in (
        ("train", "cross_entropy", "training", ""),
        ("validation", "loss", "held-out", "o"),
        *((kind, "loss", f"held-out, {kind.partition('/')[2]}", ".") for kind in parts),
    ):
        points = [(record["step"], record[field]) for record in records if record["kind"] == kind and field in record]
        if points:
            steps, losses = zip(*points, strict=True)
            drawn = [loss if abs(loss) <= _LARGEST else math.nan for loss in losses]
            axes.plot(steps, drawn, label=label, marker=marker, linewidth=1.0)
    if not axes.lines:
        return None
    # A dollar sign in the name would otherwise begin a formula.
    axes.set_title(title, parse_math=False)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    path = run_dir / "loss_curve.png"
    with replacement(path) as temporary:
        figure.savefig(temporary, dpi=120)
    return path
