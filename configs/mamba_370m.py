"""Mamba-370M with the recipe of arXiv 2312.00752, appendix E.2.1: 7 billion tokens of C4.

Command:   python train.py configs/mamba_370m.py --data.tokenizer.path 20B_tokenizer.json
Hardware:  any mesh of accelerators whose size divides the batch of 256 sequences (0.5 million tokens).
Data:      as in configs/mamba_130m.py.
Expected:  371,516,416 parameters, 13,500 steps. No figure of ours yet.
"""

import dataclasses

from configs.mamba_130m import get_config as get_130m_config
from mamba_jax.config import ExperimentConfig


def get_config() -> ExperimentConfig:
    base = get_130m_config()
    return dataclasses.replace(
        base,
        name="mamba_370m",
        model=dataclasses.replace(base.model, d_model=1024, num_layers=48),
        data=dataclasses.replace(base.data, global_batch=256),
        optimizer=dataclasses.replace(base.optimizer, peak_lr=1.5e-3),
        train=dataclasses.replace(base.train, num_steps=13_500, run_dir="runs/mamba_370m"),
    )
