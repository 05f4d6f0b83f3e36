"""A hybrid like Griffin of about 130M: two recurrent blocks (RG-LRU) to one of local attention (arXiv 2402.19427).

Command:   python train.py configs/hybrids/griffin_like_130m.py --data.tokenizer.path 20B_tokenizer.json
Hardware:  any mesh of accelerators whose size divides the batch of 256 sequences (0.5 million tokens).
Data:      as in configs/mamba_130m.py.
Expected:  128,703,232 parameters, 4,800 steps. No figure of ours yet.
"""

from typing import Any

from configs import mamba_130m
from mamba_jax.config import AttentionConfig, ExperimentConfig, Hybrid, MlpConfig, RGLRUConfig


def recipe(name: str, *, pattern: str, d_model: int, num_heads: int, **run: Any) -> ExperimentConfig:
    """The run of a model of recurrent blocks R, blocks A of local attention with one head of keys, and MLPs F."""
    mixer = Hybrid.of_pattern(
        pattern,
        R=RGLRUConfig(lru_width=4 * d_model // 3, num_heads=num_heads),
        A=AttentionConfig(num_heads=num_heads, num_kv_heads=1, window=1024),
        F=MlpConfig(hidden_dim=3 * d_model, activation="gelu_tanh"),
    )
    return mamba_130m.recipe(name, mixer=mixer, d_model=d_model, num_layers=mixer.num_blocks, **run)


def get_config() -> ExperimentConfig:
    sizes = {"pattern": "(RFRFAF)*4", "d_model": 768, "num_heads": 8}
    return recipe("griffin_like_130m", peak_lr=3e-3, num_steps=4800, **sizes)
