"""Whole runs of train.py, alone and as two processes, that are stopped, killed, stuck, and run again.

A job of two processes takes 20 s or more on two cores, half of it compilation, so only one story is told in the default
suite: a run of two processes that is asked to stop, and resumed.
"""

import dataclasses
import random
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from mamba_jax.config import (
    CheckpointConfig,
    EvaluationConfig,
    ExperimentConfig,
    FaultsConfig,
    MeshConfig,
    TextFolderSource,
)
from mamba_jax.run.stop_requests import EXIT_PREEMPTED
from mamba_jax.run.watchdog import EXIT_HUNG
from mamba_jax.telemetry.metrics import read_metrics, read_samples
from tests.multiprocess.harness import Launcher, exact_losses, saved_steps

MakeConfig = Callable[..., ExperimentConfig]

NUM_STEPS = 12
MESH = MeshConfig(data=2, fsdp=2, tensor=2)
ALONE = ("none",)
BOTH = ("none", "none")


@pytest.fixture(scope="module")
def new_run(make_config: MakeConfig) -> MakeConfig:
    """Makes the config of a run on all devices in a new directory; only the directory differs between calls."""

    def make(**fields: object) -> ExperimentConfig:
        return make_config(**{"seed": 3, "mesh": MESH, "checkpoint": CheckpointConfig(every=5), **fields})

    return make


@pytest.fixture(scope="module")
def uninterrupted(launcher: Launcher, new_run: MakeConfig) -> dict[int, str]:
    """Losses of two processes that nothing happens to."""
    config = new_run()
    ended = launcher.train(config, BOTH)
    assert ended.statuses == (0, 0), ended.logs
    assert saved_steps(config.train.run_dir) == [5, 10, NUM_STEPS]
    losses = exact_losses(config.train.run_dir)
    assert list(losses) == list(range(1, NUM_STEPS + 1))
    return losses


@pytest.fixture(scope="module")
def alone(launcher: Launcher, new_run: MakeConfig) -> dict[int, str]:
    """The same of one process."""
    config = new_run()
    ended = launcher.train(config, ALONE)
    assert ended.statuses == (0,), ended.logs
    return exact_losses(config.train.run_dir)


@pytest.fixture(scope="module")
def stopped(launcher: Launcher, new_run: MakeConfig) -> ExperimentConfig:
    """A run of two processes, of which the second got SIGTERM when it drew the batch of step 9."""
    config = new_run()
    ended = launcher.train(config, ("none", "SIGTERM@step:9"))
    assert ended.statuses == (EXIT_PREEMPTED, EXIT_PREEMPTED), ended.logs
    # The batch of step 9 is drawn when 8 steps are done.
    assert 8 <= saved_steps(config.train.run_dir)[-1] < NUM_STEPS
    return config


def copied(config: ExperimentConfig, new: ExperimentConfig) -> ExperimentConfig:
    """The run of `config` in the directory of `new`."""
    shutil.copytree(config.train.run_dir, new.train.run_dir)
    return new


def ulps_apart(losses: dict[int, str], others: dict[int, str]) -> int:
    """Largest distance of two losses of the same step, in units of the last place of float32."""
    assert losses.keys() == others.keys()
    first, second = (
        np.array([float.fromhex(loss[step]) for step in sorted(loss)], np.float32) for loss in (losses, others)
    )
    return int(np.abs(first.view(np.int32) - second.view(np.int32)).max())


# Another number of processes adds the same up to eight float32 terms of a sum in another order. With u = 2^-24 that
# changes a gradient by 7 u of itself, an update of size 1e-2 by less than 1e-2 * 14 u, and after 12 steps a parameter
# by less than 2 u; the loss, whose gradient has norm about 1, by as much. The losses here are 4 to 6, where a unit of
# the last place is 8 u: one unit from that, one from the order of the sum that is the loss.
OTHER_ORDER_ULPS = 2


def test_resumes_exactly(launcher: Launcher, new_run: MakeConfig, stopped: ExperimentConfig) -> None:
    """Two jobs, of which the second goes on from a step that the first had passed: both take the steps after it."""
    config = copied(stopped, new_run())
    steps = saved_steps(config.train.run_dir)
    assert steps[0] == 5
    for step in steps[1:]:
        shutil.rmtree(Path(config.train.run_dir) / "checkpoints" / str(step))
    ended = launcher.train(config, BOTH)
    assert ended.statuses == (0, 0), ended.logs
    assert "resuming at step 5" in ended.logs[0]
    before, after = exact_losses(stopped.train.run_dir), exact_losses(config.train.run_dir)
    assert list(after) == list(range(1, NUM_STEPS + 1))
    assert len(before) >= 8
    assert before == {step: after[step] for step in before}


