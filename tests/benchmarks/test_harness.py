"""The benchmarks' harness: results are timed, kept, read, rendered and compared."""

import dataclasses
import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import compare
import harness
from harness import Measurement, Results, Setting, setting_here
from mamba_jax.errors import InputError

SETTING = Setting(
    hardware="NVIDIA H100 80GB HBM3",
    versions={"Python": "3.12.3", "jax": "0.11.2"},
    command="python benchmarks/run_ops.py --device gpu",
    commit="abc1234",
    date="2026-11-26T12:00:00",
)
LATER = dataclasses.replace(SETTING, commit="def5678", date="2026-11-27T12:00:00")


def result(milliseconds: float | None, setting: Setting = SETTING, **changes: str) -> Measurement:
    fields = {"op": "selective_scan", "workload": "mamba_130m 8x2048x1536x16 bfloat16", "implementation": "xla"}
    fields |= {"direction": "forward"} | changes
    return Measurement(**fields, milliseconds=milliseconds, figures={"CPU ms": 2.5}, setting=setting)


class FakeProgram:
    """A program on a clock of its own: its calls take given times, in seconds, the last of them forever after."""

    def __init__(self, *durations: float) -> None:
        self.now = 0.0
        self.calls = 0
        self._durations: Iterator[float] = itertools.chain(durations, itertools.repeat(durations[-1]))

    def __call__(self) -> None:
        self.calls += 1
        self.now += next(self._durations)

    def wall(self) -> float:
        return self.now

    def cpu(self) -> float:
        return 2 * self.now


def test_the_best_of_separate_calls() -> None:
    # The first compiles, the second is a trial.
    program = FakeProgram(9.0, 1.0, 0.5, 0.25, 0.75)
    timing = harness.time_calls(program, seconds=2.0, in_a_row=False, wall=program.wall, cpu=program.cpu)
    assert timing == harness.Timing(milliseconds=250.0, cpu_milliseconds=500.0)
    assert program.calls == 2 + 4, "0.5 + 0.25 + 0.75 is short of two seconds, another 0.75 is not"


def test_the_median_of_calls_in_a_row() -> None:
    # A trial of 8 ms lets two calls into 20 ms: samples of mean 6, 3 and 4 ms.
    program = FakeProgram(1.0, 0.008, 0.008, 0.004, 0.002, 0.004, 0.004)
    timing = harness.time_calls(program, seconds=0.0, in_a_row=True, wall=program.wall, cpu=program.cpu)
    assert timing.milliseconds == pytest.approx(4.0)
    assert timing.cpu_milliseconds == pytest.approx(8.0)
    assert program.calls == 2 + 3 * 2


def test_results_are_kept_read_and_rendered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = Results(tmp_path / "results", SETTING)
    name = "mamba_130m 8x2048x1536x16 bfloat16"
    results.add(
        "selective_scan", name, implementation="xla", direction="forward", milliseconds=8.639, bound_by="special"
    )
    assert "8.639" in capsys.readouterr().out
    file = tmp_path / "results" / harness.FILE_NAME
    assert harness.read(file) == results.measurements, "a run that is cut short leaves what it has"
    line = json.loads(file.read_text())
    assert line["setting"]["hardware"] == SETTING.hardware
    results.add("training step", "small", implementation="block", direction="step", peak_MiB=4213.4, none=None)
    assert harness.read(file) == results.measurements
    page = results.write_table("ops_gpu", "Cost of the ops", "How to read it.")
    assert page == tmp_path / "results" / "ops_gpu_2026-11-26.md"
    assert page.read_text() == (
        "# Cost of the ops, 2026-11-26\n\n"
        "Hardware: NVIDIA H100 80GB HBM3.\n"
        "Software: Python 3.12.3, jax 0.11.2; commit abc1234.\n"
        "Command: `python benchmarks/run_ops.py --device gpu`\n\n"
        "How to read it.\n\n"
        "## selective_scan, mamba_130m 8x2048x1536x16 bfloat16\n\n"
        "| implementation | pass | ms | bound by |\n|---|---|---|---|\n| xla | forward | 8.639 | special |\n\n"
        "## training step, small\n\n"
        "| implementation | pass | ms | peak MiB |\n|---|---|---|---|\n| block | step |  | 4,213 |\n"
    )


