"""A small model that the tests of generation share, and so its programs."""

import jax
import pytest

from mamba_jax.config import Mamba1Config, ModelConfig
from mamba_jax.generation.decoder import Decoder
from mamba_jax.models import parameters

CONFIG = ModelConfig(
    vocab_size=29,
    d_model=16,
    num_layers=2,
    mixer=Mamba1Config(state_dim=4),
    embedding_std=1.0,
    tie_embeddings=False,
    compute_dtype="float32",
)


@pytest.fixture(scope="session")
def decoder() -> Decoder:
    return Decoder(parameters.define(CONFIG), jax.jit(parameters.init, static_argnums=0)(CONFIG, jax.random.key(0)))
