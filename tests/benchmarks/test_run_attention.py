"""The benchmark of attention, at a size for a CPU."""

import sys
from pathlib import Path
from typing import Any

import pytest

import harness
import run_attention
from mamba_jax.errors import InputError
from run_attention import Workload


def test_a_run_leaves_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    small = Workload(batch=2, length=24, heads=4, kv_heads=2, channels=8, documents=3)
    monkeypatch.setattr(run_attention, "WORKLOADS", {"small": small})
    monkeypatch.setattr(harness, "select_platform", lambda device: None)
    command = [
        "run_attention.py",
        "--device",
        "cpu",
        "--seconds",
        "0.001",
        "--implementations",
        "xla",
        "cudnn",
        "torch",
    ]
    monkeypatch.setattr(sys, "argv", [*command, "--output", str(tmp_path)])
    run_attention.main()
    found = harness.read(tmp_path / harness.FILE_NAME)
    assert [(row.implementation, row.direction, row.milliseconds is None) for row in found] == [
        (name, direction, name != "xla")
        for direction in ("forward", "forward + backward")
        for name in ("xla", "cudnn", "torch")
    ]
    # Rounding of the inputs' products and of the result to 8 bits.
    assert float(found[0].figures["error"]) < 4 * 2.0**-8
    assert "runs on GPUs only" in str(found[1].figures["declined"])
    assert "small (2, 24), 4 heads of 8, 2 of keys, 3 documents" in capsys.readouterr().out


@pytest.mark.parametrize("field", ["workloads", "implementations"])
def test_an_unknown_name_is_refused(field: str) -> None:
    given: dict[str, Any] = {field: ("fast",)}
    with pytest.raises(InputError, match=f"--{field}: there is no 'fast'; choose of"):
        run_attention.Options(**given)