def test_a_setting_says_where_it_was_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["/a/benchmarks/run_ops.py", "--output", "/some/folder", "--shapes", "2x8", "--output=/another"]
    monkeypatch.setattr(sys, "argv", command)
    setting = setting_here(harness.hardware(), libraries=("flax",))
    assert setting.command == "python benchmarks/run_ops.py --shapes 2x8"
    assert list(setting.versions) == ["Python", "jax", "flax"]
    assert re.search(r"\d+ cores$", setting.hardware)
    assert re.fullmatch(r"[0-9a-f]{7,}\+?|unknown", setting.commit)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"op": "selective_scan", "workl', r"line 2 is not a result \(Invalid JSON.*\): remove it"),
        ("[1, 2]", r"line 2 is not a result \(Input should be.*\): remove it"),
        ('{"op": "x"}', r"line 2 is not a result \(workload: .*\): remove it"),
        ("\x00\xff", r"line 2 is not a result \(Invalid JSON.*\): remove it"),
        ("", r"line 2 is not a result \(Invalid JSON.*\): remove it"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / harness.FILE_NAME
    harness.append(file, result(1.0))
    with file.open("a", encoding="latin-1") as stream:
        stream.write(f"{line}\n")
    harness.append(file, result(2.0))
    with pytest.raises(InputError, match=message) as caught:
        harness.read(file)
    assert "\n" not in str(caught.value)


def test_a_line_that_was_cut_short_spoils_no_other(tmp_path: Path) -> None:
    file = tmp_path / harness.FILE_NAME
    harness.append(file, result(1.0))
    file.write_bytes(file.read_bytes()[:-20])
    harness.append(file, result(2.0))
    lines = file.read_bytes().splitlines()
    assert len(lines) == 2
    file.write_bytes(lines[1])
    assert harness.read(file) == [result(2.0)]


def test_files_that_are_not_there_or_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no results in .*nothing.jsonl \(No such file.*\): run a benchmark first"):
        harness.read(tmp_path / "nothing.jsonl")
    with pytest.raises(InputError, match=r"cannot write results to .*choose another --output"):
        harness.append(tmp_path, result(1.0))


def test_the_last_two_results_are_compared() -> None:
    other = dataclasses.replace(SETTING, hardware="NVIDIA H200")
    measurements = [result(1.0), result(4.0), result(3.0, other), result(None), result(5.0, LATER)]
    (pair,) = compare.pairs(measurements)
    assert (pair.before.milliseconds, pair.after.milliseconds, pair.ratio) == (4.0, 5.0, 1.25)
    assert compare.table([pair], threshold=1.2).splitlines()[2:] == [
        "| NVIDIA H100 80GB HBM3 | selective_scan | mamba_130m 8x2048x1536x16 bfloat16 | xla | forward "
        "| abc1234, def5678 | 4 | 5 | 1.250 | slower |"
    ]
    assert compare.table([pair], threshold=1.25).endswith("| 1.250 |  |")


def test_workloads_are_chosen_by_name() -> None:
    long = result(1.0, workload="long 1x131072x2048x16 bfloat16")
    measurements = [result(1.0), long, result(1.0, op="causal_conv1d")]
    assert compare.choose(measurements, op=None, workload="long") == [long]
    assert compare.choose(measurements, op="selective_scan", workload=None) == measurements[:2]
    assert compare.choose(measurements, op=None, workload=long.workload) == [long]
    with pytest.raises(InputError, match=r"no results of workload 'mamba_7b'; there are mamba_130m .*, long 1x131072"):
        compare.choose(measurements, op=None, workload="mamba_7b")
    with pytest.raises(InputError, match=r"no results of op 'ssd'; there are selective_scan, causal_conv1d$"):
        compare.choose(measurements, op="ssd", workload="long")


@pytest.mark.parametrize(("last", "status"), [(1.04, 0), (1.06, 1)])
def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], last: float, status: int
) -> None:
    file = tmp_path / harness.FILE_NAME
    monkeypatch.setattr(sys, "argv", ["compare.py", "--results", str(file)])
    harness.append(file, result(1.0))
    with pytest.raises(SystemExit, match="2"):
        compare.main()
    assert "has no program with two timed results: run its benchmark again" in capsys.readouterr().err
    harness.append(file, result(last, LATER))
    with pytest.raises(SystemExit, match=str(status)):
        compare.main()
    assert f"{status} of 1 programs are slower by more than 1.05 times." in capsys.readouterr().out


def test_a_threshold_below_one_is_refused() -> None:
    with pytest.raises(InputError, match=r"--threshold 0\.9 must be at least 1"):
        compare.Options(threshold=0.9)
