"""Whole runs: outputs, exact resume, interruption, refusals."""

import dataclasses
import json
import math
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mamba_jax.checkpoint import load_params
from mamba_jax.config import (
    CheckpointConfig,
    EvaluationConfig,
    ExperimentConfig,
    FaultsConfig,
    MeshConfig,
    TextFolderSource,
    from_json,
)
from mamba_jax.errors import InputError
from mamba_jax.export import huggingface
from mamba_jax.models import parameters
from mamba_jax.run import loop
from mamba_jax.run.hooks import Hooks
from mamba_jax.run.loop import TrainResult
from mamba_jax.telemetry.events import read_events
from mamba_jax.telemetry.goodput import summarize
from mamba_jax.telemetry.metrics import StatusDisplay, read_metrics
from mamba_jax.training import step
from mamba_jax.training.train_state import TrainState
from tests.runs import Die, Signal, Spoil

MakeConfig = Callable[..., ExperimentConfig]


def run(config: ExperimentConfig, hooks: Hooks | None = None) -> TrainResult:
    """Trains on as many devices as the mesh of the config has."""
    mesh = config.mesh
    num_devices = math.prod(dataclasses.astuple(mesh))
    return loop.train(config, devices=jax.devices()[:num_devices], hooks=hooks)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """An uninterrupted run and what was seen of it."""

    config: ExperimentConfig
    result: TrainResult
    traces: int
    printed: str

    @property
    def folder(self) -> Path:
        return Path(self.config.train.run_dir)


@pytest.fixture(scope="module")
def full_config(make_config: MakeConfig, corpus: Path) -> Callable[[], ExperimentConfig]:
    """Makes the config of twelve steps with everything switched on, in a new run directory."""

    def make() -> ExperimentConfig:
        return make_config(
            seed=3,
            validation=TextFolderSource(path=str(corpus / "validation")),
            checkpoint=CheckpointConfig(every=5, keep=2),
            evaluation=EvaluationConfig(every=5, max_batches=1),
            sample_every=6,
            sample_tokens=8,
            sample_prompt="state",
        )

    return make


@pytest.fixture(scope="module")
def finished(full_config: Callable[[], ExperimentConfig]) -> FinishedRun:
    config = full_config()
    traces, printed = [], []
    with pytest.MonkeyPatch.context() as patch:
        loss = step.next_token_loss
        patch.setattr(step, "next_token_loss", lambda *args, **kwargs: traces.append(1) or loss(*args, **kwargs))
        patch.setattr(StatusDisplay, "note", lambda self, text: printed.append(text))
        result = run(config)
    return FinishedRun(config=config, result=result, traces=len(traces), printed="\n".join(printed))


def records(run_dir: str | Path, kind: str) -> dict[int, dict[str, Any]]:
    """Metrics of one kind by step, checking that no step is there twice."""
    found = [record for record in read_metrics(Path(run_dir)) if record["kind"] == kind]
    by_step = {record["step"]: record for record in found}
    assert len(by_step) == len(found)
    return by_step


def exact(run_dir: str | Path, kind: str) -> dict[int, dict[str, str]]:
    """Metrics that do not depend on the clock, as hexadecimal floats."""
    return {
        step: {
            name: float(value).hex()
            for name, value in record.items()
            if name not in {"kind", "tokens_per_second", "mfu"}
        }
        for step, record in records(run_dir, kind).items()
    }


def test_run_directory_holds_everything(finished: FinishedRun) -> None:
    names = {path.name for path in finished.folder.iterdir()}
    records = {"metrics.jsonl", "events.jsonl", "samples.txt", "loss_curve.png"}
    assert names == {"config.json", "run.json", "owner.lock", "checkpoints", *records}
    stored = from_json(ExperimentConfig, (finished.folder / "config.json").read_text(), origin="config.json")
    assert stored == finished.config
    assert sorted(int(path.name) for path in (finished.folder / "checkpoints").iterdir()) == [10, 12]


