"""The search of the tiles of the steps' kernels, with the plain form in the kernels' place."""

import dataclasses
from pathlib import Path

import pytest

import harness
from decoding import tiles
from mamba_jax.config import Mamba2Config
from pallas_kernels.common.triton.tiles import Tile
from pallas_kernels.mamba2_step.xla import op


def test_a_search_leaves_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "LEAST_BYTES", 1)
    monkeypatch.setattr(tiles.mamba2_triton, "mamba2_step", lambda arguments, *, tiling: op.mamba2_step(arguments))
    results = harness.Results(tmp_path, harness.setting_here("a processor"))
    workload = tiles.Workload(width=16, mixer=Mamba2Config(head_dim=8), rows=2, state_dtype="bfloat16")
    search = tiles.Search(results, "toy, batch 2", workload, seconds=0.0)
    assert search.weights[0]["in_proj"].format.layout.major_to_minor == (1, 2, 0)
    search.run()
    first, best = results.measurements
    assert (first.implementation, first.milliseconds) == ("as it is", best.milliseconds)
    assert best.implementation.startswith("best: project_in=columns 32 depth 128")
    assert float(best.figures["gigabytes per second"]) > 0


def test_neighbours_differ_in_one_size() -> None:
    tile = Tile(columns=16, depth=64, stages=1, warps=4)
    found = list(tiles.neighbours(tile))
    changes = [sum(a != b for a, b in zip(vars(tile).values(), vars(other).values(), strict=True)) for other in found]
    assert set(changes) == {1}
    assert dataclasses.replace(tile, stages=2) in found
    assert min(other.stages for other in found) == 1
