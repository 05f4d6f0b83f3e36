"""The command trains what is not finished, keeps a record of every run, and writes the page from the records alone."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mamba_jax.errors import InputError
from mamba_jax.experiments import __main__ as command
from mamba_jax.experiments import records, runs
from mamba_jax.run.loop import TrainResult

TOY = """
import dataclasses

from mamba_jax.config import AttentionConfig, Mamba1Config, SyntheticSource
from mamba_jax.experiments.declaration import Cell, Experiment
from mamba_jax.experiments.synthetic import AnswerAccuracy, Size, synthetic_run

SOURCE = SyntheticSource(task="induction_heads", num_ids=8)
SIZE = Size(seq_len=8, rows=8, steps=25, learning_rate=1e-3, tested=8)
MIXERS = {
    "mamba": Mamba1Config(state_dim=2, expand=1),
    "broken": AttentionConfig(num_heads=2, attention_implementation="splash"),
}


def get_experiment(scale):
    cells = [
        Cell(
            name=name,
            label=name.title(),
            config=synthetic_run(name, SOURCE, mixer, width=8, size=SIZE),
            published={"8": 12.5},
            leaves_out={"16": "it is too long"} if name == "mamba" else {},
            series="all",
        )
        for name, mixer in MIXERS.items()
    ]
    metrics = tuple(
        AnswerAccuracy(name=str(length), source=SOURCE, seq_len=length, num_rows=8) for length in (8, 12, 16)
    )
    return Experiment(
        title="A toy", source="nowhere", about="A toy.", trained=SIZE.text, cells=tuple(cells), metrics=metrics,
        picture={"reduced": "over_metrics", "short": "over_state", "published": "side_by_side"}[scale],
    )
"""

Run = Callable[..., int]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command, which knows the toy alone, writing below the test's folder; gives its exit status."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "toy.py").write_text(TOY)
    monkeypatch.setattr(command, "_CONFIGS", tmp_path / "configs")

    def run(*words: str) -> int:
        places = ["--output", str(tmp_path / "out"), "--runs", str(tmp_path / "runs")]
        monkeypatch.setattr(sys, "argv", ["experiments", *words, *places])
        with pytest.raises(SystemExit) as stop:
            command.main()
        assert isinstance(stop.value.code, int)
        return stop.value.code

    return run


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names and seeds of the runs that a trainer which does nothing was called for; one of the cells fails."""
    called: list[str] = []

    def train(config) -> TrainResult:
        called.append(f"{config.name}-{config.seed}")
        if "broken" in config.name:
            raise InputError("it broke | in two")
        return TrainResult(step=25, is_complete=True, stop_signal=None, loss=0.0, validation=None)

    monkeypatch.setattr(runs.loop, "train", train)
    monkeypatch.setattr(runs, "_figures", lambda run, experiment: {"8": 50.0 + 25 * run.config.seed, "12": 0.0})
    return called


def read(tmp_path: Path) -> list[records.Record]:
    return records.read(tmp_path / "out" / "results" / "toy.jsonl")


def test_every_run_is_recorded_and_finished_ones_stay(run: Run, trained: list[str], tmp_path: Path) -> None:
    assert run("toy", "--seeds", "0", "1") == 2
    assert trained == ["toy-mamba-0", "toy-broken-0", "toy-mamba-1", "toy-broken-1"]
    assert [(one.cell, one.seed, one.status) for one in read(tmp_path)] == [
        ("mamba", 0, "finished"),
        ("broken", 0, "failed"),
        ("mamba", 1, "finished"),
        ("broken", 1, "failed"),
    ]
    first = read(tmp_path)[0]
    assert first.setting.command == "python -m mamba_jax.experiments toy --scale reduced --only mamba --seeds 0"
    # Two layers of (1, 3, 8) inputs of the convolution and (1, 8, 2) states, in float32.
    assert first.state_bytes == 2 * 4 * (3 * 8 + 8 * 2)
    trained.clear()
    assert run("toy", "--only", "mam*", "--seeds", "0", "1") == 0
    assert trained == []
    assert run("toy", "--seeds", "0") == 2
    assert trained == ["toy-broken-0"]


