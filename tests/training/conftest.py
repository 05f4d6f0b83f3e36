"""Runs small enough to train in a test, which share what they compile where they can."""

from collections.abc import Callable

import pytest

from mamba_jax.config import ExperimentConfig
from tests.runs import corpus, shared_step
from tests.runs import make_config as any_config

__all__ = ["any_config", "corpus", "shared_step"]


@pytest.fixture(scope="session")
def make_config(any_config: Callable[..., ExperimentConfig]) -> Callable[..., ExperimentConfig]:
    """As in other tests, with the options that make no difference to a test already on: its program is then shared."""
    return lambda **fields: any_config(**{"z_loss": 1e-3, "ema_decay": 0.75, **fields})
