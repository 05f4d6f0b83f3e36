"""The quickstart with Mamba-2 layers in place of Mamba-1's: same text, width, depth and recipe.

Command:   python train.py configs/quickstart_mamba2.py
Hardware:  two CPU cores, about 1 GB of memory.
Data:      as in configs/quickstart.py.
Expected:  filled in below.
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
