"""The quickstart with a learning rate that stays at its peak: a trunk to extend, and to take decaying branches from.

Command:   python train.py configs/quickstart_trunk.py
Hardware:  two CPU cores, about 1 GB of memory.
Data:      as in configs/quickstart.py.
Expected:  the losses of every branch are those of the trunk until it decays; docs/training.md, "Build on a run".
"""

import dataclasses

from configs import quickstart
from mamba_jax.config import CheckpointConfig, ExperimentConfig, WarmupStableDecaySchedule


def get_config() -> ExperimentConfig:
    config = quickstart.get_config()
    schedule = WarmupStableDecaySchedule(warmup_steps=60, decay_steps=0, final_lr=1e-4)
    return dataclasses.replace(
        config,
        name="quickstart_trunk",
        optimizer=dataclasses.replace(config.optimizer, schedule=schedule),
        train=dataclasses.replace(config.train, run_dir="runs/trunk"),
        checkpoint=CheckpointConfig(every=200, keep=50),
    )
