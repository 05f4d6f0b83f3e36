"""Transformer++ of 1.3B, with the recipe of configs/transformers/transformerpp_125m.py: 26 billion tokens of C4.

Command:   python train.py configs/transformers/transformerpp_1_3b.py --data.tokenizer.path 20B_tokenizer.json
Hardware:  any mesh of accelerators whose size divides the batch of 256 sequences (0.5 million tokens).
Data:      as in configs/mamba_130m.py.
Expected:  1,317,324,800 parameters, 50,000 steps. No figure of ours yet.
"""

from configs.transformers.transformerpp_125m import recipe
from mamba_jax.config import ExperimentConfig


def get_config() -> ExperimentConfig:
    return recipe("transformerpp_1_3b", d_model=2048, num_layers=24, num_heads=32, peak_lr=1e-3, num_steps=50_000)
