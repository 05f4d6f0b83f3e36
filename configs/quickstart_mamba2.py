"""The quickstart with Mamba-2 layers in place of Mamba-1's: same text, width, depth and recipe.

Command:   python train.py configs/quickstart_mamba2.py
Hardware:  two CPU cores, about 1 GB of memory.
Data:      as in configs/quickstart.py.
Expected:  1,051,144 parameters, 1.68 bits per byte on the held-out speeches, where Mamba-1 reaches 1.65
           (benchmarks/results/quickstart_mamba2_cpu_2026-11-26.md).
"""

import dataclasses

from configs import quickstart
from mamba_jax.config import ExperimentConfig, Mamba2Config


def get_config() -> ExperimentConfig:
    config = quickstart.get_config()
    return dataclasses.replace(
        config,
        name="quickstart_mamba2",
        model=dataclasses.replace(config.model, mixer=Mamba2Config(state_dim=64)),
        train=dataclasses.replace(config.train, run_dir="runs/quickstart_mamba2"),
    )
