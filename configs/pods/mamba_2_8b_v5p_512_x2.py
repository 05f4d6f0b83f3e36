"""Mamba-2.8B on two slices of v5p-512 that a data-centre network joins: the run of configs/mamba_2_8b.py.

A batch of 512 sequences is one for each chip. Only sums of gradients cross the network: of a chip's part of them, since
they are split over 64 chips of a slice before.

Command:   python train.py configs/pods/mamba_2_8b_v5p_512_x2.py --distributed --data.tokenizer.path 20B_tokenizer.json
Hardware:  two slices v5p-512 of 4x8x8 chips each; the command runs on every host of both.
Data:      as in configs/mamba_130m.py.
Compiled:  python train.py configs/pods/mamba_2_8b_v5p_512_x2.py --compile-only --topology v5p:4x8x8 --num-slices 2
Report:
"""

import dataclasses

from configs.pods.mamba_2_8b_v5p_512 import get_config as get_one_slice_config
from mamba_jax.config import ExperimentConfig, MeshConfig


def get_config() -> ExperimentConfig:
    base = get_one_slice_config()
    return dataclasses.replace(
        base,
        name="mamba_2_8b_v5p_512_x2",
        train=dataclasses.replace(base.train, run_dir="runs/mamba_2_8b_v5p_512_x2"),
        mesh=MeshConfig(data=8, fsdp=64),
    )
