"""`train.py`: overrides, and one line for every mistake."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "quickstart.py")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage"),
        (["nowhere.py"], "no config file 'nowhere.py'"),
        ([CONFIG, "--train.num-step", "5"], "--train.num-steps"),
        ([CONFIG, "--train.num-steps", "many"], "num-steps"),
        ([CONFIG, "--train.num-steps", "0"], "TrainConfig.num_steps must be positive, got 0"),
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
