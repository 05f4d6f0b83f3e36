"""The loss of cheaper decoding, on a small model with random weights."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import harness
import run_decode_quality
from mamba_jax.errors import InputError
from run_decode_quality import in_bfloat16
from tests.evaluation.conftest import SavedRun, saved_run  # noqa: F401  a fixture


@pytest.mark.slow
def test_a_run_leaves_results(
    saved_run: SavedRun,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(harness, "select_platform", lambda device: None)
    command = ["run_decode_quality.py", str(saved_run.folder), "--rows", "3", "--seq-len", "10"]
    monkeypatch.setattr(sys, "argv", [*command, "--output", str(tmp_path)])
    run_decode_quality.main()
    rows = harness.read(tmp_path / harness.FILE_NAME)
    bits = {(row.implementation, row.direction): float(row.figures["bits per byte"]) for row in rows}
    assert len(bits) == 7
    # Printed with five digits; a document ends within the rows, so states are reset on the way.
    assert bits["float32", "one by one"] == pytest.approx(bits["float32", "at once"], abs=1.1e-5)
    assert len(set(bits.values())) > 3
    # Weights that differ by 0.4 % of the largest move a random model little.
    assert all(abs(value - bits["float32", "at once"]) < 0.05 for value in bits.values())


def test_states_are_rounded_once() -> None:
    state = {"ssm": jnp.asarray([1.0, 1 + 2.0**-9, -jnp.inf]), "window": jnp.ones(1, jnp.int32)}
    found = jax.jit(in_bfloat16)(state)
    np.testing.assert_array_equal(found["ssm"], [1.0, 1.0, -np.inf])
    assert found["ssm"].dtype == jnp.float32
    assert found["window"].dtype == jnp.int32


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--seq-len must be positive, got 0"):
        run_decode_quality.Options(checkpoint=str(tmp_path), seq_len=0)
