"""Mamba-2 130M with the recipe that arXiv 2405.21060 takes over from Mamba's appendix E.2.1: 2.5 billion tokens of C4.

Command:   python train.py configs/mamba2_130m.py --data.tokenizer.path 20B_tokenizer.json
Hardware:  any mesh of accelerators whose size divides the batch of 256 sequences (0.5 million tokens).
Data:      as in configs/mamba_130m.py.
Expected:  128,989,632 parameters, 4,800 steps. No figure of ours yet.
"""

from typing import Any

from configs import mamba_130m
from mamba_jax.config import ExperimentConfig, Mamba2Config


def recipe(name: str, **run: Any) -> ExperimentConfig:
    """The run of a model of this size; configs/mamba2_370m.py and its like hold the others."""
    return mamba_130m.recipe(name, mixer=Mamba2Config(), vocab_multiple=16, **run)


def get_config() -> ExperimentConfig:
    return recipe("mamba2_130m", d_model=768, num_layers=24, peak_lr=3e-3, num_steps=4800)
