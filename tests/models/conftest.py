"""Small models for tests."""

import dataclasses
from typing import Any

import pytest
from jaxtyping import config as jaxtyping_config

from mamba_jax.config import Mamba1Config, ModelConfig


def small_config(*, mixer: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    """Two layers of width 16 in float32."""
    base = ModelConfig(
        vocab_size=29,
        d_model=16,
        num_layers=2,
        mixer=dataclasses.replace(Mamba1Config(state_dim=4), **(mixer or {})),
        compute_dtype="float32",
        remat="none",
    )
    return dataclasses.replace(base, **changes)


@pytest.fixture(name="small_config")
def small_config_fixture():
    return small_config


@pytest.fixture
def only_our_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the annotations' run-time checks, as in production."""
    monkeypatch.setattr(jaxtyping_config, "jaxtyping_disable", True)
