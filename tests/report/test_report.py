"""The page of a run: complete, self-contained, safe to open, small."""

import html.parser
import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mamba_jax.errors import InputError
from mamba_jax.report.__main__ import main
from mamba_jax.report.curves import Curve, draw, thin
from mamba_jax.report.page import render
from mamba_jax.report.run import Series, read_run
from mamba_jax.telemetry.metrics import MetricWriter

EVIL = "</pre><script>alert('x')</script><img src=x onerror=alert(1)>&amp;"


def _metrics(run_dir: Path, records: list[dict]) -> None:
    run_dir.mkdir(exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def _train(step: int, loss: float = 2.0, **fields: float) -> dict:
    return {"kind": "train", "step": step, "cross_entropy": loss, "grad_norm": 1.0, "learning_rate": 1e-3, **fields}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Ten steps in two starts, the first of which was killed."""
    folder = tmp_path / "run"
    validation = {"kind": "validation", "step": 10, "loss": 1.25, "bits_per_byte": 2.5}
    _metrics(folder, [*(_train(step, tokens=100 * step) for step in range(1, 11)), validation])
    config = {"name": "tiny", "train": {"num_steps": 10}, "optimizer": {"peak_lr": 0.001}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "samples.txt").write_text(f"--- step 5\n{EVIL}\n\n")
    events = [
        {"time": 0.0, "event": "start", "step": 0, "devices": 4, "device_kind": "TPU v4", "processes": 2},
        {"time": 50.0, "event": "goodput", "step": 8, "seconds": {"step": 40.0, "init": 10.0}},
        {"time": 60.0, "event": "start", "step": 5, "devices": 4, "device_kind": "TPU v4", "processes": 2},
        {"time": 70.0, "event": "skipped", "step": 7, "reason": EVIL, "grad_norm": float("nan")},
        {"time": 100.0, "event": "goodput", "step": 10, "seconds": {"step": 25.0, "init": 15.0}},
        {"time": 100.0, "event": "finished", "step": 10},
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


class _Page(html.parser.HTMLParser):
    """Elements and texts, and whether every element is closed."""

    VOID = ("meta", "input", "circle", "line")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["script"], ["style"]):
            self.text += data + "\n"


def test_a_finished_run(run_dir: Path) -> None:
    text = _Page(render([read_run(run_dir)])).text
    # The first start did 3 of its 8 steps in vain, which took 15 of its 40 s: (25 + 25) / 100 s are useful.
    for part in (
        "tiny",
        "finished at step 10",
        "10 / 10",
        "2.0000",
        "1.2500",
        "2.5000",
        "50.0%",
        "lost 0:15",
        "down 0:10",
    ):
        assert part in text, part
    for part in ("killed or crashed", "4 x TPU v4", "optimizer.peak_lr", "0.001", "6 events"):
        assert part in text, part


def test_texts_of_a_run_stay_texts(run_dir: Path) -> None:
    config = {"name": EVIL, "train": {EVIL: EVIL}}
    (run_dir / "config.json").write_text(json.dumps(config))
    runs = [read_run(run_dir)]
    for shown in (runs, runs * 2):
        page = _Page(render(shown))
        assert "img" not in page.tags
        assert page.text.count(EVIL) >= 4
        # One script of the page, and the points of each of its charts: nothing else.
        assert page.tags.count("script") == 1 + page.tags.count("svg")


def test_needs_no_network(run_dir: Path) -> None:
    page = render([read_run(run_dir)])
    assert "default-src 'none'" in page
    assert not re.search(r"https?://|@import|url\(", page)
    assert not {name for name, _ in _Page(page).attributes} & {"src", "href"}


@pytest.mark.parametrize(
    ("last_event", "status"),
    [
        ({"event": "preempted", "step": 8}, "stopped and saved at step 8"),
        ({"event": "aborted", "step": 9, "reason": "ten skips"}, "aborted at step 9: ten skips"),
        ({"event": "start", "step": 5}, "running, or killed, at step 10"),
    ],
)
def test_status(run_dir: Path, last_event: dict, status: str) -> None:
    with (run_dir / "events.jsonl").open("a") as file:
        file.write(json.dumps({"time": 200.0, **last_event}) + "\n")
    assert read_run(run_dir).status == status


def test_older_runs_and_runs_that_just_began(tmp_path: Path) -> None:
    """Any of the files may be missing, and a line may be half there."""
    (tmp_path / "config.json").write_text('{"name": "new", "train": {"num_steps": 2}}')
    assert "No metrics yet" in render([read_run(tmp_path)])
    _metrics(tmp_path, [_train(1), _train(2)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tr')
    run = read_run(tmp_path)
    assert (run.status, run.goodput) == ("finished at step 2", None)
    (tmp_path / "config.json").unlink()
    assert "held-out" not in _Page(render([read_run(tmp_path)])).text


def test_files_of_the_metric_writer(tmp_path: Path) -> None:
    writer = MetricWriter(tmp_path, first_step=0)
    writer.write("train", 1, {"cross_entropy": 3.5, "mfu": 0.25})
    writer.write("validation_ema", 1, {"loss": 3.25})
    writer.write_sample(1, "two\n\nparagraphs\n")
    writer.close()
    run = read_run(tmp_path)
    assert (run.last("train", "cross_entropy"), run.last("validation_ema", "loss")) == (3.5, 3.25)
    assert run.samples == [(1, "two\n\nparagraphs\n")]


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    """They interrupt the line and are marked; the tile shows the last number that is one."""
    losses = [3.0, 2.0, float("nan"), float("inf"), 1.5, float("nan")]
    _metrics(tmp_path, [_train(step, loss) for step, loss in enumerate(losses, 1)])
    run = read_run(tmp_path)
    assert run.last("train", "cross_entropy") == 1.5
    page = render([run])
    assert "NaN" not in re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert "nan" not in "".join(re.findall(r' (?:d|cx|cy|x|y)="[^"]*"', page))
    picture = draw("loss", "", [Curve(label="loss", series=run.series["train", "cross_entropy"], color=0)])
    line = re.search(r'<path d="(M[^"]*)"', picture)
    assert line is not None
    assert line.group(1).count("M") == 2
    assert picture.count('class="missing"') == 2, "one for each step axis"


def test_all_values_missing(tmp_path: Path) -> None:
    _metrics(tmp_path, [_train(step, float("nan")) for step in (1, 2)])
    assert "<figcaption>Loss" not in render([read_run(tmp_path)])


def test_a_step_written_twice_counts_once(tmp_path: Path) -> None:
    _metrics(tmp_path, [_train(1, 3.0), _train(2, 3.0), _train(3, 3.0), _train(2, 1.0)])
    series = read_run(tmp_path).series["train", "cross_entropy"]
    assert series.steps.tolist() == [1, 2, 3]
    assert series.values.tolist() == [3.0, 1.0, 3.0]


def test_thinning_keeps_spikes() -> None:
    values = np.sin(np.arange(100_000) / 5000)
    values[[12_345, 77_777]] = 50.0, -50.0
    values[0] = values[99_999] = np.nan
    kept = thin(np.linspace(0, 400, 100_000), values)
    assert {1, 12_345, 77_777, 99_998} <= set(kept.tolist())
    assert (np.diff(kept) > 0).all()
    # Columns 0 to 400; the last holds the one point at its left edge.
    assert kept.size <= 4 * 401
    assert thin(np.zeros(3), np.full(3, np.nan)).size == 0


def test_one_point_and_constant_values() -> None:
    series = Series(steps=np.array([0]), values=np.array([0.0]))
    picture = draw("one", "", [Curve(label="one", series=series, color=0)])
    assert picture.count("<circle") == 1, "step 0 has no place on a logarithmic axis"
    assert "nan" not in picture


def test_comparison_shows_what_differs(run_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    _metrics(other, [_train(step, 1.0) for step in range(1, 5)])
    config = {"name": "other", "train": {"num_steps": 10}, "optimizer": {"peak_lr": 0.002}}
    (other / "config.json").write_text(json.dumps(config))
    page = render([read_run(run_dir), read_run(other)])
    text = _Page(page).text
    assert "2 of 3 fields differ" in text
    assert page.count('<tr class="differs">') == 2
    assert "tiny, training" in text
    assert "other, training" in text


@pytest.mark.slow
def test_large_run(tmp_path: Path) -> None:
    """300 000 records give a page below 3 MB, spikes and all, in a few times what the json module needs to read them.

    The module needs a second; on a busy machine everything takes longer, in proportion.
    """
    rng = np.random.default_rng(0)
    numbers = rng.lognormal(size=(300_000, 4)).round(6)
    numbers[123_456, 0] = 1e6
    line = '{"kind": "train", "step": %d, "cross_entropy": %r, "grad_norm": %r, "learning_rate": %r, "mfu": %r}\n'
    rows = (line % (step, *values) for step, values in enumerate(numbers.tolist(), 1))
    text = "".join(rows)
    (tmp_path / "metrics.jsonl").write_text(text)
    start = time.process_time()
    assert len([json.loads(row) for row in text.splitlines()]) == 300_000
    parsed = time.process_time()
    page = render([read_run(tmp_path)])
    assert time.process_time() - parsed < 20 * (parsed - start)
    assert len(page) < 3e6, len(page)
    assert "123457" in page
    assert "1000000.0" in page


def test_program_writes_the_page(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["report", str(run_dir)])
    main()
    assert (run_dir / "report.html").read_text().startswith("<!doctype html>")
    assert "report.html" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["report", str(run_dir), "--output", str(run_dir / "missing" / "page.html")])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "choose another file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no folder"), ({}, "holds no run"), ({"config.json": '{"d_model": 16}'}, "holds no run")],
)
def test_folders_that_are_no_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    content: dict[str, str] | None,
    message: str,
) -> None:
    folder = tmp_path / "folder"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read_run(folder)
    monkeypatch.setattr(sys, "argv", ["report", str(folder)])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert capsys.readouterr().err.count("\n") == 1
    assert not (folder / "report.html").exists()


def test_no_folder_given(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["report"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "RUN_DIR" in capsys.readouterr().err
