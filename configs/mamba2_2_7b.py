"""Mamba-2 2.7B with the recipe that arXiv 2405.21060 takes over from Mamba's appendix E.2.1: 300 billion tokens of C4.

Command:   python train.py configs/mamba2_2_7b.py --data.tokenizer.path 20B_tokenizer.json
Hardware:  any mesh of accelerators whose size divides the batch of 512 sequences (1 million tokens).
Data:      as in configs/mamba_130m.py.
Expected:  2,702,599,680 parameters, 286,000 steps. No figure of ours yet.
"""

from configs.mamba2_130m import recipe
from mamba_jax.config import ExperimentConfig


def get_config() -> ExperimentConfig:
    return recipe("mamba2_2_7b", d_model=2560, num_layers=64, peak_lr=4.8e-4, num_steps=286_000, global_batch=512)