def test_result_and_metrics(finished: FinishedRun) -> None:
    training, validation = records(finished.folder, "train"), records(finished.folder, "validation")
    assert list(training) == list(range(1, 13))
    assert list(validation) == [5, 10, 12]
    assert finished.result.is_complete
    assert finished.result.step == 12
    assert finished.result.loss == training[12]["cross_entropy"] < training[1]["cross_entropy"] - 0.2
    assert finished.result.validation is not None
    assert finished.result.validation.loss == validation[12]["loss"] < validation[5]["loss"]
    assert training[7]["tokens"] == 7 * 8 * 24
    # The last evaluation reads the whole text, the ones before a batch of it.
    assert validation[12]["num_tokens"] > validation[5]["num_tokens"]


def test_step_is_traced_once(finished: FinishedRun) -> None:
    assert finished.traces == 1


def test_samples(finished: FinishedRun) -> None:
    text = (finished.folder / "samples.txt").read_text()
    assert re.findall(r"^--- step (\d+)\nstate", text, re.MULTILINE) == ["6", "12"]
    assert "step 12 sample: 'state" in finished.printed


def test_checkpoint_holds_the_run(finished: FinishedRun) -> None:
    loaded = load_params(finished.folder)
    assert (loaded.step, loaded.config) == (12, finished.config)
    assert load_params(finished.folder, 10).step == 10


@pytest.mark.parametrize(
    ("number", "at", "stops"),
    [
        pytest.param(signal.SIGINT, 8, 8, id="Ctrl-C in a step"),
        pytest.param(signal.SIGTERM, 6, 5, id="SIGTERM before an evaluation"),
    ],
)
def test_resume_is_exact(
    finished: FinishedRun,
    full_config: Callable[[], ExperimentConfig],
    capsys: pytest.CaptureFixture[str],
    number: int,
    at: int,
    stops: int,
) -> None:
    """Stopped and started again, every loss has the bits of the uninterrupted run, and no evaluation is missing."""
    config = full_config()
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    stopped = run(config, Signal(number, at=at))
    assert (stopped.step, stopped.is_complete, stopped.stop_signal) == (stops, False, number)
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    assert "run the same command again" in capsys.readouterr().out
    resumed = run(config)
    assert (resumed.step, resumed.is_complete) == (12, True)
    assert exact(config.train.run_dir, "train") == exact(finished.folder, "train")
    assert exact(config.train.run_dir, "validation") == exact(finished.folder, "validation")
    params = load_params(finished.folder).params
    jax.tree.map(np.testing.assert_array_equal, load_params(config.train.run_dir).params, params)


def test_finished_run_is_left_alone(finished: FinishedRun) -> None:
    before = (finished.folder / "metrics.jsonl").read_text()
    again = run(finished.config)
    assert again.is_complete
    assert again.loss is None
    assert again.validation == finished.result.validation
    assert (finished.folder / "metrics.jsonl").read_text() == before


def test_killed_run_goes_on_from_its_checkpoint(
    finished: FinishedRun, full_config: Callable[[], ExperimentConfig]
) -> None:
    """Without a chance to save, the run goes on from step 5, and steps 6 and 7 are not in the metrics twice."""
    config = full_config()
    with pytest.raises(SystemExit):
        run(config, Die(SystemExit(1), after=7))
    assert max(records(config.train.run_dir, "train")) == 7
    run(config)
    assert exact(config.train.run_dir, "train") == exact(finished.folder, "train")


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        ({"optimizer": {"peak_lr": 0.5}}, ["optimizer.peak_lr was 0.01, now 0.5"]),
        ({"model": {"num_layers": 3}, "data": {"seq_len": 8}}, ["data.seq_len", "model.num_layers was 2, now 3"]),
        ({"train": {"num_steps": 20}}, ["train.num_steps was 12, now 20"]),
        ({"seed": 4}, ["seed was 3, now 4"]),
    ],
)
def test_resume_with_another_config_is_refused(
    finished: FinishedRun, change: dict[str, Any], fields: list[str]
) -> None:
    sections = {
        name: dataclasses.replace(getattr(finished.config, name), **value) if isinstance(value, dict) else value
        for name, value in change.items()
    }
    before = (finished.folder / "config.json").read_text()
    with pytest.raises(InputError) as error:
        run(dataclasses.replace(finished.config, **sections))
    assert all(field in str(error.value) for field in fields)
    assert "\n" not in str(error.value)
    assert (finished.folder / "config.json").read_text() == before


