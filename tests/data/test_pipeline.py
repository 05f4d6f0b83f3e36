"""Batch k depends on (seed, k) alone; evaluation reads every target once; caches follow their text."""

import dataclasses
import errno
import itertools
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from mamba_jax.config import DataConfig, ShardSource, TextFolderSource
from mamba_jax.data.batch import LMBatch
from mamba_jax.data.pipeline import TrainBatches, evaluation_batches, open_source
from mamba_jax.data.shards import TokenDataset
from mamba_jax.data.tokenizer import ByteTokenizer, make_tokenizer
from mamba_jax.errors import InputError
from tests.data.conftest import MakeStream, open_tokens
from tests.data.test_tokenizer import train_bpe

MakeConfig = Callable[..., DataConfig]
FIELDS = [field.name for field in dataclasses.fields(LMBatch)]


def assert_equal(actual: LMBatch, expected: LMBatch) -> None:
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(actual, field), getattr(expected, field))


def join(batches: list[LMBatch]) -> LMBatch:
    return jax.tree.map(lambda *parts: np.concatenate(parts), *batches)


def cut(dataset: TokenDataset, config: DataConfig, **options: int) -> Iterator[LMBatch]:
    return evaluation_batches(dataset, seq_len=config.seq_len, documents=config.documents, **options)


def window_order(dataset: TokenDataset, config: DataConfig, *, seed: int, epochs: int) -> np.ndarray:
    """Window numbers of whole epochs, found by the content of the rows."""
    count = (dataset.num_tokens - 1) // config.seq_len
    rows = dataset.read(np.arange(count) * config.seq_len, length=config.seq_len)
    number = {row.tobytes(): i for i, row in enumerate(rows)}
    assert len(number) == count, "the stream repeats itself, the test cannot tell windows apart"
    batches = TrainBatches(dataset, config, seed=seed)
    steps = -(-epochs * count // config.global_batch)
    found = [number[row.tobytes()] for step in range(steps) for row in batches.at(step).tokens]
    return np.array(found[: epochs * count]).reshape(epochs, count)


@pytest.mark.parametrize("order", ["shuffled", "streams"])
@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_out_the_same_batch(
    numbered_stream: TokenDataset, make_config: MakeConfig, process_count: int, order: str
) -> None:
    config = make_config(order=order)
    whole = TrainBatches(numbered_stream, config, seed=3)
    parts = [
        TrainBatches(numbered_stream, config, seed=3, process_index=p, process_count=process_count)
        for p in range(process_count)
    ]
    for step in (0, 1, 17, 311, 10_000):
        assert_equal(join([part.at(step) for part in parts]), whole.at(step))


@pytest.mark.parametrize("order", ["shuffled", "streams"])
@pytest.mark.parametrize("prefetch", [1, 2, 7, 40])
@pytest.mark.parametrize("start", [0, 5, 312])
def test_restart_and_prefetch_change_nothing(
    numbered_stream: TokenDataset, make_config: MakeConfig, prefetch: int, start: int, order: str
) -> None:
    batches = TrainBatches(numbered_stream, make_config(prefetch=prefetch, order=order), seed=3)
    reference = TrainBatches(numbered_stream, make_config(order=order), seed=3)
    for step, batch in enumerate(itertools.islice(batches.iterate(start), 20), start):
        assert_equal(batch, reference.at(step))


def test_every_epoch_holds_every_window_once_in_a_new_order(
    numbered_stream: TokenDataset, make_config: MakeConfig
) -> None:
    order = window_order(numbered_stream, make_config(global_batch=6), seed=0, epochs=3)
    count = (numbered_stream.num_tokens - 1) // 8
    assert order.shape == (3, count)
    np.testing.assert_array_equal(np.sort(order), np.broadcast_to(np.arange(count), order.shape))
    for a, b in itertools.combinations([np.arange(count), *order], 2):
        # Two random orders agree in one place on average (Poisson): more than ten has probability below 1e-8.
        assert np.sum(a == b) <= 10


def test_neighbouring_seeds_share_no_epoch(numbered_stream: TokenDataset, make_config: MakeConfig) -> None:
    """Epoch 1 of seed s must not be epoch 0 of seed s + 1."""
    orders = np.concatenate([window_order(numbered_stream, make_config(), seed=s, epochs=2) for s in (-1, 0, 1)])
    for a, b in itertools.combinations(orders, 2):
        assert np.sum(a == b) <= 10


def test_order_is_pinned(numbered_stream: TokenDataset, make_config: MakeConfig) -> None:
    """A change here means that interrupted runs would resume on other batches: it needs a line in the changelog."""
    order = window_order(numbered_stream, make_config(), seed=0, epochs=1)
    assert order[0, :8].tolist() == [1836, 843, 2436, 174, 1008, 1834, 1901, 949]


def test_windows_are_consecutive_text(numbered_stream: TokenDataset, make_config: MakeConfig) -> None:
    batch = TrainBatches(numbered_stream, make_config(), seed=1).at(4)
    np.testing.assert_array_equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    assert batch.segment_ids is not None
    assert batch.tokens.shape == batch.targets.shape == batch.loss_mask.shape == batch.segment_ids.shape == (8, 8)


def test_rows_of_streams_are_the_text_in_order(numbered_stream: TokenDataset, make_config: MakeConfig) -> None:
    """Three epochs of each row are that row's stream three times; the streams one after the other are the text."""
    batches = TrainBatches(numbered_stream, make_config(global_batch=6, order="streams"), seed=0)
    length = (numbered_stream.num_tokens - 1) // 8 // 6
    epochs = [join_steps([batches.at(epoch * length + k) for k in range(length)]) for epoch in range(3)]
    text = numbered_stream.read(np.array([0]), length=6 * length * 8 + 1)[0]
    for epoch in epochs:
        np.testing.assert_array_equal(epoch.tokens.reshape(-1), text[:-1])
        np.testing.assert_array_equal(epoch.targets.reshape(-1), text[1:])
    # What is left over is less than a window a row, and the last window may be incomplete.
    assert numbered_stream.num_tokens - 1 - 6 * length * 8 < 6 * 8


def join_steps(batches: list[LMBatch]) -> LMBatch:
    """The (B, L) arrays of consecutive steps as (B, steps L)."""
    rows = [dataclasses.replace(batch, continues=None) for batch in batches]
    return jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *rows)