def test_another_config_is_another_run(run: Run, trained: list[str], tmp_path: Path) -> None:
    assert run("toy", "--only", "mamba") == 0
    toy = tmp_path / "configs" / "toy.py"
    toy.write_text(toy.read_text().replace("1e-3", "2e-3"))
    assert run("toy", "--only", "mamba") == 0
    assert trained == ["toy-mamba-0"] * 2
    page = (tmp_path / "out" / "results.md").read_text()
    assert page.count("| mamba | 0 |") == 2
    assert "learning rate 0.002" in page


def test_the_page_says_what_the_records_say(run: Run, trained: list[str], tmp_path: Path) -> None:
    run("toy", "--seeds", "0", "1")
    page = (tmp_path / "out" / "results.md").read_text()
    (row,) = [line for line in page.splitlines() if line.startswith("| Mamba |")]
    assert row.split(" | ")[3:] == ["2", "62.5 (50.0 to 75.0)", "0.0", "- |"]
    assert "| paper |  |  |  | 12.5 | - | - |" in page
    assert "Mamba has no 16: it is too long." in page
    assert "No run has finished yet of: Broken." in page
    assert r"failed: it broke \| in two" in page
    assert "`python -m mamba_jax.experiments toy --scale reduced --seeds 0 1`" in page
    # Without a name the page alone is written, from whatever the records say.
    file = tmp_path / "out" / "results" / "toy.jsonl"
    file.write_text(file.read_text().replace('"8": 75.0', '"8": 70.0'))
    assert run() == 0
    assert "60.0 (50.0 to 70.0)" in (tmp_path / "out" / "results.md").read_text()


@pytest.mark.parametrize("scale", ["reduced", "short", "published"])
def test_pictures(run: Run, trained: list[str], tmp_path: Path, scale: str) -> None:
    run("toy", "--scale", scale)
    (picture,) = (tmp_path / "out" / "results").glob("*.png")
    assert f"results/{picture.name}" in (tmp_path / "out" / "results.md").read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing"], "no experiment 'nothing'; there are toy"),
        (["toy", "--only", "mambo"], "--only mambo: no such cell; there are mamba, broken"),
        (["toy", "--seeds", "1", "1"], "--seeds takes different numbers, got 1 1"),
        (["toy", "--jobs", "0"], "--jobs must be positive, got 0"),
    ],
)
def test_bad_input_is_one_line(run: Run, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert run(*words) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_records_that_are_none_are_named(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out" / "results" / "toy.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text('{"experiment": "toy"}\n')
    assert run("toy") == 2
    assert "toy.jsonl, line 1 is no result" in capsys.readouterr().err


def test_the_list(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--list") == 0
    assert capsys.readouterr().out == "toy: A toy (nowhere)\n  mamba broken\n"


def test_names_that_do_not_fit_are_refused() -> None:
    toy = command.experiment("induction_heads", "reduced")
    with pytest.raises(InputError, match="two cells are called 'mamba'"):
        dataclasses.replace(toy, cells=(toy.cells[0], toy.cells[0]))
    with pytest.raises(InputError, match=r"mamba has results of 2\^5, which are no metrics"):
        dataclasses.replace(toy, cells=(dataclasses.replace(toy.cells[0], published={"2^5": 1.0}),))


@pytest.mark.slow
def test_a_cell_is_trained_and_judged(run: Run, tmp_path: Path) -> None:
    """The trainer and the metrics are those of any run; a backend that cannot run here is a failure of its cell."""
    assert run("toy") == 2
    finished, failed = read(tmp_path)
    assert set(finished.figures) == {"8", "12"}
    assert (finished.steps, finished.tokens) == (25, 25 * 8 * 8)
    assert finished.seconds > 0
    assert failed.cause is not None
    assert "attention_implementation='splash' cannot run this" in failed.cause
    line = json.loads((tmp_path / "out" / "results" / "toy.jsonl").read_text().splitlines()[0])
    assert line["setting"]["hardware"] in (tmp_path / "out" / "results.md").read_text()