@pytest.mark.slow
def test_stopped_run_resumes_exactly(
    launcher: Launcher, new_run: MakeConfig, stopped: ExperimentConfig, uninterrupted: dict[int, str]
) -> None:
    config = copied(stopped, new_run())
    first = saved_steps(config.train.run_dir)[-1]
    ended = launcher.train(config, BOTH)
    assert ended.statuses == (0, 0), ended.logs
    assert f"resuming at step {first}" in ended.logs[0]
    assert exact_losses(config.train.run_dir) == uninterrupted


@pytest.mark.slow
def test_one_process_goes_on_for_two(
    launcher: Launcher, new_run: MakeConfig, stopped: ExperimentConfig, uninterrupted: dict[int, str]
) -> None:
    config = copied(stopped, new_run())
    ended = launcher.train(config, ALONE)
    assert ended.statuses == (0,), ended.logs
    losses = exact_losses(config.train.run_dir)
    assert ulps_apart(losses, uninterrupted) <= OTHER_ORDER_ULPS


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("place", "least"), [("step:6", 5), ("compile", 0), ("evaluation", 5), ("sample", 5), ("save:5", 5)]
)
def test_sigterm_saves(
    launcher: Launcher, new_run: MakeConfig, corpus: Path, processes: int, place: str, least: int
) -> None:
    fields: dict[str, object] = {}
    if place == "evaluation":
        fields = {"validation": TextFolderSource(path=str(corpus / "validation"))}
        fields["evaluation"] = EvaluationConfig(every=5, max_batches=1)
    elif place == "sample":
        fields = {"sample_every": 5, "sample_tokens": 4}
    config = new_run(num_steps=30, **fields)
    ended = launcher.train(config, [*BOTH[1:processes], f"SIGTERM@{place}"])
    assert ended.statuses == (EXIT_PREEMPTED,) * processes, ended.logs
    assert least <= saved_steps(config.train.run_dir)[-1] < 30
    assert "stopped and saved at step" in ended.logs[0]


@pytest.mark.slow
def test_interrupt_of_one_stops_both(launcher: Launcher, new_run: MakeConfig) -> None:
    config = new_run(num_steps=30)
    ended = launcher.train(config, ("SIGINT@step:4", "none"))
    assert ended.statuses == (128 + signal.SIGINT, EXIT_PREEMPTED), ended.logs
    assert 3 <= saved_steps(config.train.run_dir)[-1] < 30


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_three_times(launcher: Launcher, new_run: MakeConfig, alone: dict[int, str], seed: int) -> None:
    draw = random.Random(seed)
    config = new_run(checkpoint=CheckpointConfig(every=2))
    for _ in range(3):
        folder = Path(config.train.run_dir) / "checkpoints"
        first = max(saved_steps(config.train.run_dir), default=0) if folder.exists() else 0
        # Up to 50 ms later the step, the next ones or a save are under way.
        fault = f"SIGKILL+{draw.uniform(0.001, 0.05)}@step:{min(first + draw.randint(1, 4), NUM_STEPS)}"
        ended = launcher.train(config, (fault,))
        assert ended.statuses == (-signal.SIGKILL,), ended.logs
    ended = launcher.train(config, ALONE)
    assert ended.statuses == (0,), ended.logs
    assert exact_losses(config.train.run_dir) == alone


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_second_start_is_refused_or_waits(
    launcher: Launcher,
    new_run: MakeConfig,
    alone: dict[int, str],
    uninterrupted: dict[int, str],
    processes: int,
) -> None:
    """Three starts in one folder at the same time: the first is the owner and does as if it were alone."""
    config = new_run(num_steps=12)
    owner = Path(config.train.run_dir) / "owner.json"
    with ThreadPoolExecutor() as pool:
        # Slow from the second step on, and stopped by nothing.
        first = pool.submit(launcher.train, config, ["SIGWINCH@step:2", "none"][:processes])
        while not owner.is_file():
            assert not first.done()
            time.sleep(0.1)
        waiting = pool.submit(launcher.train, config, BOTH[:processes], flags=["--wait"])
        refused = launcher.train(config, BOTH[:processes])
    assert refused.statuses == (2,) * processes, refused.logs
    for log in refused.logs:
        (line,) = (line for line in log.splitlines() if line.startswith("error: "))
        assert "is being trained by process" in line
        assert "Traceback" not in log
    assert first.result().statuses == (0,) * processes, first.result().logs
    assert waiting.result().statuses == (0,) * processes, waiting.result().logs
    assert "waiting for process" in waiting.result().logs[0]
    assert f"resuming at step {NUM_STEPS}" in waiting.result().logs[0]
    assert exact_losses(config.train.run_dir) == (alone if processes == 1 else uninterrupted)
    assert saved_steps(config.train.run_dir) == [5, 10, NUM_STEPS]


