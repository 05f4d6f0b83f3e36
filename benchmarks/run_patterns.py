"""Trains models of nine patterns of layers at the quickstart's size, and keeps loss, speed and memory.

    python benchmarks/run_patterns.py
    python benchmarks/run_patterns.py --device gpu --patterns mamba1 jamba_like --num-steps 1200

Data, recipe and seed are those of `configs/quickstart.py`. Each run has a process of its own, so that its memory is
told apart from that of the others.
"""

import dataclasses
import functools
import multiprocessing
import resource
import statistics
import tempfile
from pathlib import Path
from typing import Any, Literal

import jax

import harness
from harness import MIB, Results, setting_here
from mamba_jax.cli import one_line_errors, parse
from mamba_jax.config import (
    AttentionConfig,
    ExperimentConfig,
    Hybrid,
    Mamba1Config,
    Mamba2Config,
    MlpConfig,
    MoeConfig,
    RGLRUConfig,
    SharedBlockConfig,
    WithSharedConfig,
)
from mamba_jax.config_files import load_config
from mamba_jax.models.parameters import count
from mamba_jax.run.loop import train
from mamba_jax.telemetry.metrics import read_metrics

# Sizes at which each model of width 192 has about a million parameters.
MAMBA1, MAMBA2 = Mamba1Config(state_dim=8), Mamba2Config(state_dim=64)
ATTENTION, MLP = AttentionConfig(num_heads=3), MlpConfig(hidden_dim=384)
SHARED = SharedBlockConfig(attention=AttentionConfig(num_heads=3, head_dim=64), mlp=MlpConfig(activation="gelu"))

# Pattern of the blocks, and what its letters stand for.
PATTERNS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba1": ("M*4", {"M": MAMBA1}),
    "mamba2": ("M*4", {"M": MAMBA2}),
    "transformer++": ("(AF)*3", {"A": ATTENTION, "F": MlpConfig(hidden_dim=512)}),
    "mamba2 + mlp": ("(MF)*3", {"M": MAMBA2, "F": MLP}),
    "mamba2 + attention": ("(MMMA)*1", {"M": MAMBA2, "A": ATTENTION}),
    "jamba_like": (
        "MFMEAFME",
        {
            "M": MAMBA1,
            "A": AttentionConfig(num_heads=3, rotary_dims=0),
            "F": MlpConfig(hidden_dim=192),
            "E": MoeConfig(num_experts=4, experts_per_token=2, hidden_dim=96),
        },
    ),
    "zamba_like": ("MSMS", {"M": MAMBA2, "S": WithSharedConfig(inner=MAMBA2, shared=SHARED, adapter_rank=8)}),
    "griffin_like": (
        "RFRFAF",
        {
            "R": RGLRUConfig(lru_width=256, num_heads=4),
            "A": AttentionConfig(num_heads=3, num_kv_heads=1, window=64),
            "F": MlpConfig(hidden_dim=384, activation="gelu_tanh"),
        },
    ),
    "mamba2attn": ("(MA)*2", {"M": MAMBA2, "A": AttentionConfig(num_heads=3, rotary_dims=32, conv_width=4)}),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to train.

    Attributes:
        device: what to train on.
        patterns: which ones.
        num_steps: updates of each run; the schedule is stretched to them.
        peak_lr: learning rate; the recipe's is that of Mamba-1.
        output: folder of the results.
    """

    device: Literal["cpu", "gpu"] = "cpu"
    patterns: tuple[str, ...] = tuple(PATTERNS)
    num_steps: int = 300
    peak_lr: float = 5e-3
    output: Path = harness.RESULTS


def experiment(name: str, *, num_steps: int, peak_lr: float, run_dir: Path) -> ExperimentConfig:
    """The quickstart with the blocks of a pattern; evaluated once, at the end."""
    config = load_config(str(Path(__file__).parents[1] / "configs" / "quickstart.py"), [])
    pattern, mixers = PATTERNS[name]
    mixer = Hybrid.of_pattern(pattern, **mixers)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, mixer=mixer, num_layers=mixer.num_blocks),
        optimizer=dataclasses.replace(config.optimizer, peak_lr=peak_lr),
        train=dataclasses.replace(config.train, num_steps=num_steps, run_dir=str(run_dir), sample_every=0),
        checkpoint=dataclasses.replace(config.checkpoint, every=num_steps, keep=1),
        evaluation=dataclasses.replace(config.evaluation, every=num_steps),
    )


def run(name: str, *, device: str, num_steps: int, peak_lr: float) -> dict[str, Any]:
    """Trains a pattern in this process; returns what it found, and the hardware.

    The speed is the median over the run's reports but the first, which holds the compilation. The memory is the most
    that the device held, on a CPU that the process held.
    """
    harness.select_platform(device)
    with tempfile.TemporaryDirectory() as folder:
        config = experiment(name, num_steps=num_steps, peak_lr=peak_lr, run_dir=Path(folder) / "run")
        result = train(config)
        assert result.validation is not None, "the last step is evaluated"
        metrics = [line for line in read_metrics(Path(config.train.run_dir)) if "tokens_per_second" in line]
    stats = jax.devices()[0].memory_stats() or {}
    used = stats.get("peak_bytes_in_use", 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return {
        "parameters": count(config.model),
        "bits_per_byte": result.validation.bits_per_byte,
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in metrics[1:]),
        "memory_MiB": used / MIB,
        "hardware": harness.hardware(),
    }


def main() -> None:
    """Command-line entry."""
    with one_line_errors():
        options = parse(Options, prog="benchmarks/run_patterns.py")
        results = None
        for name in options.patterns:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                how = {"device": options.device, "num_steps": options.num_steps, "peak_lr": options.peak_lr}
                figures = pool.apply(functools.partial(run, name, **how))
            hardware = str(figures.pop("hardware"))
            results = results or Results(options.output, setting_here(hardware, libraries=("flax", "optax")))
            workload = f"quickstart, {options.num_steps} updates, peak learning rate {options.peak_lr:g}"
            results.add("training run", workload, implementation=name, direction=PATTERNS[name][0], **figures)
        note = (
            "Width 192, text, recipe and seed of `configs/quickstart.py`; held-out text, over 16 batches of 16 windows."
            " The letters of each pattern stand in `benchmarks/run_patterns.py`. Memory is the most that the device "
            "held; on a CPU it is that of the process."
        )
        if results is not None:
            print(f"wrote {results.write_table(f'patterns_{options.device}', 'Patterns of layers', note)}")


if __name__ == "__main__":
    main()
