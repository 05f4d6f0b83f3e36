"""Mamba-130M on 16 chips of TPU v5e: the run of configs/mamba_130m.py.

Every chip holds all parameters and works on its sequences; only gradients are exchanged. The chips have room for that,
and matrices of 768 columns split over 16 chips would be too narrow for their units.

Command:   python train.py configs/pods/mamba_130m_v5e_16.py --distributed --data.tokenizer.path 20B_tokenizer.json
Hardware:  v5litepod-16, a slice of 4x4 chips; the command runs on every host.
Data:      as in configs/mamba_130m.py.
Compiled:  python train.py configs/pods/mamba_130m_v5e_16.py --compile-only --topology v5e:4x4
Report:
"""

import dataclasses

from configs.mamba_130m import get_config as get_base_config
from mamba_jax.config import ExperimentConfig, MeshConfig


def get_config() -> ExperimentConfig:
    base = get_base_config()
    return dataclasses.replace(
        base,
        name="mamba_130m_v5e_16",
        train=dataclasses.replace(base.train, run_dir="runs/mamba_130m_v5e_16"),
        mesh=MeshConfig(data=16),
    )