@pytest.mark.slow
def test_complete_run_of_two_processes_starts_again(launcher: Launcher, new_run: MakeConfig, tmp_path: Path) -> None:
    """More evaluation batches than XLA's programs on CPUs may be in flight, of weights and averaged weights."""
    (tmp_path / "a.txt").write_text("select what they remember and forget " * 300)
    config = new_run(
        num_steps=2,
        ema_decay=0.9,
        validation=TextFolderSource(path=str(tmp_path)),
        cache_dir=str(tmp_path / "cache"),
    )
    for _ in range(3):
        ended = launcher.train(config, BOTH, timeout=240)
        assert ended.statuses == (0, 0), ended.logs
    found = read_metrics(Path(config.train.run_dir))
    assert [record["kind"] for record in found] == ["train", "train", "validation", "validation_ema"]
    assert found[-1]["num_tokens"] > 32 * config.data.global_batch * config.data.seq_len


@pytest.mark.slow
def test_two_processes_after_the_first_was_killed(
    launcher: Launcher, new_run: MakeConfig, uninterrupted: dict[int, str]
) -> None:
    config = new_run()
    ended = launcher.train(config, ("SIGKILL@save:5", "none"))
    assert ended.statuses[0] == -signal.SIGKILL
    assert ended.statuses[1] not in (0, 2), ended.logs[1]
    ended = launcher.train(config, BOTH)
    assert ended.statuses == (0, 0), ended.logs
    assert exact_losses(config.train.run_dir) == uninterrupted


@pytest.mark.slow
def test_stuck_process_ends_the_job(launcher: Launcher, new_run: MakeConfig) -> None:
    # Longer than one process may have to wait in its first step for another that still compiles.
    deadline = 30.0
    config = dataclasses.replace(new_run(), faults=FaultsConfig(deadline_seconds=deadline))
    ended = launcher.train(config, ("none", "hang@step:8"), timeout=240)
    assert ended.end - ended.fault_time(1) < deadline + 10
    # Whichever process ends first takes the other with it, by its own deadline or by JAX's abort.
    assert EXIT_HUNG in ended.statuses
    assert set(ended.statuses) <= {EXIT_HUNG, -signal.SIGABRT}
    assert "watchdog: no progress for 30 s while step 8" in ended.logs[1] + ended.logs[0]
    assert "in strike" in ended.logs[1]


@pytest.mark.slow
def test_crash_of_one_ends_both(launcher: Launcher, new_run: MakeConfig) -> None:
    ended = launcher.train(new_run(), ("none", "crash@step:6"), timeout=240)
    assert "RuntimeError: the fault of a test" in ended.logs[1]
    assert 0 not in ended.statuses
    # The coordinator waits 60 s for a process that crashed, and finds one that vanished within 100 s.
    assert ended.end - ended.fault_time(1) < 60 + 100


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [MESH, MeshConfig(data=1, fsdp=8), MeshConfig(data=1, sequence=8), MeshConfig(data=1, fsdp=2, tensor=4)],
    ids=["data over processes", "fsdp over processes", "sequence over processes", "fsdp and tensor"],
)
def test_processes_do_what_one_does(launcher: Launcher, new_run: MakeConfig, corpus: Path, mesh: MeshConfig) -> None:
    configs = [
        new_run(
            mesh=mesh,
            validation=TextFolderSource(path=str(corpus / "validation")),
            evaluation=EvaluationConfig(every=5, max_batches=2),
            sample_every=6,
            sample_tokens=8,
            sample_prompt="state",
        )
        for _ in range(2)
    ]
    for config, faults in zip(configs, (ALONE, BOTH), strict=True):
        ended = launcher.train(config, faults)
        assert set(ended.statuses) == {0}, ended.logs
    one, two = (Path(config.train.run_dir) for config in configs)
    assert ulps_apart(exact_losses(one), exact_losses(two)) <= OTHER_ORDER_ULPS
    assert read_samples(one) == read_samples(two)
    assert [step for step, _ in read_samples(one)] == [6, 12]
    first, second = ([r for r in read_metrics(run) if r["kind"] == "validation"] for run in (one, two))
    assert [record["step"] for record in first] == [record["step"] for record in second] == [5, 10, 12]
    for record, other in zip(first, second, strict=True):
        assert record["num_tokens"] == other["num_tokens"]
        # The same bound, as a fraction: a unit of the last place is at most 2^-23 of a number.
        np.testing.assert_allclose(record["loss"], other["loss"], rtol=OTHER_ORDER_ULPS * 2**-23, atol=0)
