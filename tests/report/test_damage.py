"""Whatever became of the files of a run: the report is a page or one line, and a resume loses nothing that is whole."""

import io
import json
import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from mamba_jax.errors import InputError
from mamba_jax.report.__main__ import main
from mamba_jax.report.page import render
from mamba_jax.report.run import read_run
from mamba_jax.telemetry.metrics import MetricWriter, read_metrics, read_samples

STEPS = 8
START = {"time": 1.8e9, "event": "start", "step": 0, "devices": 1, "device_kind": "cpu", "processes": 1}
GOODPUT = {"time": 1.8e9 + 5, "event": "goodput", "step": 3, "seconds": {"step": 4.0}}
SKIPPED = {"time": 1.8e9 + 6, "event": "skipped", "step": 4, "reason": "spike of the gradient", "grad_norm": 9.0}


def _metric(step: int) -> dict:
    return {"kind": "train", "step": step, "cross_entropy": 5.0, "grad_norm": 1.0, "tokens": 10, "mfu": 0.5}


FILES = {
    "config.json": json.dumps({"name": "x", "train": {"num_steps": 9}}).encode(),
    "metrics.jsonl": "".join(json.dumps(_metric(step)) + "\n" for step in range(1, STEPS + 1)).encode(),
    "events.jsonl": "".join(json.dumps(event) + "\n" for event in (START, GOODPUT, SKIPPED)).encode(),
    "samples.txt": b"".join(b"--- step %d\ntext %d\n\n" % (step, step) for step in range(1, STEPS + 1)),
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damage") / "run"


def _fill(folder: Path, **contents: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in FILES.items():
        (folder / name).write_bytes(contents.get(name.partition(".")[0], content))
    return folder


def _page(folder: Path) -> str:
    """As a file: no character that UTF-8 has not, nor a number that is none."""
    page = render([read_run(folder)]).encode("utf-8", "backslashreplace").decode()
    assert "</html>" in page
    return page


LINES = (
    ("events.jsonl", '{"time": 1e12, "event": "checkpoint"}'),
    ("events.jsonl", '{"time": 253402300799, "event": "start", "step": 1099511627776}'),
    ("events.jsonl", '{"time": 0, "event": "start"}'),
    ("events.jsonl", '{"time": 5e9, "event": "start", "step": "x", "devices": [], "processes": {}, "device_kind": 7}'),
    ("events.jsonl", '{"time": 5e9, "event": "goodput", "seconds": {}}'),
    ("events.jsonl", '{"time": 5e9, "event": "goodput", "step": 3, "seconds": {"step": -1e308, "x": null}}'),
    ("events.jsonl", '{"time": 5e9, "event": "goodput", "step": 0, "seconds": {"step": 253402300799}}'),
    ("events.jsonl", '{"time": 5e9, "event": "finished", "step": "x"}'),
    ("events.jsonl", '{"time": 5e9, "event": "aborted", "step": 1e3, "reason": ["a"]}'),
    ("events.jsonl", '{"time": 5e9, "event": "skipped", "grad_norm": "x", "reason": 3}'),
    ("events.jsonl", '{"time": 5e9, "event": "\\ud800", "seconds": {"a": 1}, "x": [[1' + "0" * 4000 + "]]}"),
    ("events.jsonl", '{"time": 5e9, "event": "compiled", "seconds": {"a": "b"}}'),
    ("metrics.jsonl", '{"kind": "train", "step": 9, "cross_entropy": 1' + "0" * 400 + "}"),
    ("metrics.jsonl", '{"kind": "train", "step": 1180591620717411303424, "cross_entropy": 1.0}'),
    ("metrics.jsonl", '{"kind": "train", "step": 1099511627776, "cross_entropy": 1.0}'),
    ("metrics.jsonl", '{"kind": "train", "step": 9, "cross_entropy": 1.7e308, "grad_norm": 1e999, "mfu": 5e-324}'),
    ("metrics.jsonl", '{"kind": "train", "step": 9, "cross_entropy": -1.7e308, "mfu": -3e38, "learning_rate": 1e-44}'),
    ("metrics.jsonl", '{"kind": "train", "step": 9, "cross_entropy": "x", "grad_norm": [], "mfu": true, "loss": null}'),
    ("metrics.jsonl", '{"kind": ["train"], "step": 9}'),
    ("metrics.jsonl", '{"kind": "train", "step": 9, "not_finite": {"step": []}}'),
    ("samples.txt", "--- step " + "9" * 5000 + "\nx\n"),
    ("samples.txt", "--- step 999999999999999\n\x00\x1b[31m\ud800"),
    ("config.json", '{"name": ["x"], "train": {"num_steps": 1' + "0" * 4000 + "}}"),
    ("config.json", '{"name": "\\ud800", "train": {"num_steps": -1, "x": [NaN, {"y": Infinity}]}}'),
    *((name, '{"a":' * 100_000) for name in FILES),
    *((name, '{"a":' * 900 + "1" + "}" * 900) for name in FILES),
    *((name, '{"a":1' + "0" * 5000 + "}") for name in FILES),
    *((name, "\0" * 5000) for name in FILES),
    *((name, "") for name in FILES),
)


@pytest.mark.parametrize(("name", "line"), LINES, ids=lambda text: text[:40])
def test_a_page_whatever_a_line_says(run_dir: Path, name: str, line: str) -> None:
    content = line.encode("utf-8", "surrogatepass")
    for damaged in (content, FILES[name] + content + b"\n", content + b"\n" + FILES[name]):
        _page(_fill(run_dir, **{name.partition(".")[0]: damaged}))


def _dangle(path: Path) -> None:
    path.symlink_to("nowhere")


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, _dangle, _loop], ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", [*FILES, "all"])
def test_a_page_or_a_line_without_files(tmp_path: Path, name: str, make: Callable[[Path], None]) -> None:
    folder = _fill(tmp_path / "run")
    for path in [folder / name] if name != "all" else folder.iterdir():
        path.unlink()
        make(path)
    if name == "all":
        with pytest.raises(InputError, match="holds no run"):
            read_run(folder)
    else:
        _page(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    folder = _fill(tmp_path / "run\nof two lines \udcff")
    opened = io.open

    def refuse(file: Any, *args: Any, **options: Any) -> object:
        if str(file).endswith(name):
            raise PermissionError(13, "Permission denied", file)
        return opened(file, *args, **options)

    monkeypatch.setattr("io.open", refuse)
    monkeypatch.setattr("sys.argv", ["report", str(folder)])
    with pytest.raises(SystemExit, match="2"):
        main()
    error = capsys.readouterr().err
    assert error.startswith("error: cannot read ")
    assert error.count("\n") == 1
    assert "Permission denied" in error


def test_odd_names_of_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _fill(tmp_path / "a\nb\x1b[31m \udcff", config=b"{}")
    monkeypatch.setattr("sys.argv", ["report", str(folder)])
    main()
    assert r"\udcff" in (folder / "report.html").read_text()
    for bad in ("x" * 5000, "a\0b", str(folder / "config.json" / "x")):
        with pytest.raises(InputError):
            read_run(Path(bad))


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_a_page_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None]
) -> None:
    folder = _fill(tmp_path / "run")
    make(folder / "report.html")
    monkeypatch.setattr("sys.argv", ["report", str(folder)])
    with pytest.raises(SystemExit, match="2"):
        main()


