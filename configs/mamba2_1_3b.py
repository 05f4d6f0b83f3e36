"""Mamba-2 1.3B with the recipe that arXiv 2405.21060 takes over from Mamba's appendix E.2.1: 26 billion tokens of C4.

Command:   python train.py configs/mamba2_1_3b.py --data.tokenizer.path 20B_tokenizer.json
Hardware:  any mesh of accelerators whose size divides the batch of 256 sequences (0.5 million tokens).
Data:      as in configs/mamba_130m.py.
Expected:  1,343,757,312 parameters, 50,000 steps. No figure of ours yet.
"""

from configs.mamba2_130m import recipe
from mamba_jax.config import ExperimentConfig


def get_config() -> ExperimentConfig:
    return recipe("mamba2_1_3b", d_model=2048, num_layers=48, peak_lr=1e-3, num_steps=50_000)
