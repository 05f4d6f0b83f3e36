"""Whatever happens to the bytes of a shard folder, it gives the batches that were written or one line."""

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_jax.config import DataConfig, ShardSource
from mamba_jax.data.pipeline import TrainBatches
from mamba_jax.data.shard_index import BLOCK_TOKENS
from mamba_jax.data.shard_writer import ShardWriter
from mamba_jax.data.tokenizer import ByteTokenizer
from mamba_jax.errors import InputError
from tests.data.conftest import open_tokens
from tests.data.test_shard_damage import make_version_1

FILES = ["index.json", *(f"tokens-{shard:05}.array_record" for shard in range(3))]
# Far above what an example takes, far below what an endless one would.
LONGEST_SECONDS = 20.0


def batches(folder: Path) -> bytes:
    config = DataConfig(train=ShardSource(path=str(folder)), seq_len=2048, global_batch=8)
    found = TrainBatches(open_tokens(config.train, config.cache_dir, ByteTokenizer()), config, seed=0).at(0)
    return b"".join(np.asarray(part).tobytes() for part in (found.tokens, found.targets, found.loss_mask))


class Folder:
    """A sound folder, and a copy of it for each trial."""

    def __init__(self, place: Path, version: int) -> None:
        documents = np.random.default_rng(0).integers(0, 256, size=(4, 4600))
        with ShardWriter(place / "sound", ByteTokenizer().vocabulary, shard_tokens=2 * BLOCK_TOKENS) as writer:
            for ids in documents:
                writer.add(ids, num_bytes=len(ids), ends_document=True)
            writer.finish()
        if version == 1:
            make_version_1(place / "sound")
        self.sound, self.copy = place / "sound", place / "copy"
        self.good = batches(self.sound)
        assert sorted(path.name for path in self.sound.iterdir()) == FILES

    def holds(self, change: Callable[[Path], object]) -> None:
        """The batches are as they were, or there is one line, after `change` of the copy."""
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(self.sound, self.copy)
        change(self.copy)
        start, message = time.monotonic(), "one line"
        try:
            assert batches(self.copy) == self.good
        except InputError as error:
            message = str(error)
        assert message.isprintable()
        assert len(message) < 2100
        assert time.monotonic() - start < LONGEST_SECONDS


@pytest.fixture(scope="module", params=[1, 2])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder(tmp_path_factory.mktemp("fuzz"), request.param)


def damage(seed: int, *, index: bool) -> Callable[[Path], None]:
    """Bits flipped, parts zeroed, repeated, removed or exchanged, chosen by the seed."""

    def change(folder: Path) -> None:
        draw = random.Random(seed)
        path = folder / ("index.json" if index else draw.choice(FILES[1:]))
        data = bytearray(path.read_bytes())
        for _ in range(draw.choice([1, 1, 1, 2, 10])):
            if not data:
                break
            # Structure is at the beginning.
            place = draw.choice([draw.randrange(len(data)), draw.randrange(min(len(data), 200))])
            end = place + draw.choice([1, 1, 8, 64, 5000])
            size = len(data[place:end])
            new = draw.choice([bytes(size), draw.randbytes(size), data[:size], data[place:end][::-1], b""])
            if draw.random() < 0.5:
                new = bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 : end]
            data[place:end] = new
        path.write_bytes(data)

    return change


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9000),
    st.sampled_from([2**31, 2**53, 2**63, 2**64, -(2**63), 10**400]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=12),
    st.sampled_from(["uint32", "tokens-00001.array_record", "0" * 64, "a" * 5000, "../x", "\udcff", "\n"]),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def edit(place: float, value: Any, remove: bool) -> Callable[[Path], None]:
    """One value of the index replaced or removed."""

    def places(node: Any) -> list[tuple[Any, Any]]:
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        return [found for key, item in items for found in [(node, key), *places(item)]]

    def change(folder: Path) -> None:
        index = json.loads((folder / "index.json").read_text())
        found = places(index)
        node, key = found[int(place * len(found))]
        if remove:
            del node[key]
        else:
            node[key] = value
        (folder / "index.json").write_text(json.dumps(index))

    return change


SEEDS = st.integers(0, 2**32)
PLACES = st.floats(0, 1, exclude_max=True)
quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)
long = settings(max_examples=1500, deadline=None, derandomize=True, database=None)


@quick
@given(seed=SEEDS, index=st.booleans())
def test_damaged_bytes(folder: Folder, seed: int, index: bool) -> None:
    folder.holds(damage(seed, index=index))


@quick
@given(place=PLACES, value=VALUES, remove=st.booleans())
def test_edited_index(folder: Folder, place: float, value: Any, remove: bool) -> None:
    folder.holds(edit(place, value, remove))


@pytest.mark.slow
@long
@given(seed=SEEDS, index=st.booleans())
def test_damaged_bytes_at_length(folder: Folder, seed: int, index: bool) -> None:
    folder.holds(damage(seed, index=index))


@pytest.mark.slow
@long
@given(place=PLACES, value=VALUES, remove=st.booleans())
def test_edited_index_at_length(folder: Folder, place: float, value: Any, remove: bool) -> None:
    folder.holds(edit(place, value, remove))
