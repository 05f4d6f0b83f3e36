"""A hybrid like Zamba2 of about 130M: Mamba-2, and one block of attention and an MLP that three layers share.

Source: arXiv 2411.15242.

Command:   python train.py configs/hybrids/zamba_like_130m.py --data.tokenizer.path 20B_tokenizer.json
Hardware:  any mesh of accelerators whose size divides the batch of 256 sequences (0.5 million tokens).
Data:      as in configs/mamba_130m.py.
Expected:  124,825,872 parameters, 4,800 steps. No figure of ours yet.
"""

from typing import Any

from configs import mamba_130m
from mamba_jax.config import (
    AttentionConfig,
    ExperimentConfig,
    Hybrid,
    Mamba2Config,
    MlpConfig,
    SharedBlockConfig,
    WithSharedConfig,
)


def recipe(name: str, *, pattern: str, d_model: int, num_heads: int, **run: Any) -> ExperimentConfig:
    """The run of a model of layers M of Mamba-2, and S of Mamba-2 behind the shared block."""
    mamba, channels = Mamba2Config(dt_lower_limit=0.001), 2 * d_model // num_heads
    shared = SharedBlockConfig(
        attention=AttentionConfig(num_heads=num_heads, head_dim=channels, softmax_scale=(channels / 2) ** -0.5),
        mlp=MlpConfig(hidden_dim=4 * d_model, activation="gelu"),
    )
    mixer = Hybrid.of_pattern(pattern, M=mamba, S=WithSharedConfig(inner=mamba, shared=shared, adapter_rank=64))
    return mamba_130m.recipe(name, mixer=mixer, d_model=d_model, num_layers=mixer.num_blocks, **run)


def get_config() -> ExperimentConfig:
    sizes = {"pattern": "(MMMMMS)*3", "d_model": 768, "num_heads": 12}
    return recipe("zamba_like_130m", peak_lr=3e-3, num_steps=4800, **sizes)
