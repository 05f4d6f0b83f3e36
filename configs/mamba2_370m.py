"""Mamba-2 370M with the recipe that arXiv 2405.21060 takes over from Mamba's appendix E.2.1: 7 billion tokens of C4.

Command:   python train.py configs/mamba2_370m.py --data.tokenizer.path 20B_tokenizer.json
Hardware:  any mesh of accelerators whose size divides the batch of 256 sequences (0.5 million tokens).
Data:      as in configs/mamba_130m.py.
Expected:  368,346,624 parameters, 13,500 steps. No figure of ours yet.
"""

from configs.mamba2_130m import recipe
from mamba_jax.config import ExperimentConfig


def get_config() -> ExperimentConfig:
    return recipe("mamba2_370m", d_model=1024, num_layers=48, peak_lr=1.5e-3, num_steps=13_500)
