"""The quickstart with a hybrid: Mamba-2, attention and MLPs, all of which can be split over devices in any way.

Command:   python train.py configs/quickstart_hybrid.py
Hardware:  two CPU cores, about 1 GB of memory.
Data:      as in configs/quickstart.py.
Expected:  1,362,788 parameters. Runs of nine patterns: benchmarks/results/patterns_gpu_2026-11-26.md.
"""

import dataclasses

from configs import quickstart
from mamba_jax.config import AttentionConfig, ExperimentConfig, Hybrid, Mamba2Config, MlpConfig


def get_config() -> ExperimentConfig:
    config = quickstart.get_config()
    mixer = Hybrid.of_pattern(
        "MFMFAF",
        M=Mamba2Config(state_dim=64),
        A=AttentionConfig(num_heads=4),
        F=MlpConfig(hidden_dim=384),
    )
    return dataclasses.replace(
        config,
        name="quickstart_hybrid",
        model=dataclasses.replace(config.model, mixer=mixer, num_layers=6),
        train=dataclasses.replace(config.train, run_dir="runs/quickstart_hybrid"),
    )
