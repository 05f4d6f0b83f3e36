"""A hybrid like Jamba of about 400M, with the layers of configs/hybrids/jamba_like_130m.py: 8 billion tokens of C4.

Command:   python train.py configs/hybrids/jamba_like_400m.py --data.tokenizer.path 20B_tokenizer.json
Hardware:  any mesh of accelerators whose size divides the batch of 256 sequences (0.5 million tokens).
Data:      as in configs/mamba_130m.py.
Expected:  401,783,104 parameters, 15,000 steps. No figure of ours yet.
"""

from configs.hybrids.jamba_like_130m import recipe
from mamba_jax.config import ExperimentConfig


def get_config() -> ExperimentConfig:
    sizes = {"d_model": 1024, "periods": 2, "num_heads": 16, "hidden_dim": 2048}
    return recipe("jamba_like_400m", peak_lr=1.5e-3, num_steps=15_000, **sizes)
