"""Transformer++ of 125M, the Llama recipe of arXiv 2312.00752, appendix E.2.1, with 2.5 billion tokens of C4.

RoPE, SwiGLU, RMSNorm, no biases, and 5 times the learning rate of GPT-3.

Command:   python train.py configs/transformers/transformerpp_125m.py --data.tokenizer.path 20B_tokenizer.json
Hardware:  any mesh of accelerators whose size divides the batch of 256 sequences (0.5 million tokens).
Data:      as in configs/mamba_130m.py.
Expected:  123,568,896 parameters, 4,800 steps. No figure of ours yet.
"""

from typing import Any

from configs import mamba_130m
from mamba_jax.config import AttentionConfig, ExperimentConfig, Hybrid, MlpConfig


def recipe(name: str, *, num_layers: int, num_heads: int, **run: Any) -> ExperimentConfig:
    """The run of a model of so many layers, each of them attention and an MLP."""
    mixer = Hybrid.of_pattern(f"(AF)*{num_layers}", A=AttentionConfig(num_heads=num_heads), F=MlpConfig())
    return mamba_130m.recipe(name, mixer=mixer, num_layers=2 * num_layers, **run)


def get_config() -> ExperimentConfig:
    return recipe("transformerpp_125m", d_model=768, num_layers=12, num_heads=12, peak_lr=3e-3, num_steps=4800)
