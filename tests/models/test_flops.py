"""Operation counts by hand."""

import dataclasses

import pytest

from mamba_jax.chips import CHIPS
from mamba_jax.config import ModelConfig
from mamba_jax.models.flops import flops_per_token, model_flops_utilization

PUBLISHED_130M = ModelConfig(vocab_size=50277, d_model=768, num_layers=24)


def test_published_size() -> None:
    assert flops_per_token(PUBLISHED_130M, length=2048) == 6 * 129_135_360 + 27 * 24 * 1536 * 16


def test_untied_table_is_only_read() -> None:
    tied = flops_per_token(PUBLISHED_130M, length=2048)
    assert flops_per_token(dataclasses.replace(PUBLISHED_130M, tie_embeddings=False), length=2048) == tied


def test_utilization() -> None:
    kind = "NVIDIA H100 80GB HBM3"
    tokens_per_second = 4 * 0.5 * CHIPS[kind].peak_flops / flops_per_token(PUBLISHED_130M, length=2048)
    result = model_flops_utilization(PUBLISHED_130M, tokens_per_second, length=2048, device_kind=kind, num_devices=4)
    assert result == pytest.approx(0.5)


def test_unknown_device_has_no_utilization() -> None:
    assert model_flops_utilization(PUBLISHED_130M, 1e3, length=2048, device_kind="cpu", num_devices=1) is None
