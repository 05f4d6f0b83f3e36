"""Analytic counts of floating-point operations, and the share of a device's peak that they amount to.

A compiler's own count is of no use here: it counts the body of a loop over layers once.
"""

import math

import jax

from mamba_jax.chips import CHIPS
from mamba_jax.models.config import ModelConfig
from mamba_jax.models.parameters import define


def flops_per_token(config: ModelConfig, *, length: int) -> float:
    """Operations of forward and backward pass for one token, without recomputation.

    6 for every element of a parameter that a token is multiplied with (the table of an untied embedding is only read,
    and most experts are passed by), and what the mixers count besides: among it, for every layer, the parameters of a
    block that layers share.

    Args:
        config: config of the model.
        length: L, number of tokens in a training sequence.

    Source: arXiv 2001.08361, section 2.1, for the 6.
    """
    params = dict(define(config).params)
    if not config.tie_embeddings:
        params.pop("embedding")
    for name in config.shared_blocks:
        params.pop(f"shared_{name}")
    multiplied = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    multiplied -= sum(
        stack.repeats * stack.mixer.mixer().idle_parameters(stack.mixer, config.setting) for stack in config.stacks
    )
    mixed = sum(
        stack.repeats * stack.mixer.mixer().flops_per_token(stack.mixer, config.setting, length=length)
        for stack in config.stacks
    )
    return 6 * multiplied + mixed


def model_flops_utilization(
    config: ModelConfig, tokens_per_second: float, *, length: int, device_kind: str, num_devices: int
) -> float | None:
    """Share of the devices' peak that a training speed on sequences of a length amounts to; None if it is not known."""
    chip = CHIPS.get(device_kind)
    if chip is None:
        return None
    return tokens_per_second * flops_per_token(config, length=length) / (chip.peak_flops * num_devices)
