"""The arithmetic of the kernels that read one token, in a process that interprets Triton."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.triton_interpreter import compiled


@compiled
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["test_mamba1_step.py", "test_mamba2_step.py", "test_mamba2_ring.py"])
def test_arithmetic_in_the_interpreter(name: str) -> None:
    """Runs the tests of a file whose names have "interpreted"."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    path = str(Path(__file__).parent / name)
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", path, "-k", "interpreted"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]
    assert "passed" in result.stdout
