"""Operation counts by hand."""

import dataclasses

import pytest

from mamba_jax.chips import CHIPS
from mamba_jax.config import LoraConfig, ModelConfig, OptimizerConfig
from mamba_jax.models.flops import flops_per_token, model_flops_utilization
from mamba_jax.models.parameters import define
from mamba_jax.models.storage.low_rank import adapted
from mamba_jax.training.optimizer import with_frozen

PUBLISHED_130M = ModelConfig(vocab_size=50277, d_model=768, num_layers=24)


def test_published_size() -> None:
    assert flops_per_token(PUBLISHED_130M, length=2048) == 6 * 129_135_360 + 27 * 24 * 1536 * 16


def test_untied_table_is_only_read() -> None:
    tied = flops_per_token(PUBLISHED_130M, length=2048)
    assert flops_per_token(dataclasses.replace(PUBLISHED_130M, tie_embeddings=False), length=2048) == tied


def test_what_is_not_trained_has_no_gradient_of_its_own() -> None:
    """An adapter of rank 1 has as many parameters as its projection has inputs and outputs."""
    adapters = 24 * ((768 + 3072) + (1536 + 80) + (48 + 1536) + (1536 + 768))
    definition = adapted(define(PUBLISHED_130M), LoraConfig(rank=1))
    assert definition.num_trained == adapters
    scan = 27 * 24 * 1536 * 16
    found = flops_per_token(PUBLISHED_130M, length=2048, definition=definition)
    assert found == 4 * 129_135_360 + 6 * adapters + scan
    # The first half of the layers, but for the table and the last norm.
    frozen = with_frozen(
        define(PUBLISHED_130M), OptimizerConfig(peak_lr=1e-3, lr_multipliers=((r"layers/(\d|10|11)/", 0.0),))
    )
    half = (129_135_360 - 768 * (50_280 + 1)) // 2
    assert frozen.num_trained == 129_135_360 - half
    found = flops_per_token(PUBLISHED_130M, length=2048, definition=frozen)
    assert found == pytest.approx(6 * 129_135_360 - 2 * half + scan, rel=1e-12)


def test_utilization() -> None:
    kind = "NVIDIA H100 80GB HBM3"
    tokens_per_second = 4 * 0.5 * CHIPS[kind].peak_flops / flops_per_token(PUBLISHED_130M, length=2048)
    result = model_flops_utilization(PUBLISHED_130M, tokens_per_second, length=2048, device_kind=kind, num_devices=4)
    assert result == pytest.approx(0.5)


def test_unknown_device_has_no_utilization() -> None:
    assert model_flops_utilization(PUBLISHED_130M, 1e3, length=2048, device_kind="cpu", num_devices=1) is None
