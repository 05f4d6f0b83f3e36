"""A hybrid like Zamba2 of about 400M, with the layers of configs/hybrids/zamba_like_130m.py: 8 billion tokens of C4.

Command:   python train.py configs/hybrids/zamba_like_400m.py --data.tokenizer.path 20B_tokenizer.json
Hardware:  any mesh of accelerators whose size divides the batch of 256 sequences (0.5 million tokens).
Data:      as in configs/mamba_130m.py.
Expected:  COUNT parameters, 15,000 steps. No figure of ours yet.
"""

from configs.hybrids.zamba_like_130m import recipe
from mamba_jax.config import ExperimentConfig


def get_config() -> ExperimentConfig:
    sizes = {"pattern": "(MMMMMS)*8", "d_model": 1024, "num_heads": 16}
    return recipe("zamba_like_400m", peak_lr=1.5e-3, num_steps=15_000, **sizes)
