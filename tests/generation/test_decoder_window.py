"""A decoder remembers as much as a window of attention needs, whatever the length of the prompt."""

import jax
import jax.numpy as jnp
import numpy as np

from mamba_jax.config import AttentionConfig, ModelConfig
from mamba_jax.generation.decoder import Decoder
from mamba_jax.models import parameters


def test_a_window_is_remembered_whatever_the_prompts_length() -> None:
    config = ModelConfig(
        vocab_size=29, d_model=8, num_layers=1, mixer=AttentionConfig(num_heads=2, window=6), compute_dtype="float32"
    )
    params = jax.jit(parameters.init, static_argnums=0)(config, jax.random.key(0))
    decoder = Decoder(parameters.define(config), params)
    prompts = np.random.default_rng(0).integers(0, 29, (4, 9), dtype=np.int32)
    whole, begun = decoder.prefill(prompts), decoder.prefill(prompts[:, :5])
    # Logits of order 0.1 are sums of float32 products in another order: some ten roundings.
    np.testing.assert_allclose(
        decoder.extend(begun.state, prompts[:, 5:]).logits, whole.logits, rtol=2.0**-20, atol=2.0**-20
    )
    assert jax.tree.map(jnp.shape, begun.state) == jax.tree.map(jnp.shape, decoder.start(4))