def _damaged(content: bytes, rng: random.Random) -> bytes:
    """One of the things that happen to files, at a random place."""
    a, b = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    lines = io.BytesIO(content).readlines()
    rng.shuffle(lines)
    flipped = bytearray(content or b"\0")
    flipped[a % len(flipped)] ^= 1 << rng.randrange(8)
    number = rng.choice(
        (b"null", b"-1", b"1e308", b"-1e308", b"1e-320", b"NaN", b"true", b'"x"', b"[]", b"{}", b"9" * 20)
    )
    return rng.choice(
        (
            content[:a],
            content[:a] + content[b:],
            content[:a] + bytes(b - a) + content[b:],
            content[:a] + rng.randbytes(5) + content[a:],
            content[:b] + content[a:],
            content[:a] + number + content[a:],
            content.replace(rng.choice((b"5.0", b"1.0", b"3", b"1.8", b'"train"', b'"start"', b"4.0")), number),
            b"".join(lines),
            bytes(flipped),
        )
    )


def _check(folder: Path, seed: int) -> None:
    rng = random.Random(seed)
    contents = dict(FILES)
    for _ in range(rng.randint(1, 6)):
        name = rng.choice(list(FILES))
        contents[name] = _damaged(contents[name], rng)
    for path in (*folder.glob("damaged/*"), *folder.glob("report.html")):
        path.unlink()
    _fill(folder, **{name.partition(".")[0]: content for name, content in contents.items()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        _page(folder)
        first_step = rng.randrange(STEPS + 2)
        before, samples = read_metrics(folder), read_samples(folder)
        MetricWriter(folder, first_step=first_step)
    kept = [r for r in before if r["step"] < first_step or (r["step"] == first_step and r["kind"] == "train")]
    assert repr(read_metrics(folder)) == repr(kept)
    assert read_samples(folder) == [(step, text) for step, text in samples if step < first_step]
    aside = folder / "damaged" / "metrics.jsonl"
    found = (folder / "metrics.jsonl").read_bytes() + (aside.read_bytes() if aside.exists() else b"")
    for line in contents["metrics.jsonl"].split(b"\n"):
        assert not line.strip() or line in found.split(b"\n") or _is_done_again(line, first_step)


def _is_done_again(line: bytes, first_step: int) -> bool:
    record = json.loads(line)
    return record["step"] > first_step or (record["step"] == first_step and record["kind"] != "train")


@hypothesis.settings(max_examples=60, deadline=None, database=None)
@hypothesis.given(seed=st.integers(0, 2**32))
def test_random_damage(run_dir: Path, seed: int) -> None:
    _check(run_dir, seed)


@pytest.mark.slow
@hypothesis.settings(max_examples=2000, deadline=None, database=None)
@hypothesis.given(seed=st.integers(0, 2**32))
def test_much_random_damage(run_dir: Path, seed: int) -> None:
    _check(run_dir, seed)
