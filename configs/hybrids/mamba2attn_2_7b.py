"""Mamba-2 with six layers of attention among 64, published as mamba2attn-2.7b (arXiv 2405.21060, table 3).

Command:   python train.py configs/hybrids/mamba2attn_2_7b.py --data.tokenizer.path 20B_tokenizer.json
Hardware:  any mesh of accelerators whose size divides the batch of 512 sequences (1 million tokens).
Data:      as in configs/mamba_130m.py.
Expected:  2,697,590,880 parameters, 286,000 steps. No figure of ours yet.
"""

from configs import mamba_130m
from mamba_jax.config import AttentionConfig, ExperimentConfig, Hybrid, Mamba2Config

LAYERS, ATTENTION = 64, (9, 18, 27, 36, 45, 56)


def get_config() -> ExperimentConfig:
    mamba, attention = Mamba2Config(), AttentionConfig(num_heads=30, head_dim=128, rotary_dims=64, conv_width=4)
    mixer = Hybrid.of_blocks([attention if layer in ATTENTION else mamba for layer in range(LAYERS)])
    sizes = {"d_model": 2560, "num_layers": LAYERS, "vocab_multiple": 16}
    return mamba_130m.recipe(
        "mamba2attn_2_7b", mixer=mixer, peak_lr=4.8e-4, num_steps=286_000, global_batch=512, **sizes
    )
