"""Transformer++ of 350M, with the recipe of configs/transformers/transformerpp_125m.py: 7 billion tokens of C4.

Command:   python train.py configs/transformers/transformerpp_350m.py --data.tokenizer.path 20B_tokenizer.json
Hardware:  any mesh of accelerators whose size divides the batch of 256 sequences (0.5 million tokens).
Data:      as in configs/mamba_130m.py.
Expected:  359,818,240 parameters, 13,500 steps. No figure of ours yet.
"""

from configs.transformers.transformerpp_125m import recipe
from mamba_jax.config import ExperimentConfig


def get_config() -> ExperimentConfig:
    return recipe("transformerpp_350m", d_model=1024, num_layers=24, num_heads=16, peak_lr=1.5e-3, num_steps=13_500)
