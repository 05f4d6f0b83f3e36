"""The benchmark of generation, at a size for a CPU."""

import sys
from pathlib import Path

import pytest

import harness
import run_decode
from mamba_jax.config import Mamba1Config


def test_a_run_leaves_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_decode, "SIZES", {"quickstart": (16, 2, Mamba1Config(state_dim=4))})
    monkeypatch.setattr(harness, "select_platform", lambda device: None)
    monkeypatch.setattr(run_decode, "select_platform", lambda device: None)
    command = ["run_decode.py", "--batches", "2", "--num-tokens", "3", "--seconds", "0.001", "--prompts", "1"]
    command += ["--prompt-length", "8", "--requests", "3", "--rows", "2", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    run_decode.main()
    found = harness.read(tmp_path / harness.FILE_NAME)
    assert [(row.op, row.workload, row.implementation) for row in found] == [
        ("decoding", "quickstart, batch 2", "best"),
        ("reading prompts", "quickstart, batch 1, prompts of 8", "best"),
        ("engine", "quickstart, 3 texts, 2 rows", "mixed lengths"),
        ("engine", "quickstart, 3 texts, 2 rows", "equal lengths"),
    ]
    decoding = found[0]
    assert decoding.milliseconds is not None
    assert float(decoding.figures["tokens per second"]) == pytest.approx(2 * 1e3 / decoding.milliseconds)


def test_texts_of_both_kinds_are_as_many_and_about_as_long() -> None:
    options = run_decode.Options(requests=200)
    mixed, equal = (run_decode.engine_requests(kind, options, 264) for kind in ("mixed", "equal"))
    assert len(mixed) == len(equal) == 200
    assert len({len(request.tokens) for request in mixed}) > 50
    assert {len(request.tokens) for request in equal} == {132}
    assert sum(len(request.tokens) for request in mixed) == pytest.approx(200 * 132, rel=0.1)
    assert sum(request.num_tokens for request in mixed) == pytest.approx(200 * 72, rel=0.1)