def test_what_does_not_change_the_result_may_change(finished: FinishedRun) -> None:
    config = dataclasses.replace(
        finished.config,
        name="renamed",
        checkpoint=CheckpointConfig(every=3),
        train=dataclasses.replace(finished.config.train, log_every=5, sample_tokens=3),
        data=dataclasses.replace(finished.config.data, prefetch=1),
    )
    assert run(config).is_complete
    assert run(finished.config).is_complete


def test_mistake_in_the_data_does_not_claim_the_directory(make_config: MakeConfig, tmp_path: Path) -> None:
    """A run that could not start leaves its directory free for the corrected command."""
    wrong = make_config(train=TextFolderSource(path=str(tmp_path / "nowhere")))
    with pytest.raises(InputError, match="nowhere"):
        run(wrong)
    assert not Path(wrong.train.run_dir).exists()
    short = make_config(seq_len=100_000)
    with pytest.raises(InputError, match="seq_len"):
        run(short)
    assert not Path(short.train.run_dir).exists()


def test_foreign_directory_is_refused(make_config: MakeConfig) -> None:
    config = make_config()
    folder = Path(config.train.run_dir)
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="holds no run"):
        run(config)
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 256}, "model.vocab_size is 256 but the tokenizer has 257 ids"),
        ({"param_dtype": "bfloat16"}, "param_dtype='float32'"),
        ({"compute_dtype": "float16"}, "float16"),
        ({"mesh": MeshConfig(data=-1, fsdp=3)}, "does not fit 8 devices"),
        ({"mesh": MeshConfig(data=8), "global_batch": 12}, "12 sequences cannot be split over 8"),
        ({"mesh": MeshConfig(data=8), "accumulation_steps": 2}, "4 sequences cannot be split over 8"),
        ({"mesh": MeshConfig(data=1, tensor=8), "vocab_multiple": 1}, "embedding/table: dimension vocab of size 257"),
        ({"init_from": "nowhere"}, "nowhere"),
        ({"run_dir": "gs://bucket/run"}, "gs://bucket/run is an address"),
        ({"mesh": MeshConfig(data=1, sequence=8), "seq_len": 20}, "20"),
        ({"seq_len": 24, "windows": 4, "mesh": MeshConfig(data=1, sequence=4)}, "sequence"),
    ],
)
def test_bad_input_is_one_line(make_config: MakeConfig, fields: dict[str, Any], message: str) -> None:
    config = make_config(**fields)
    with pytest.raises(InputError) as error:
        loop.train(
            config,
            devices=jax.devices()[: None if config.mesh.data != 1 else config.mesh.tensor * config.mesh.sequence],
        )
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not Path(config.train.run_dir).exists()


def test_starts_from_safetensors(make_config: MakeConfig, full_config: Callable[[], ExperimentConfig]) -> None:
    config = full_config()
    folder = Path(config.train.run_dir).with_name("weights")
    params = parameters.init(config.model, jax.random.key(11))
    huggingface.save(folder, config.model, params, layout="hf")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, init_from=str(folder)))
    seen = []

    class Observe(Hooks):
        def on_start(self, step: int, state: TrainState) -> None:
            seen.append(jax.device_get(state.params))
            raise SystemExit

    with pytest.raises(SystemExit):
        run(config, Observe())
    jax.tree.map(np.testing.assert_array_equal, seen[0], jax.device_get(params))

    other = make_config(d_model=32, init_from=str(folder))
    with pytest.raises(InputError, match="2 layers of width 16"):
        run(other)
    assert not Path(other.train.run_dir).exists()


def test_bad_batch_is_skipped(finished: FinishedRun, full_config: Callable[[], ExperimentConfig]) -> None:
    config = full_config()
    result = run(config, Spoil({4, 7}))
    assert result.is_complete
    training, expected = records(config.train.run_dir, "train"), records(finished.folder, "train")
    assert [training[step]["skipped"] for step in (3, 4, 6, 7, 12)] == [0, 1, 1, 2, 2]
    assert not np.isfinite(training[7]["loss"])
    # Until the first bad step all is as without it; after it the weights are those that step 5 started from there.
    assert [training[step]["loss"] for step in (1, 2, 3)] == [expected[step]["loss"] for step in (1, 2, 3)]
    assert np.isfinite([training[step]["loss"] for step in (5, 6, 8, 9, 10, 11, 12)]).all()
    skipped = [event for event in read_events(Path(config.train.run_dir)) if event["event"] == "skipped"]
    assert [(event["step"], event["reason"]) for event in skipped] == [
        (4, "loss or gradient not finite"),
        (7, "loss or gradient not finite"),
    ]
    params = load_params(config.train.run_dir).params
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(params))


