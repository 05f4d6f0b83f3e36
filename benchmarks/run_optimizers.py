"""Trains the quickstart's model with AdamW and with Muon at several peak learning rates, and keeps the losses.

    python benchmarks/run_optimizers.py
    python benchmarks/run_optimizers.py --num-steps 1200 --peak-lrs 5e-3

Everything but the optimizer is that of `configs/quickstart.py`, the seed and so the order of the text included.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Literal

import harness
from harness import Results, setting_here
from mamba_jax.cli import one_line_errors, parse
from mamba_jax.config import ExperimentConfig
from mamba_jax.config_files import load_config
from mamba_jax.run.loop import train

ALGORITHMS: tuple[Literal["adamw", "muon"], ...] = ("adamw", "muon")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to train.

    Attributes:
        num_steps: updates of each run; the schedule is stretched to them.
        peak_lrs: learning rates.
        output: folder of the results.
    """

    num_steps: int = 300
    peak_lrs: tuple[float, ...] = (1.5e-3, 5e-3, 1.5e-2)
    output: Path = harness.RESULTS


def experiment(
    algorithm: Literal["adamw", "muon"], peak_lr: float, *, num_steps: int, run_dir: Path
) -> ExperimentConfig:
    """The quickstart with another optimizer; evaluated once, at the end."""
    config = load_config(str(Path(__file__).parents[1] / "configs" / "quickstart.py"), [])
    return dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, algorithm=algorithm, peak_lr=peak_lr),
        train=dataclasses.replace(config.train, num_steps=num_steps, run_dir=str(run_dir), sample_every=0),
        checkpoint=dataclasses.replace(config.checkpoint, every=num_steps, keep=1),
        evaluation=dataclasses.replace(config.evaluation, every=num_steps),
    )


def main() -> None:
    """Command-line entry."""
    with one_line_errors():
        options = parse(Options, prog="benchmarks/run_optimizers.py")
        results = Results(options.output, setting_here(harness.hardware(), libraries=("flax", "optax")))
        for peak_lr in options.peak_lrs:
            for algorithm in ALGORITHMS:
                with tempfile.TemporaryDirectory() as folder:
                    run_dir = Path(folder) / "run"
                    result = train(experiment(algorithm, peak_lr, num_steps=options.num_steps, run_dir=run_dir))
                assert result.validation is not None, "the last step is evaluated"
                figures = {
                    "nats_per_token": result.validation.loss,
                    "bits_per_byte": result.validation.bits_per_byte,
                }
                workload, direction = f"quickstart, {options.num_steps} updates", f"peak learning rate {peak_lr:g}"
                results.add("training run", workload, implementation=algorithm, direction=direction, **figures)
        note = (
            "The model and data of `configs/quickstart.py`, one seed. Held-out text, over 16 batches of 16 windows; "
            "losses do not depend on the speed of the hardware."
        )
        print(f"wrote {results.write_table('optimizers', 'Optimizers', note)}")


if __name__ == "__main__":
    main()
