"""Answers that are counted in parts are those of one pass over whole rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax.config import AttentionConfig, Hybrid, Mamba1Config, MeshConfig, ModelConfig, SyntheticSource
from mamba_jax.data.batch import LMBatch
from mamba_jax.data.pipeline import evaluation_batches
from mamba_jax.errors import InputError
from mamba_jax.evaluation.answers import measure_answers
from mamba_jax.models.config import MixerConfig
from mamba_jax.models.parameters import Params, define, init
from mamba_jax.sharding import make_mesh

SOURCE = SyntheticSource(task="associative_recall", num_ids=8, items=3)
MAMBA = Mamba1Config(state_dim=2, expand=1)


def model(mixer: MixerConfig | Hybrid) -> tuple[ModelConfig, Params]:
    config = ModelConfig(vocab_size=9, d_model=8, num_layers=2, mixer=mixer, compute_dtype="float32", remat="none")
    params = init(config, jax.random.key(0))
    # A head whose likeliest id differs from place to place.
    return config, jax.tree.map(lambda leaf: 8 * leaf if leaf.shape == (16, 8) else leaf, params)


def batches(count: int = 2) -> list[LMBatch]:
    found = evaluation_batches(SOURCE.open(), seq_len=24, documents="concatenated", batch_size=4, max_batches=count)
    return list(found)


@pytest.mark.parametrize(
    "mixer", [MAMBA, Hybrid.of_pattern("MA", M=MAMBA, A=AttentionConfig(num_heads=2))], ids=["mamba", "hybrid"]
)
def test_parts_add_up(mixer: MixerConfig | Hybrid) -> None:
    config, params = model(mixer)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    given = batches()
    right, losses = [], []
    for batch in given:
        logits = define(config).merge(params)(batch.tokens).logits
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(batch.targets)[..., None], axis=-1)[..., 0]
        right += [hit[mask] for hit, mask in zip(np.argmax(logits, -1) == batch.targets, batch.loss_mask, strict=True)]
        losses += np.asarray(log_p)[batch.loss_mask].tolist()
    for part_length in (None, 24, 7, 1):
        found = measure_answers(define(config), params, given, mesh=mesh, part_length=part_length)
        assert (found.num_answers, found.num_rows) == (24, 8)
        assert found.accuracy == np.mean(right)
        assert found.exact_match == np.mean([row.all() for row in right])
        # float32 sums in another order over 24 places and 8 ids: some ten roundings of 6e-8 of numbers below 8.
        assert found.loss == pytest.approx(-np.mean(losses), abs=1e-5)


def test_nothing_asked_and_nothing_known() -> None:
    config, params = model(MAMBA)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    silent = [dataclasses.replace(batch, loss_mask=np.zeros_like(batch.loss_mask)) for batch in batches(1)]
    with pytest.raises(InputError, match="ask for no answers"):
        measure_answers(define(config), params, silent, mesh=mesh)
    broken = jax.tree.map(lambda leaf: leaf * np.nan, params)
    with pytest.raises(InputError, match="not finite"):
        measure_answers(define(config), broken, batches(1), mesh=mesh)
