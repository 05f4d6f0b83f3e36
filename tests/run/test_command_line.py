"""`train.py`: overrides, and one line for every mistake."""

import runpy
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mamba_jax.cli import EXIT_INTERRUPTED
from mamba_jax.run import loop
from mamba_jax.run.loop import TrainResult

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "quickstart.py")
# A batch of four on the eight devices of the tests.
FITTING = ("--train.run-dir", "{tmp}/run", "--mesh.data", "4", "--mesh.tensor", "2")


@pytest.fixture(autouse=True)
def no_deadline() -> Iterator[None]:
    """The program leaves its end under a deadline, and here it is not the end of the process."""
    yield
    assert 0 <= signal.getitimer(signal.ITIMER_REAL)[0] <= 1800
    signal.setitimer(signal.ITIMER_REAL, 0)


def main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Runs the program in this process; returns its exit status."""
    monkeypatch.setattr("sys.argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert isinstance(stop.value.code, int)
    return stop.value.code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage"),
        (["--wait"], "usage"),
        ([CONFIG, "--wait=3"], "--wait"),
        ([CONFIG, "--topology", "v5e:4x4"], "--compile-only"),
        ([CONFIG, "--verbose"], "--compile-only: pass that too"),
        (["nowhere.py"], "no config file 'nowhere.py'"),
        ([CONFIG, "--train.num-step", "5"], "--train.num-steps"),
        ([CONFIG, "--train.num-steps", "many"], "num-steps"),
        ([CONFIG, "--train.num-steps", "0"], "TrainConfig.num_steps must be positive, got 0"),
        ([CONFIG, "--train.num-steps", "1e6"], "--train.num-steps"),
        ([CONFIG, "--train.num-steps="], "--train.num-steps"),
        ([CONFIG, "--train.nothing", "1"], "Unrecognized options: --train.nothing"),
        ([CONFIG, "left-over"], "Unrecognized options: left-over"),
        (["{tmp}/thesis"], "no config file"),
        (["{tmp}/thesis/thesis.tex"], "its name must end in .py"),
        ([CONFIG, "--optimizer.peak-lr", "nan"], "peak_lr: Input should be a finite number, got nan"),
        ([CONFIG, "--optimizer.peak-lr", "inf"], "peak_lr: Input should be a finite number, got inf"),
        ([CONFIG, "--optimizer.b1", "1"], "OptimizerConfig.b1 must lie in [0, 1), got 1.0"),
        ([CONFIG, "--optimizer.ema-decay", "1"], "OptimizerConfig.ema_decay must lie in [0, 1), got 1.0"),
        ([CONFIG, "--optimizer.algorithm", "sgd"], "'sgd'"),
        ([CONFIG, "--train.windows", "3"], "data.seq_len (256) must be divisible by train.windows (3)"),
        ([CONFIG, "--train.accumulation-steps", "3"], "must be divisible by train.accumulation_steps (3)"),
        ([CONFIG, "--train.profile-steps", "9", "3"], "got (9, 3)"),
        ([CONFIG, "--train.profile-steps", "9"], "--train.profile-steps"),
        ([CONFIG, "--faults.spike-factor", "1"], "FaultsConfig.spike_factor must be above 1"),
        ([CONFIG, "--data.seq-len", "0"], "DataConfig.seq_len must be positive, got 0"),
        ([CONFIG, "--data.order", "sorted"], "'sorted'"),
        ([CONFIG, "--model.mixer.scan-implementation", "cuda"], "'cuda'"),
        ([CONFIG, "--seed", "-1"], "seed must lie in 0 .. 2**32 - 1, got -1"),
        ([CONFIG, "--train.run-dir", "{tmp}/thesis/thesis.tex"], "holds no run"),
        ([CONFIG, *FITTING, "--data.train.package", "none.such"], "no package 'none.such'"),
        ([CONFIG, *FITTING, "--data.train.package", "..x"], "no package '..x'"),
        ([CONFIG, *FITTING, "--data.train.path", "nowhere"], "no text folder"),
        ([CONFIG, *FITTING, "--data.cache-dir", "{tmp}/thesis/thesis.tex"], "cannot create token shards in"),
        ([CONFIG, "--model.vocab-size", "100", "--train.run-dir", "{tmp}/run"], "tokenizer has 257 ids"),
        ([CONFIG, "--train.run-dir", "{tmp}/thesis"], "holds no run"),
        ([CONFIG, "--train.run-dir", "{tmp}/run", "--mesh.data", "5"], "does not fit 8 devices"),
        ([CONFIG, "--train.run-dir", "{tmp}/run", "--train.init-from", "{tmp}/thesis"], "config.json"),
        ([CONFIG, "--compile-only"], "--compile-only needs --topology, such as --topology v5e:4x4"),
        ([CONFIG, "--compile-only", "--topology"], "--compile-only needs --topology"),
        ([CONFIG, "--compile-only", "--topology", "v5e:4x4", "--num-slices", "two"], "--num-slices two is not a whole"),
        ([CONFIG, "--compile-only", "--topology", "v5e:4x4", "--num-slices"], "--num-slices"),
        ([CONFIG, "--num-slices", "2"], "--num-slices"),
    ],
)
def test_mistakes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    assert main(monkeypatch, *(argument.format(tmp=tmp_path) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thesis"]
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["thesis.tex"]


def test_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["-h"], [CONFIG, "--help"]):
        assert main(monkeypatch, *arguments) == 0
        text = capsys.readouterr().out
        for flag in (
            "--wait",
            "--from-scratch",
            "--distributed",
            "--compile-only",
            "--verbose",
            "--topology",
            "--num-slices",
        ):
            assert flag in text
        assert ("--train.num-steps" in text) == (CONFIG in arguments)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], {"wait": False, "from_scratch": False}),
        (["--wait", "--train.num-steps", "7"], {"wait": True, "from_scratch": False}),
        (["--train.num-steps", "7", "--from-scratch"], {"wait": False, "from_scratch": True}),
    ],
)
def test_flags_are_told_from_fields(
    monkeypatch: pytest.MonkeyPatch, flags: list[str], expected: dict[str, bool]
) -> None:
    calls: list[Any] = []

    def train(config: Any, **options: bool) -> TrainResult:
        calls.append((config.train.num_steps == 7, options))
        return TrainResult(step=7, is_complete=True, stop_signal=None, loss=None, validation=None)

    monkeypatch.setattr(loop, "train", train)
    assert main(monkeypatch, CONFIG, *flags) == 0
    assert calls == [("7" in flags, expected)]
    # What is left is the end of the process.
    assert 1790 < signal.getitimer(signal.ITIMER_REAL)[0] <= 1800


def test_statuses_of_signals(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """130 has saved; Ctrl-C that did not wait for that has a status of its own, which no launcher restarts on."""
    stopped = TrainResult(step=7, is_complete=False, stop_signal=signal.SIGINT, loss=None, validation=None)
    monkeypatch.setattr(loop, "train", lambda *_, **__: stopped)
    assert main(monkeypatch, CONFIG) == 130

    def interrupted(*_: Any, **__: Any) -> TrainResult:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "train", interrupted)
    assert main(monkeypatch, CONFIG) == EXIT_INTERRUPTED == 3
    error = capsys.readouterr().err
    assert error.startswith("interrupted: ")
    assert error.count("\n") == 1
