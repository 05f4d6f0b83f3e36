"""Analytic counts of floating-point operations, and the share of a device's peak that they amount to.

A compiler's own count is of no use here: it counts the body of a loop over layers once.
"""

import math

import jax
import numpy as np

from mamba_jax.chips import CHIPS
from mamba_jax.models.config import ModelConfig
from mamba_jax.models.parameters import ModelDefinition, define


def flops_per_token(config: ModelConfig, *, length: int, definition: ModelDefinition | None = None) -> float:
    """Operations of forward and backward pass for one token, without recomputation.

    6 for every element of a parameter that a token is multiplied with (the table of an untied embedding is only read,
    and most experts are passed by), and what the mixers count besides: among it, for every layer, the parameters of a
    block that layers share.

    4 for an element that is not trained: its gradient is left out, and that of its inputs counts, although below the
    first layer that is trained nothing asks for it.

    Args:
        config: config of the model.
        length: L, number of tokens in a training sequence.
        definition: the model as it is trained; None trains all of it. It may have adapters.

    Source: arXiv 2001.08361, section 2.1, for the 6.
    """
    definition = definition or define(config)
    unread = {f"shared_{name}" for name in config.shared_blocks}
    if not config.tie_embeddings:
        unread.add("embedding")
    params, trained = (
        {name: part for name, part in tree.items() if name not in unread}
        for tree in (definition.params, definition.trained)
    )
    counts = jax.tree.map(lambda leaf, layers: _per_element(layers) * math.prod(leaf.shape), params, trained)
    multiplied = sum(jax.tree.leaves(counts))
    idle = sum(
        stack.repeats * stack.mixer.mixer().idle_parameters(stack.mixer, config.setting) for stack in config.stacks
    )
    # Experts: of a model that is trained in part they are taken for frozen.
    multiplied -= _per_element(all(map(np.all, jax.tree.leaves(trained)))) * idle
    mixed = sum(
        stack.repeats * stack.mixer.mixer().flops_per_token(stack.mixer, config.setting, length=length)
        for stack in config.stacks
    )
    return multiplied + mixed


def _per_element(is_trained: bool | np.ndarray) -> float:
    """Operations of an element of a parameter, or of one whose layers are trained in part."""
    return 4 + 2 * float(np.mean(is_trained))


def model_flops_utilization(
    config: ModelConfig,
    tokens_per_second: float,
    *,
    length: int,
    device_kind: str,
    num_devices: int,
    definition: ModelDefinition | None = None,
) -> float | None:
    """Share of the devices' peak that a training speed on sequences of a length amounts to; None if it is not known."""
    chip = CHIPS.get(device_kind)
    if chip is None:
        return None
    flops = flops_per_token(config, length=length, definition=definition)
    return tokens_per_second * flops / (chip.peak_flops * num_devices)
