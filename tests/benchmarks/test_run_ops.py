"""The benchmark of ops: what it times, and what the times amount to."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import bounds
import harness
import run_ops
from bounds import Bound, Chip, bound, chip
from mamba_jax.errors import InputError
from pallas_kernels.common.arg_spec import Work
from pallas_kernels.manifests import MANIFESTS

SIZES = {"B": 8, "L": 2048, "E": 1536, "N": 16}
H100 = "NVIDIA H100 80GB HBM3"


def test_a_run_leaves_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["--op", "causal_conv1d", "--shapes", "1x16x8x4", "--seconds", "0", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["run_ops.py", *command])
    run_ops.main()
    lines = [json.loads(line) for line in (tmp_path / harness.FILE_NAME).read_text().splitlines()]
    assert {line["workload"] for line in lines} == {"1x16x8x4 float32"}
    programs = [(line["implementation"], line["direction"]) for line in lines]
    assert ("xla", "forward + backward") in programs
    assert len(set(programs)) == len(programs) == 6
    assert all(line["milliseconds"] > 0 and line["figures"]["CPU ms"] >= 0 for line in lines)
    (page,) = tmp_path.glob("ops_cpu_*.md")
    assert page.read_text().count("| xla |") == 2


def test_a_run_on_a_gpu_says_what_its_times_amount_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run on a GPU does, with the implementations that run on a CPU too."""
    monkeypatch.setattr(harness, "select_platform", lambda device: None)
    monkeypatch.setattr(harness, "hardware", lambda: H100)
    monkeypatch.setitem(run_ops.IMPLEMENTATIONS["causal_conv1d"], "gpu", ("xla",))
    monkeypatch.setattr(run_ops, "UPDATES", 2)
    for op, shape in (("causal_conv1d", "1x16x8x4"), ("selective_state_update", "2x8x4")):
        command = ["--op", op, "--device", "gpu", "--shapes", shape, "--dtypes", "bfloat16", "--seconds", "0"]
        monkeypatch.setattr(sys, "argv", ["run_ops.py", *command, "--output", str(tmp_path)])
        run_ops.main()
    results = harness.read(tmp_path / harness.FILE_NAME)
    assert {result.setting.hardware for result in results} == {H100}
    *convolutions, update = results
    assert [result.direction for result in convolutions] == ["forward", "forward + backward"] * 2
    for result in convolutions:
        assert result.figures["bound by"] == "memory"
        figures: dict[str, Any] = result.figures
        share = 100 * figures["bound ms"] / result.milliseconds
        assert figures["of bound %"] == pytest.approx(share)
    assert (update.op, update.direction) == ("selective_state_update", "forward")
    assert "bound ms" not in update.figures, "the state need not cross the memory in a loop"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"op": "scan"}, r"unknown op 'scan'; there are .*selective_scan"),
        ({"op": "selective_scan", "workloads": ("huge",)}, r"unknown workload 'huge'; there are long, mamba_130m"),
        (
            {"op": "causal_conv1d", "shapes": ("8x2",)},
            r"causal_conv1d: '8x2' is not a shape.* batch x length x channels",
        ),
        ({"shapes": ("8x2",)}, r"--shapes and --workloads need --op"),
    ],
)
def test_unknown_names_say_what_there_is(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        run_ops.calls(run_ops.Options(**options))


def test_calls_suit_the_device() -> None:
    for device, platform in (("cpu", "cpu"), ("gpu", "accelerator"), ("tpu", "accelerator")):
        chosen = run_ops.calls(run_ops.Options(device=device))
        assert chosen == {op: list(manifest.timed.get(platform, ())) for op, manifest in MANIFESTS.items()}
        assert len(chosen["selective_scan"]) > 2
    (spec,) = run_ops.calls(run_ops.Options(op="selective_scan", shapes=("1x2x3x4",)))["selective_scan"]
    assert MANIFESTS["selective_scan"].shape_text(spec) == "1x2x3x4"


def test_the_unit_that_needs_most_is_the_bound() -> None:
    chip = Chip(memory=100.0, vector=10.0, special=1.0, matrix=1000.0)
    work = Work(vector={"B": 5}, special={"B": 1}, matrix={"BL": 1})
    sizes = {"B": 2, "L": 3}
    assert bound(chip, moved=100, passes=[work], sizes=sizes) == Bound(milliseconds=2000.0, unit="special")
    assert bound(chip, moved=100, passes=[work, Work(vector={"B": 20})], sizes=sizes).unit == "vector"
    assert bound(chip, moved=900, passes=[work], sizes=sizes) == Bound(milliseconds=9000.0, unit="memory")
    unknown = Chip(memory=100.0, vector=None, special=None, matrix=1000.0)
    assert bound(unknown, moved=100, passes=[work], sizes=sizes) == Bound(milliseconds=1000.0, unit="memory")


def test_the_scan_on_an_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 exponentials a token and channel, and four more, at 16 a cycle of 132 multiprocessors at 1.98 GHz."""
    spec = MANIFESTS["selective_scan"].workload("mamba_130m")
    monkeypatch.setattr(run_ops.harness, "hardware", lambda: H100)
    figures = run_ops.comparisons(
        "selective_scan", spec, "bfloat16", "forward", sizes=SIZES, moved=193.1 * 2**20, milliseconds=0.216
    )
    least = 8 * 2048 * 1536 * 20 / (16 * 132 * 1.98e9) * 1e3
    assert figures["bound_by"] == "special"
    assert figures["bound_ms"] == pytest.approx(least, rel=1e-9)
    assert figures["of_bound_%"] == pytest.approx(100 * least / 0.216, rel=1e-9)
    assert figures["of_official_CUDA"] == pytest.approx(0.216 / 0.485)
    monkeypatch.setattr(run_ops.harness, "hardware", lambda: "another")
    assert (
        run_ops.comparisons("selective_scan", spec, "float32", "forward", sizes=SIZES, moved=1.0, milliseconds=1.0)
        == {}
    )


def test_rates_are_those_of_the_data_sheets() -> None:
    """NVIDIA gives 66.9 and 19.5 TFLOP/s in float32."""
    for kind, rate in ((H100, 66.9e12), ("NVIDIA A100-SXM4-80GB", 19.5e12)):
        rates = chip(kind)
        assert rates is not None
        assert rates.vector == pytest.approx(rate, rel=2e-3)
    assert bounds.H100.number == 132
