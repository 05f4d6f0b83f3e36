"""A source that the library does not know: copy symbols that come at random places between blanks."""

import dataclasses
from typing import Any, Literal

import numpy as np

from mamba_jax.config_base import require
from mamba_jax.data.batch import LMBatch
from mamba_jax.data.batches import Task
from mamba_jax.data.config import SOURCES, Source


@SOURCES.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class CopySource(Source):
    """Attributes: `kind`, `symbols`, how many ids there are to copy, and `length`, how many of them a row holds."""

    kind: Literal["copy"] = "copy"
    symbols: int = 14
    length: int = 4

    def _check(self) -> None:
        self._require_positive("symbols", "length")
        require(self.symbols <= 254, f"CopySource.symbols must be at most 254, got {self.symbols}")

    def open(self) -> Task:
        return Copy(self)


class Copy(Task):
    """Symbols 1 .. S between blanks (0), then as many marks (S + 1) as symbols: at each mark the next one is wanted."""

    def __init__(self, source: CopySource) -> None:
        self.source = source
        self.identity: dict[str, Any] = dataclasses.asdict(source)

    def batch(self, seed: int, step: int, *, batch_size: int, seq_len: int) -> LMBatch:
        count, symbols = self.source.length, self.source.symbols
        # numpy takes no negative seeds, and evaluation has negative steps.
        rng = np.random.default_rng([seed, abs(step), step < 0])
        symbols_BS = rng.integers(1, symbols + 1, (batch_size, count), dtype=np.int32)
        tokens_BL = np.zeros((batch_size, seq_len), np.int32)
        places = np.sort(rng.permuted(np.tile(np.arange(seq_len - count), (batch_size, 1)), axis=1)[:, :count], axis=1)
        np.put_along_axis(tokens_BL, places, symbols_BS, axis=1)
        tokens_BL[:, -count:] = symbols + 1
        targets_BL = np.zeros_like(tokens_BL)
        targets_BL[:, -count:] = symbols_BS
        is_mark = np.arange(seq_len) >= seq_len - count
        return LMBatch(
            tokens=tokens_BL,
            targets=targets_BL,
            loss_mask=np.broadcast_to(is_mark, tokens_BL.shape),
            segment_ids=None,
        )
