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


def flops_per_token(config: ModelConfig) -> int:
    """Operations of forward and backward pass for one token, without recomputation.

    6 for every parameter that is multiplied (the table of an untied embedding is only read) and 27 for every element of
    the recurrent state, the count that the authors of Mamba used.

    Source: arXiv 2312.00752, openreview discussion of the training cost.
    """
    params = dict(define(config).params)
    if not config.tie_embeddings:
        params.pop("embedding")
    multiplied = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    return 6 * multiplied + 27 * config.num_layers * config.d_inner * config.mixer.state_dim


def model_flops_utilization(
    config: ModelConfig, tokens_per_second: float, *, device_kind: str, num_devices: int
) -> float | None:
    """Share of the devices' peak that a training speed amounts to; None where the peak is not known."""
    peak = PEAK_FLOPS.get(device_kind)
    return None if peak is None else tokens_per_second * flops_per_token(config) / (peak * num_devices)
