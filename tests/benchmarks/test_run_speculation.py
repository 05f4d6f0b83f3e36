"""The benchmark of speculative decoding, on a small model that is its own draft."""

import sys
from pathlib import Path

import pytest

import harness
import run_speculation
from tests.evaluation.conftest import SavedRun, saved_run  # noqa: F401  a fixture


@pytest.mark.slow
def test_a_run_leaves_results(
    saved_run: SavedRun,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run_speculation, "select_platform", lambda device: None)
    command = ["run_speculation.py", str(saved_run.folder), str(saved_run.folder), "--temperature", "0"]
    command += ["--prompts", "2", "--prompt-length", "8", "--num-tokens", "6", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    run_speculation.main()
    plain, drafted = harness.read(tmp_path / harness.FILE_NAME)
    assert (plain.implementation, drafted.implementation) == ("no draft", "4 proposals")
    assert drafted.figures["equal texts"] == 2
    # A text may end within a round, whose last proposals are then not counted.
    assert float(drafted.figures["acceptance"]) > 0.5
