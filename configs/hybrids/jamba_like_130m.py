"""A hybrid like Jamba of about 130M: one layer of attention in eight, experts in every other MLP (arXiv 2403.19887).

Command:   python train.py configs/hybrids/jamba_like_130m.py --data.tokenizer.path 20B_tokenizer.json
Hardware:  any mesh of accelerators whose size divides the batch of 256 sequences (0.5 million tokens).
Data:      as in configs/mamba_130m.py.
Expected:  125,494,064 parameters, 4,800 steps. No figure of ours yet.
"""

from typing import Any

from configs import mamba_130m
from mamba_jax.config import (
    AttentionConfig,
    ExperimentConfig,
    Hybrid,
    Mamba1Config,
    MlpConfig,
    MoeConfig,
)


def recipe(name: str, *, periods: int, num_heads: int, hidden_dim: int, **run: Any) -> ExperimentConfig:
    """The run of a model of so many times eight layers, each a mixer and an MLP or four experts, two for a token."""
    mixer = Hybrid.of_pattern(
        f"(MFMEMFMEAFMEMFME)*{periods}",
        M=Mamba1Config(selection_norm_eps=1e-6, selection_norm_weights=True),
        A=AttentionConfig(num_heads=num_heads, num_kv_heads=num_heads // 4, rotary_dims=0),
        F=MlpConfig(hidden_dim=hidden_dim),
        E=MoeConfig(num_experts=4, experts_per_token=2, hidden_dim=hidden_dim),
    )
    return mamba_130m.recipe(name, mixer=mixer, num_layers=16 * periods, **run)


def get_config() -> ExperimentConfig:
    sizes = {"d_model": 768, "periods": 1, "num_heads": 12, "hidden_dim": 1280}
    return recipe("jamba_like_130m", peak_lr=3e-3, num_steps=4800, **sizes)