@pytest.mark.parametrize("documents", ["packed", "concatenated"])
def test_a_row_continues_unless_a_document_ended_or_the_stream_starts_again(
    make_stream: MakeStream, make_config: MakeConfig, documents: str
) -> None:
    """Windows of 4 in two streams of 12 tokens: documents end before, on and after the last input of a window."""
    end = 256
    first = [1, 2, 3, end, 5, 6, 7, 8, end, 10, 11, 12]
    second = [13, 14, end, 16, 17, 18, 19, end, end, 22, 23, 24]
    stream = make_stream(split_documents([*first, *second, 25, end]))
    config = make_config(seq_len=4, global_batch=2, order="streams", documents=documents)
    batches = [TrainBatches(stream, config, seed=0).at(step) for step in range(7)]
    np.testing.assert_array_equal(join_steps(batches[:3]).tokens, [first, second])
    expected = {
        "packed": [[False, False], [False, True], [True, False]],
        "concatenated": [[False, False], [True, True], [True, True]],
    }[documents]
    for step, batch in enumerate(batches):
        np.testing.assert_array_equal(batch.continues, expected[step % 3], err_msg=f"step {step}")
        assert np.asarray(batch.continues).dtype == bool


def split_documents(ids: list[int]) -> list[list[int]]:
    """The documents of a stream, without the end-of-document tokens that the writer adds."""
    documents: list[list[int]] = [[]]
    for token in ids:
        if token == 256:
            documents.append([])
        else:
            documents[-1].append(token)
    return documents[:-1]


