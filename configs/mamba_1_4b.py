"""Mamba-1.4B with the recipe of arXiv 2312.00752, appendix E.2.1: 26 billion tokens of C4.

Command:   python train.py configs/mamba_1_4b.py --data.tokenizer.path 20B_tokenizer.json
Hardware:  any mesh of accelerators whose size divides the batch of 256 sequences (0.5 million tokens).
Data:      as in configs/mamba_130m.py.
Expected:  1,372,178,432 parameters, 50,000 steps. No figure of ours yet.
"""

import dataclasses

from configs.mamba_130m import get_config as get_130m_config
from mamba_jax.config import ExperimentConfig


def get_config() -> ExperimentConfig:
    base = get_130m_config()
    return dataclasses.replace(
        base,
        name="mamba_1_4b",
        model=dataclasses.replace(base.model, d_model=2048, num_layers=48),
        data=dataclasses.replace(base.data, global_batch=256),
        optimizer=dataclasses.replace(base.optimizer, peak_lr=1e-3),
        train=dataclasses.replace(base.train, num_steps=50_000, run_dir="runs/mamba_1_4b"),
    )
