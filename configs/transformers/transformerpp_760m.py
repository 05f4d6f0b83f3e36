"""Transformer++ of 760M, with the recipe of configs/transformers/transformerpp_125m.py: 15 billion tokens of C4.

Command:   python train.py configs/transformers/transformerpp_760m.py --data.tokenizer.path 20B_tokenizer.json
Hardware:  any mesh of accelerators whose size divides the batch of 256 sequences (0.5 million tokens).
Data:      as in configs/mamba_130m.py.
Expected:  756,782,592 parameters, 29,000 steps. No figure of ours yet.
"""

from configs.transformers.transformerpp_125m import recipe
from mamba_jax.config import ExperimentConfig


def get_config() -> ExperimentConfig:
    return recipe("transformerpp_760m", d_model=1536, num_layers=24, num_heads=16, peak_lr=1.25e-3, num_steps=29_000)
