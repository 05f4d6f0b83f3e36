"""Mamba-2 780M with the recipe that arXiv 2405.21060 takes over from Mamba's appendix E.2.1: 15 billion tokens of C4.

Command:   python train.py configs/mamba2_780m.py --data.tokenizer.path 20B_tokenizer.json
Hardware:  any mesh of accelerators whose size divides the batch of 256 sequences (0.5 million tokens).
Data:      as in configs/mamba_130m.py.
Expected:  780,161,280 parameters, 29,000 steps. No figure of ours yet.
"""

from configs.mamba2_130m import recipe
from mamba_jax.config import ExperimentConfig


def get_config() -> ExperimentConfig:
    return recipe("mamba2_780m", d_model=1536, num_layers=48, peak_lr=1.25e-3, num_steps=29_000)
