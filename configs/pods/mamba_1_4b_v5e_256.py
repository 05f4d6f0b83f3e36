"""Mamba-1.4B on a pod of TPU v5e: the run of configs/mamba_1_4b.py.

A batch of 256 sequences is one for each chip. Parameters, gradients and moments of 22 GB do not fit a chip of 16 GB, so
they are split over MESH.

Command:   python train.py configs/pods/mamba_1_4b_v5e_256.py --distributed --data.tokenizer.path 20B_tokenizer.json
Hardware:  v5litepod-256, a slice of 16x16 chips; the command runs on every host.
Data:      as in configs/mamba_130m.py.
Compiled:  python train.py configs/pods/mamba_1_4b_v5e_256.py --compile-only --topology v5e:16x16
Report:
"""

import dataclasses

from configs.mamba_1_4b import get_config as get_base_config
from mamba_jax.config import ExperimentConfig, MeshConfig


def get_config() -> ExperimentConfig:
    base = get_base_config()
    return dataclasses.replace(
        base,
        name="mamba_1_4b_v5e_256",
        train=dataclasses.replace(base.train, run_dir="runs/mamba_1_4b_v5e_256"),
        mesh=MeshConfig(data=16, fsdp=16),
    )
