"""Token streams written by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mamba_jax.config import DataConfig, ShardSource, Source
from mamba_jax.data.pipeline import open_source
from mamba_jax.data.shard_writer import ShardWriter
from mamba_jax.data.shards import TokenDataset
from mamba_jax.data.tokenizer import ByteTokenizer, Tokenizer

MakeStream = Callable[..., TokenDataset]


@pytest.fixture
def make_stream(tmp_path: Path) -> MakeStream:
    """Writes documents, given as lists of ids, and opens the result."""

    def make(documents: list[list[int]], *, name: str = "shards", shard_tokens: int = 2**20) -> TokenDataset:
        with ShardWriter(tmp_path / name, ByteTokenizer().vocabulary, shard_tokens=shard_tokens) as writer:
            for ids in documents:
                writer.add(np.array(ids, dtype=np.int32), num_bytes=len(ids), ends_document=True)
            writer.finish()
        return TokenDataset(tmp_path / name)

    return make


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., DataConfig]:
    """A small config; its source is not read by the functions that take an open stream."""

    def make(**fields: Any) -> DataConfig:
        defaults: dict[str, Any] = {
            "train": ShardSource(path=str(tmp_path / "shards")),
            "seq_len": 8,
            "global_batch": 8,
            "cache_dir": str(tmp_path / "cache"),
        }
        return DataConfig(**{**defaults, **fields})

    return make


@pytest.fixture
def numbered_stream(make_stream: MakeStream) -> TokenDataset:
    """One document whose every window of four ids is unique, spread over several shards and blocks."""
    positions = np.arange(20_000)
    ids = np.where(positions % 2, positions // 2 % 251, positions // 502 % 251)
    return make_stream([ids.tolist()], shard_tokens=8192)


@pytest.fixture
def documents() -> list[np.ndarray]:
    """Ids of documents, from one byte to more than a block."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, size=size, dtype=np.int32) for size in (1, 5000, 3, 12_000, 70_001)]


@pytest.fixture
def stream(documents: list[np.ndarray]) -> np.ndarray:
    """The documents in a row, each with the byte tokenizer's end of text."""
    return np.concatenate([np.append(ids, 256) for ids in documents])


def open_tokens(source: Source, cache_dir: str, tokenizer: Tokenizer) -> TokenDataset:
    """Opens a source whose text or ids are a token stream."""
    opened = open_source(source, cache_dir, tokenizer)
    assert isinstance(opened, TokenDataset)
    return opened
