"""Shows on GPUs that a run gives the same bits again, and what that costs.

    python benchmarks/run_determinism.py
    python benchmarks/run_determinism.py --num-devices 2

- The compiled step, from one state over the same batches: twice in a process, and in a second process that compiles
  anew. Compared are every metric and a fingerprint of every array of the state, after every step.
- `train.py`: uninterrupted, against killed and resumed. Compared are every value in `metrics.jsonl` that is not a
  speed, and the fingerprints in the last checkpoint.

The first is done with and without what makes it so: rows of the embedding summed in one order, and kernels of matrix
products that are not chosen by timing them.
"""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

import harness
from harness import Results, setting_here, time_calls
from mamba_jax.checkpoint import record
from mamba_jax.checkpoint.fingerprints import fingerprints
from mamba_jax.cli import one_line_errors, parse
from mamba_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ExperimentConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TextFolderSource,
    TrainConfig,
    to_json,
)
from mamba_jax.data.batch import LMBatch
from mamba_jax.errors import InputError
from mamba_jax.models import lookup
from mamba_jax.sharding import make_mesh, put_batch
from mamba_jax.training import step as step_module
from mamba_jax.training.config import ProgramConfig
from mamba_jax.training.program import TrainProgram

Variant = Literal["free", "repeatable"]
_SPEEDS = ("tokens_per_second", "mfu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to run.

    Attributes:
        num_devices: GPUs, over which the batch is split.
        d_model: width of the residual stream.
        num_layers: blocks.
        vocab_size: token ids.
        batch: sequences.
        length: tokens of a sequence.
        num_steps: compared in a process.
        seconds: time to spend on timing.
        text: folder of text files for `train.py`; None leaves that part out.
        run_steps: of `train.py`; it saves at every third of them and is killed after two thirds.
        output: folder of the results.
    """

    num_devices: int = 1
    d_model: int = 768
    num_layers: int = 24
    vocab_size: int = 50280
    batch: int = 8
    length: int = 2048
    num_steps: int = 12
    seconds: float = 5.0
    text: Path | None = None
    run_steps: int = 60
    output: Path = harness.RESULTS

    @property
    def program(self) -> ProgramConfig:
        """The step."""
        return ProgramConfig(
            model=ModelConfig(vocab_size=self.vocab_size, d_model=self.d_model, num_layers=self.num_layers),
            optimizer=OptimizerConfig(peak_lr=1e-3),
            num_steps=1000,
            seq_len=self.length,
            global_batch=self.batch,
        )

    def experiment(self, *, run_dir: str, num_steps: int) -> ExperimentConfig:
        """The run of this model on the text."""
        text = TextFolderSource(path=str(self.text))
        return ExperimentConfig(
            name="determinism",
            model=self.program.model,
            data=DataConfig(
                train=text,
                validation=text,
                seq_len=self.length,
                global_batch=self.batch,
                cache_dir=f"{run_dir}_cache",
            ),
            optimizer=self.program.optimizer,
            train=TrainConfig(
                num_steps=num_steps, run_dir=run_dir, log_every=1, sample_every=num_steps // 3, sample_tokens=32
            ),
            mesh=MeshConfig(data=self.num_devices),
            checkpoint=CheckpointConfig(every=num_steps // 3),
            evaluation=EvaluationConfig(every=num_steps // 3, max_batches=4),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steps:
    """What a process found: for each of two runs and each step, metrics and fingerprints by name; milliseconds."""

    runs: list[list[dict[str, Any]]]
    milliseconds: float
    compile_seconds: float
    device_kind: str


def make_batches(options: Options) -> list[LMBatch]:
    """Text-like tokens: few ids make up most of it."""
    rng = np.random.default_rng(0)
    batches = []
    for _ in range(options.num_steps):
        tokens = (rng.zipf(1.2, (options.batch, options.length + 1)) % options.vocab_size).astype(np.int32)
        zeros = np.zeros(tokens[:, 1:].shape, np.int32)
        batches.append(LMBatch(tokens=tokens[:, :-1], targets=tokens[:, 1:], loss_mask=zeros == 0, segment_ids=zeros))
    return batches


def run_steps(options: Options, variant: Variant) -> Steps:
    """Compiles the step, and runs it twice over the same batches."""
    if variant == "free":
        lookup._add_sorted = lookup._add_in_order
        step_module.compiler_options = lambda mesh: {}
    mesh = make_mesh(MeshConfig(data=options.num_devices), jax.devices()[: options.num_devices])
    program = TrainProgram(options.program, mesh)
    runs = []
    with jax.set_mesh(mesh):
        batches = [put_batch(mesh, batch) for batch in make_batches(options)]
        start = time.perf_counter()
        step = program.step.lower(program.state, batches[0]).compile()
        compile_seconds = time.perf_counter() - start
        for _ in range(2):
            state = program.initialize()
            found = []
            for batch in batches:
                state, metrics = step(state, batch)
                values = {name: float(value).hex() for name, value in vars(jax.device_get(metrics)).items()}
                found.append(values | fingerprints(state.items()))
            runs.append(found)

        def run() -> Any:
            nonlocal state
            state, metrics = step(state, batches[0])
            return state, metrics

        timing = time_calls(run, seconds=options.seconds, in_a_row=True)
    return Steps(
        runs=runs,
        milliseconds=timing.milliseconds,
        compile_seconds=compile_seconds,
        device_kind=jax.devices()[0].device_kind,
    )


def difference(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> str:
    """Where two runs part, or that they do not."""
    for step, (a, b) in enumerate(zip(one, two, strict=True), start=1):
        if names := [name for name in a.keys() | b.keys() if a.get(name) != b.get(name)]:
            return f"{len(names)} of {len(a)} values differ from step {step} on, such as {min(names)}"
    return "equal"


def run_to_the_end(config: ExperimentConfig, folder: Path, *, kill_at: int | None) -> tuple[list[Any], dict[str, int]]:
    """Runs train.py, if need be again after killing it; its metrics, and the fingerprints in its last checkpoint."""
    config_file, run_dir = folder / "config.py", Path(config.train.run_dir)
    config_file.write_text(
        "from mamba_jax.config import ExperimentConfig, from_json\n\n\n"
        f"def get_config():\n    return from_json(ExperimentConfig, {to_json(config)!r}, origin='determinism')\n"
    )
    command = [sys.executable, "train.py", str(config_file), "--train.run-dir", str(run_dir)]
    metrics = run_dir / "metrics.jsonl"
    if kill_at is not None:
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            while not metrics.is_file() or f'"step": {kill_at},' not in metrics.read_text():
                if process.poll() is not None:
                    raise InputError(f"train.py ended with {process.returncode} before step {kill_at}")
                time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    for values in records:
        for name in _SPEEDS:
            values.pop(name, None)
    records.append({"samples": (run_dir / "samples.txt").read_text()})
    return records, record.read(run_dir / "checkpoints" / str(config.train.num_steps)).fingerprints


def compare_runs(options: Options) -> str:
    """Uninterrupted against killed and resumed."""
    kill_at = 2 * options.run_steps // 3 + 5
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = options.experiment(run_dir=str(folder / "uninterrupted"), num_steps=options.run_steps)
        one, one_arrays = run_to_the_end(config, folder, kill_at=None)
        config = options.experiment(run_dir=str(folder / "killed"), num_steps=options.run_steps)
        two, two_arrays = run_to_the_end(config, folder, kill_at=kill_at)
    arrays = "equal" if one_arrays == two_arrays else "different"
    return (
        f"`train.py`, {options.run_steps} steps, killed after step {kill_at} and resumed, against uninterrupted: "
        f"metrics and samples ({len(one)} records) {difference(one, two)}; arrays of the last checkpoint {arrays}."
    )


def main() -> None:
    """Command-line entry."""
    with one_line_errors():
        options = parse(Options, prog="benchmarks/run_determinism.py")
        found: dict[Variant, list[Steps]] = {}
        with concurrent.futures.ProcessPoolExecutor(
            1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1
        ) as processes:
            for variant in ("free", "repeatable"):
                found[variant] = [processes.submit(run_steps, options, variant).result() for _ in range(2)]
        setting = setting_here(f"{options.num_devices} x {found['repeatable'][0].device_kind}")
        results = Results(options.output, setting)
        workload = (
            f"Mamba-1 d_model {options.d_model}, {options.num_layers} layers, vocabulary {options.vocab_size}, batch "
            f"{options.batch} x {options.length}, bfloat16 products"
        )
        for variant, (one, two) in found.items():
            figures: dict[str, Any] = {
                "twice_in_a_process": difference(*one.runs),
                "two_processes": difference(one.runs[0], two.runs[0]),
                "ms_in_the_second": two.milliseconds,
                "compile_s": one.compile_seconds,
                "compile_s_in_the_second": two.compile_seconds,
            }
            results.add(
                "repeated step",
                workload,
                implementation=variant,
                direction="step",
                milliseconds=one.milliseconds,
                **figures,
            )
        notes = [f"{options.num_steps} steps; metrics and fingerprints of all arrays of the state after each."]
        notes += [compare_runs(options)] if options.text is not None else []
        name = f"determinism_{options.num_devices}x_gpu"
        print(f"wrote {results.write_table(name, 'The same bits again', *notes)}")


if __name__ == "__main__":
    main()
