"""`train.py`: overrides, and one line for every mistake."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "quickstart.py")
# A batch of four on the eight devices of the tests.
FITTING = ("--train.run-dir", "{tmp}/run", "--mesh.data", "4", "--mesh.tensor", "2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage"),
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
    monkeypatch.setattr("sys.argv", ["train.py", *(argument.format(tmp=tmp_path) for argument in arguments)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thesis"]
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["thesis.tex"]
