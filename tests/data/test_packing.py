"""Segments, masks and targets of windows written by hand."""

from collections.abc import Callable

import numpy as np

from mamba_jax.config import DataConfig
from mamba_jax.data.packing import pack

END = 9


def test_packed(make_config: Callable[..., DataConfig]) -> None:
    windows = np.array([[1, 2, END, 3, END, 4], [END, END, 5, 6, 7, END]], dtype=np.int32)
    batch = pack(windows, "packed", end_of_document=END)
    np.testing.assert_array_equal(batch.tokens, [[1, 2, END, 3, END], [END, END, 5, 6, 7]])
    np.testing.assert_array_equal(batch.targets, [[2, END, 3, END, 4], [END, 5, 6, 7, END]])
    np.testing.assert_array_equal(batch.segment_ids, [[0, 0, 0, 1, 1], [0, 1, 2, 2, 2]])
    np.testing.assert_array_equal(batch.loss_mask, [[1, 1, 0, 1, 0], [0, 0, 1, 1, 1]])
    assert batch.segment_ids is not None
    assert (batch.loss_mask.dtype, batch.segment_ids.dtype) == (bool, np.int32)


def test_concatenated(make_config: Callable[..., DataConfig]) -> None:
    windows = np.array([[1, 2, END, 3, END, 4]], dtype=np.int32)
    batch = pack(windows, "concatenated", end_of_document=END)
    np.testing.assert_array_equal(batch.targets, [[2, END, 3, END, 4]])
    assert batch.segment_ids is None
    assert batch.loss_mask.all()


def test_a_counted_target_belongs_to_the_document_of_its_input(make_config: Callable[..., DataConfig]) -> None:
    """Documents spelt with one letter each: a counted target is that letter or the end."""
    rng = np.random.default_rng(0)
    stream = np.concatenate([[letter] * rng.integers(1, 9) + [END] for letter in rng.integers(0, 9, size=200)])
    windows = stream[: len(stream) // 17 * 17].reshape(-1, 17).astype(np.int32)
    batch = pack(windows, "packed", end_of_document=END)
    counted = batch.loss_mask
    assert batch.segment_ids is not None
    assert np.all((batch.targets == batch.tokens)[counted] | (batch.targets == END)[counted])
    for tokens, segments in zip(batch.tokens, batch.segment_ids, strict=True):
        for segment in np.unique(segments):
            assert len(set(tokens[segments == segment]) - {END}) <= 1