def test_streams_carry_the_segments_of_an_uncut_row(make_stream: MakeStream, make_config: MakeConfig) -> None:
    """A document change is where the segment changes within a window, or where a window does not continue."""
    rng = np.random.default_rng(0)
    stream = make_stream([rng.integers(0, 256, size=size).tolist() for size in rng.integers(1, 12, size=300)])
    config = make_config(seq_len=4, global_batch=3, order="streams")
    length = (stream.num_tokens - 1) // 4 // 3
    batches = [TrainBatches(stream, config, seed=0).at(step) for step in range(length)]
    changes = [
        np.concatenate([~np.asarray(b.continues)[:, None], np.diff(np.asarray(b.segment_ids), axis=1) != 0], axis=1)
        for b in batches
    ]
    tokens = join_steps(batches).tokens
    expected = np.concatenate([np.ones((3, 1), bool), tokens[:, :-1] == 256], axis=1)
    np.testing.assert_array_equal(np.concatenate(changes, axis=1), expected)


def test_shuffled_rows_say_nothing_of_the_batch_before(numbered_stream: TokenDataset, make_config: MakeConfig) -> None:
    assert TrainBatches(numbered_stream, make_config(), seed=0).at(1).continues is None
    assert next(cut(numbered_stream, make_config(order="streams"), batch_size=4)).continues is None


def test_damage_reaches_the_consumer_of_the_background_threads(
    make_stream: MakeStream, make_config: MakeConfig, tmp_path: Path
) -> None:
    dataset = make_stream([np.random.default_rng(0).integers(0, 256, size=50_000).tolist()])
    path = tmp_path / "shards" / "tokens-00000.array_record"
    data = bytearray(path.read_bytes())
    data[30_000] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"tokens-00000\.array_record is damaged"):
        for _ in itertools.islice(TrainBatches(dataset, make_config(), seed=0).iterate(0), 2000):
            pass


def test_too_little_text_and_uneven_batches_are_refused(make_stream: MakeStream, make_config: MakeConfig) -> None:
    dataset = make_stream([[1, 2, 3, 4, 5, 6, 7]])
    TrainBatches(dataset, make_config(seq_len=7), seed=0).at(0)
    with pytest.raises(InputError, match=r"has 8 tokens, fewer than data\.seq_len \+ 1 = 9"):
        TrainBatches(dataset, make_config(seq_len=8), seed=0)
    dataset_of_two = make_stream([list(range(16))], name="two")
    TrainBatches(dataset_of_two, make_config(global_batch=2, order="streams"), seed=0).at(0)
    with pytest.raises(InputError, match=r"has 17 tokens, fewer than data\.global_batch \* data\.seq_len \+ 1 = 25"):
        TrainBatches(dataset_of_two, make_config(global_batch=3, order="streams"), seed=0)
    with pytest.raises(InputError, match=r"data\.prefetch keeps at most 1000 batches ready, got 1000000000: lower it"):
        TrainBatches(dataset, make_config(prefetch=10**9), seed=0)
    with pytest.raises(InputError, match=r"data\.global_batch \(8\) must be divisible by the 3 processes"):
        TrainBatches(dataset, make_config(seq_len=7), seed=0, process_count=3)
    with pytest.raises(InputError, match=r"the evaluation batch size \(4\) must be divisible by the 3 processes"):
        cut(dataset, make_config(), batch_size=4, process_count=3)


