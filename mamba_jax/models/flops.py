"""Analytic counts of floating-point operations, and the peaks they are compared with.

A compiler's own count is of no use here: it counts the body of a loop over layers once.
"""

import math

import jax

from mamba_jax.models.config import ModelConfig
from mamba_jax.models.parameters import define

# Dense bfloat16 peak of one device in FLOP/s, by the device kind that JAX reports; vendors' data sheets.
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153.5e12,
}


def flops_per_token(config: ModelConfig, *, length: int) -> float:
    """Operations of forward and backward pass for one token, without recomputation.

    6 for every element of a parameter that is multiplied (the table of an untied embedding is only read), and what the
    mixers count besides.

    Args:
        config: config of the model.
        length: L, number of tokens in a training sequence.

    Source: arXiv 2001.08361, section 2.1, for the 6.
    """
    params = dict(define(config).params)
    if not config.tie_embeddings:
        params.pop("embedding")
    multiplied = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    mixed = sum(
        stack.repeats * stack.mixer.mixer().flops_per_token(stack.mixer, config.setting, length=length)
        for stack in config.stacks
    )
    return 6 * multiplied + mixed


def model_flops_utilization(
    config: ModelConfig, tokens_per_second: float, *, length: int, device_kind: str, num_devices: int
) -> float | None:
    """Share of the devices' peak that a training speed on sequences of a length amounts to; None if it is not known."""
    peak = PEAK_FLOPS.get(device_kind)
    return None if peak is None else tokens_per_second * flops_per_token(config, length=length) / (peak * num_devices)
