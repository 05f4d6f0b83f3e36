"""Held-out loss against a plain sum over every token."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax.config import MeshConfig
from mamba_jax.data.batch import LMBatch
from mamba_jax.data.pipeline import evaluation_batches
from mamba_jax.data.shards import TokenDataset
from mamba_jax.data.tokenizer import ByteTokenizer
from mamba_jax.errors import InputError
from mamba_jax.evaluation import perplexity
from mamba_jax.evaluation.perplexity import Perplexity, evaluate
from mamba_jax.models.parameters import define
from mamba_jax.sharding import make_mesh
from tests.data.conftest import open_tokens
from tests.evaluation.conftest import SavedRun


@pytest.fixture(scope="module")
def dataset(saved_run: SavedRun) -> TokenDataset:
    data = saved_run.config.data
    assert data.validation is not None
    return open_tokens(data.validation, data.cache_dir, ByteTokenizer())


def cut(saved_run: SavedRun, dataset: TokenDataset, **options: int) -> Iterator[LMBatch]:
    data = saved_run.config.data
    return evaluation_batches(dataset, seq_len=data.seq_len, documents=data.documents, **options)


def measure(saved_run: SavedRun, dataset: TokenDataset, *, batch_size: int, devices: int = 1, **options) -> Perplexity:
    return evaluate(
        define(saved_run.config.model),
        saved_run.params,
        cut(saved_run, dataset, batch_size=batch_size, **options),
        mesh=make_mesh(MeshConfig(), jax.devices()[:devices]),
        tokens_per_byte=dataset.num_tokens / dataset.num_bytes,
        loss_chunk=5,
    )


def test_equals_a_sum_over_all_tokens(saved_run: SavedRun, dataset: TokenDataset) -> None:
    """Windows of 12 tokens, the last one shorter, each from a zero state; every token but the first is predicted."""
    tokens = dataset.read(np.array([0]), length=dataset.num_tokens)[0]
    model = jax.jit(lambda window: define(saved_run.config.model).merge(saved_run.params)(window).logits)
    total = 0.0
    for start in range(0, len(tokens) - 1, 12):
        window = tokens[start : start + 13]
        padded = np.zeros(12, np.int32)
        padded[: len(window) - 1] = window[:-1]
        logits = np.asarray(model(jnp.asarray(padded[None])), np.float64)[0, : len(window) - 1]
        partition = np.log(np.exp(logits).sum(-1))
        total += (partition - logits[np.arange(len(window) - 1), window[1:]]).sum()
    result = measure(saved_run, dataset, batch_size=4)
    assert result.num_tokens == len(tokens) - 1
    # Logits are computed twice in float32, of order 10 and with some 100 roundings each: below 1e-6 relative.
    assert result.loss == pytest.approx(total / (len(tokens) - 1), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(result.loss), rel=1e-12)
    text_bytes = 2 * sum(dataset.read(np.array([0]), length=dataset.num_tokens)[0] == 0xC3)
    assert dataset.num_bytes == len(tokens) - 3
    assert 0 < text_bytes < dataset.num_bytes
    expected = result.loss / math.log(2) * len(tokens) / (len(tokens) - 3)
    assert result.bits_per_byte == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("batch_size", "devices"), [(1, 1), (3, 1), (64, 1), (8, 8)])
def test_does_not_depend_on_the_batch(
    saved_run: SavedRun, dataset: TokenDataset, batch_size: int, devices: int
) -> None:
    """Padded rows and another split over devices change nothing but the order of float32 sums of up to 64 x 12."""
    reference = measure(saved_run, dataset, batch_size=4)
    result = measure(saved_run, dataset, batch_size=batch_size, devices=devices)
    assert result.num_tokens == reference.num_tokens
    assert result.loss == pytest.approx(reference.loss, rel=64 * 12 * 2.0**-24)


def test_some_batches_only(saved_run: SavedRun, dataset: TokenDataset) -> None:
    assert measure(saved_run, dataset, batch_size=2, max_batches=2).num_tokens == 2 * 2 * 12


def test_compiles_once(saved_run: SavedRun, dataset: TokenDataset) -> None:
    measure(saved_run, dataset, batch_size=2)
    program: Any = perplexity._program(make_mesh(MeshConfig(), jax.devices()[:1]))
    before = program._cache_size()
    measure(saved_run, dataset, batch_size=2)
    assert program._cache_size() == before > 0


def test_nothing_to_predict(saved_run: SavedRun, dataset: TokenDataset) -> None:
    masked = (
        dataclasses.replace(batch, loss_mask=np.zeros_like(batch.loss_mask))
        for batch in cut(saved_run, dataset, batch_size=4)
    )
    with pytest.raises(InputError, match="no token to predict"):
        evaluate(
            define(saved_run.config.model),
            saved_run.params,
            masked,
            mesh=make_mesh(MeshConfig(), jax.devices()[:1]),
            tokens_per_byte=1.0,
            loss_chunk=5,
        )