@pytest.mark.parametrize("documents", ["packed", "concatenated"])
@pytest.mark.parametrize("num_tokens", [2, 8, 9, 10, 17, 64, 65, 66, 101])
def test_evaluation_covers_every_target_once(
    make_stream: MakeStream, make_config: MakeConfig, num_tokens: int, documents: str
) -> None:
    """Each id occurs once, so the targets that count say which ones were covered."""
    ids = np.arange(num_tokens - 1)
    dataset = make_stream([ids[:5].tolist(), ids[5:-1].tolist()] if num_tokens > 8 else [ids.tolist()])
    stream = dataset.read(np.array([0]), length=dataset.num_tokens)[0]
    expected = [(a, b) for a, b in itertools.pairwise(stream.tolist()) if documents == "concatenated" or a != 256]
    batches = list(cut(dataset, make_config(documents=documents), batch_size=4))
    assert {batch.tokens.shape for batch in batches} == {(4, 8)}
    assert len(batches) == -(-(num_tokens - 1) // 32)
    pairs = [np.stack([batch.tokens, batch.targets], -1)[batch.loss_mask] for batch in batches]
    assert np.concatenate(pairs).tolist() == [list(pair) for pair in expected]


@pytest.mark.parametrize("process_count", [2, 4])
def test_evaluation_is_shared_out_too(
    numbered_stream: TokenDataset, make_config: MakeConfig, process_count: int
) -> None:
    config = make_config(seq_len=700)
    whole = list(cut(numbered_stream, config, batch_size=8))
    parts = [
        list(cut(numbered_stream, config, batch_size=8, process_index=p, process_count=process_count))
        for p in range(process_count)
    ]
    for k, batch in enumerate(whole):
        assert_equal(join([part[k] for part in parts]), batch)


def test_some_evaluation_batches_are_spread_over_the_stream(
    numbered_stream: TokenDataset, make_config: MakeConfig
) -> None:
    config = make_config(seq_len=100)
    whole = list(cut(numbered_stream, config, batch_size=4))
    some = list(cut(numbered_stream, config, batch_size=4, max_batches=5))
    assert len(whole) == 50
    for batch, k in zip(some, (0, 10, 20, 30, 40), strict=True):
        assert_equal(batch, whole[k])
    many = cut(numbered_stream, config, batch_size=4, max_batches=1000)
    assert len(list(many)) == len(whole)


@pytest.fixture
def text(tmp_path: Path) -> TextFolderSource:
    (tmp_path / "text").mkdir()
    for name in "abc":
        (tmp_path / "text" / f"{name}.txt").write_text(f"the thing {name}, é\n" * 30)
    return TextFolderSource(path=str(tmp_path / "text"))


def cached(config: DataConfig) -> list[str]:
    return sorted(path.name for path in Path(config.cache_dir).iterdir())


def test_text_is_tokenised_once_for_each_text_and_tokenizer(
    text: TextFolderSource, make_config: MakeConfig, tmp_path: Path
) -> None:
    config, tokenizer = make_config(), ByteTokenizer()
    dataset = open_tokens(text, config.cache_dir, tokenizer)
    assert dataset.num_documents == 3
    assert dataset.num_bytes == sum(path.stat().st_size for path in Path(text.path).iterdir())
    first = cached(config)
    open_source(text, config.cache_dir, tokenizer)
    assert cached(config) == first
    path = Path(text.path) / "b.txt"
    path.write_text(path.read_text().replace("thing", "think"))
    os.utime(path, (1, 1))
    changed = open_tokens(text, config.cache_dir, tokenizer)
    assert len(cached(config)) == 2
    assert b"think" in changed.read(np.array([0]), length=changed.num_tokens)[0].astype(np.uint8).tobytes()
    bpe = make_tokenizer(train_bpe(tmp_path / "bpe.json"))
    assert open_tokens(text, config.cache_dir, bpe).num_tokens < changed.num_tokens
    assert len(cached(config)) == 3


def test_shards_of_another_tokenizer_are_refused(
    text: TextFolderSource, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config()
    open_source(text, config.cache_dir, ByteTokenizer())
    shards = ShardSource(path=str(Path(config.cache_dir) / cached(config)[0]))
    assert open_tokens(shards, config.cache_dir, ByteTokenizer()).num_documents == 3
    bpe = make_tokenizer(train_bpe(tmp_path / "bpe.json"))
    with pytest.raises(InputError, match="was made by another tokenizer"):
        open_source(shards, config.cache_dir, bpe)


def test_processes_may_fill_the_same_cache_and_find_the_same_damage(
    text: TextFolderSource, make_config: MakeConfig
) -> None:
    config = make_config()
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        tokens = pool.starmap(_num_tokens, [(text, config)] * 6)
        (name,) = cached(config)
        flip(Path(config.cache_dir) / name)
        tokens += pool.starmap(_num_tokens, [(text, config)] * 6)
    assert len(set(tokens)) == 1
    assert cached(config) == [name, f"{name}.1"]


def flip(folder: Path) -> None:
    path = folder / "tokens-00000.array_record"
    data = bytearray(path.read_bytes())
    data[120] ^= 1
    path.write_bytes(data)


def truncate(folder: Path) -> None:
    path = folder / "tokens-00000.array_record"
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = [
    flip,
    truncate,
    lambda folder: (folder / "index.json").unlink(),
    lambda folder: (folder / "index.json").write_text(""),
    lambda folder: (folder / "tokens-00000.array_record").unlink(),
    lambda folder: [path.unlink() for path in folder.iterdir()],
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_made_again(
    text: TextFolderSource,
    make_config: MakeConfig,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], object],
) -> None:
    config = make_config()
    dataset = open_tokens(text, config.cache_dir, ByteTokenizer())
    stream = dataset.read(np.array([0]), length=dataset.num_tokens)
    (name,) = cached(config)
    damage(Path(config.cache_dir) / name)
    capsys.readouterr()
    for message in (1, 0):
        again = open_tokens(text, config.cache_dir, ByteTokenizer())
        np.testing.assert_array_equal(again.read(np.array([0]), length=dataset.num_tokens), stream)
        assert again.identity == dataset.identity
        assert cached(config) == [name, f"{name}.1"]
        assert capsys.readouterr().err.count("tokenised text is damaged and made again: ") == message
    damage(Path(config.cache_dir) / f"{name}.1")
    open_source(text, config.cache_dir, ByteTokenizer())
    assert cached(config) == [name, f"{name}.1", f"{name}.2"]


def test_a_cache_that_cannot_be_read_or_written_is_one_line(
    text: TextFolderSource, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    open_source(text, config.cache_dir, ByteTokenizer())

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", fail)
        with pytest.raises(InputError, match=r"cannot read .*: Input/output error"):
            open_source(text, config.cache_dir, ByteTokenizer())
    with monkeypatch.context() as patch:
        # What was made is enough where nothing can be written.
        patch.setattr(Path, "mkdir", fail)
        open_source(text, config.cache_dir, ByteTokenizer())
        with pytest.raises(InputError, match=r"cannot create token shards in .*: Input/output error"):
            open_source(dataclasses.replace(text, pattern="*.txt"), config.cache_dir, ByteTokenizer())
    assert len(cached(config)) == 1


def test_the_same_text_has_the_same_identity(text: TextFolderSource, make_config: MakeConfig, tmp_path: Path) -> None:
    config, tokenizer = make_config(), ByteTokenizer()
    identity = open_source(text, config.cache_dir, tokenizer).identity
    for path in Path(text.path).iterdir():
        os.utime(path, (1, 1))
    assert open_source(text, config.cache_dir, tokenizer).identity == identity
    copy = shutil.copytree(text.path, tmp_path / "copy")
    assert open_source(TextFolderSource(path=str(copy)), config.cache_dir, tokenizer).identity == identity
    path = copy / "b.txt"
    path.write_text(path.read_text().replace("thing", "think"))
    assert open_source(TextFolderSource(path=str(copy)), config.cache_dir, tokenizer).identity != identity


def _num_tokens(text: TextFolderSource, config: DataConfig) -> int:
    return open_tokens(text, config.cache_dir, ByteTokenizer()).num_tokens