def test_too_many_bad_batches_end_the_run(full_config: Callable[[], ExperimentConfig]) -> None:
    config = dataclasses.replace(full_config(), faults=FaultsConfig(max_skipped=3))
    with pytest.raises(InputError, match=r"step 9: 3 steps in a row were skipped \(loss nan.*peak_lr") as error:
        run(config, Spoil(set(range(7, 13))))
    assert "\n" not in str(error.value)
    loaded = load_params(config.train.run_dir)
    assert loaded.step == 5
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(loaded.params))
    # The save of step 5 may still go on in the background.
    events = [event["event"] for event in read_events(Path(config.train.run_dir))]
    assert [name for name in events if name != "checkpoint"][-1] == "aborted"


def test_events_tell_what_happened(finished: FinishedRun) -> None:
    events = read_events(finished.folder)
    events = events[: 1 + next(index for index, event in enumerate(events) if event["event"] == "finished")]
    names = [event["event"] for event in events if event["event"] != "goodput"]
    assert names == ["start", "compiled", "checkpoint", "checkpoint", "checkpoint", "finished"]
    assert [event["step"] for event in events if event["event"] == "checkpoint"] == [5, 10, 12]
    seconds = [event for event in events if event["event"] == "goodput"][-1]["seconds"]
    assert {"init", "compile", "data", "step", "checkpoint", "evaluation", "sample"} <= seconds.keys()
    # The buckets cover the whole time of the process, from before its first event to the last report.
    assert sum(seconds.values()) > events[-1]["time"] - events[0]["time"] - 0.1
    assert summarize(events).starts == 1


def test_average_is_evaluated_and_saved(make_config: MakeConfig, corpus: Path) -> None:
    config = make_config(ema_decay=0.9, validation=TextFolderSource(path=str(corpus / "validation")))
    run(config)
    found = records(config.train.run_dir, "validation_ema")
    assert list(found) == [12]
    plain, average = (load_params(config.train.run_dir, weights=name).params for name in ("weights", "average"))
    assert found[12]["loss"] != records(config.train.run_dir, "validation")[12]["loss"]
    assert not np.array_equal(plain["norm_f"]["scale"], average["norm_f"]["scale"])


def test_streams_resume_exactly(make_config: MakeConfig) -> None:
    """The recurrent state is part of the checkpoint."""
    uninterrupted, config = make_config(order="streams"), make_config(order="streams")
    run(uninterrupted)
    assert run(config, Signal(signal.SIGTERM, at=5)).step == 5
    run(config)
    assert exact(config.train.run_dir, "train") == exact(uninterrupted.train.run_dir, "train")


def test_profile_of_a_window_of_steps(make_config: MakeConfig) -> None:
    config = make_config(profile_steps=(3, 4), num_steps=6)
    run(config)
    folder = Path(config.train.run_dir) / "profile"
    assert list(folder.rglob("*.xplane.pb"))
    (event,) = (event for event in read_events(folder.parent) if event["event"] == "profile")
    assert (event["first"], event["last"]) == (3, 4)


@pytest.mark.slow
def test_eight_devices_with_everything_on(
    finished: FinishedRun, full_config: Callable[[], ExperimentConfig], capfd: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(full_config(), mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    result = run(config)
    assert finished.result.validation is not None
    assert result.validation is not None
    assert result.validation.num_tokens == finished.result.validation.num_tokens
    # 12 steps apart, each as far as in test_step.py, where the bound is derived.
    assert result.validation.loss == pytest.approx(finished.result.validation.loss, rel=12 * 200 * 2.0**-24)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    # A checkpoint of eight devices continues on one, and is read by evaluation there.
    assert run(dataclasses.replace(config, mesh=MeshConfig(data=1))).is_complete
    assert json.loads((Path(config.train.run_dir) / "config.json").read_text())["mesh"]["fsdp"] == 1
