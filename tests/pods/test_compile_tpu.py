"""The whole training step, compiled ahead of time for TPU pods that are not there."""

import concurrent.futures
import dataclasses
import importlib.util
import multiprocessing
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from configs import mamba_2_8b, mamba_130m
from mamba_jax.config import (
    ExperimentConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
)
from mamba_jax.config_files import load_config
from mamba_jax.errors import InputError
from mamba_jax.pods.compile import compile_step
from mamba_jax.pods.estimate import StepEstimate
from mamba_jax.pods.hlo import KERNELS
from mamba_jax.sharding import make_mesh
from mamba_jax.training.config import ProgramConfig
from mamba_jax.training.program import TrainProgram
from pallas_kernels.common.ahead_of_time import tpu_devices

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed")

SMALL = ModelConfig(vocab_size=512, d_model=128, num_layers=2)
PUBLISHED_130M, PUBLISHED_2_8B = mamba_130m.get_config().model, mamba_2_8b.get_config().model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """What to compile, and for which pod."""

    topology: str
    mesh: MeshConfig
    model: ModelConfig
    length: int
    sequences: int
    num_slices: int = 1

    @property
    def program(self) -> ProgramConfig:
        """What is compiled."""
        return ProgramConfig(
            model=self.model,
            optimizer=OptimizerConfig(peak_lr=1e-3),
            num_steps=100,
            seq_len=self.length,
            global_batch=self.sequences,
        )


def compile_here(program: ProgramConfig, mesh: MeshConfig, topology: str, num_slices: int) -> StepEstimate:
    """Compiles the step in this process."""
    jax.config.update("jax_platforms", "cpu")
    return compile_step(program, mesh, topology, num_slices=num_slices)


def compile_apart(program: ProgramConfig, mesh: MeshConfig, topology: str, num_slices: int = 1) -> StepEstimate:
    """In a process of its own: the compiler ends its process where it finds a defect of its own."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as process:
        return process.submit(compile_here, program, mesh, topology, num_slices).result()


def compile_target(target: Target) -> StepEstimate:
    """The report for a target."""
    return compile_apart(target.program, target.mesh, target.topology, target.num_slices)


FOUR_CHIPS = Target(topology="v5e:2x2", mesh=MeshConfig(data=2, fsdp=2), model=SMALL, length=128, sequences=8)
PODS = {
    "v5e:2x2": FOUR_CHIPS,
    "v6e:2x2, tensor": dataclasses.replace(FOUR_CHIPS, topology="v6e:2x2", mesh=MeshConfig(fsdp=2, tensor=2)),
    "v4:2x2x1": dataclasses.replace(FOUR_CHIPS, topology="v4:2x2x1", mesh=MeshConfig(data=-1, fsdp=2)),
    "tpu7x:2x2x1": dataclasses.replace(FOUR_CHIPS, topology="tpu7x:2x2x1", mesh=MeshConfig(data=-1, fsdp=2)),
} | {
    f"{topology}, {name}": Target(topology=topology, mesh=mesh, model=model, length=2048, sequences=sequences)
    for topology, mesh, sequences, name, model in (
        ("v5e:4x4", MeshConfig(fsdp=16), 256, "130M", PUBLISHED_130M),
        ("v5e:16x16", MeshConfig(fsdp=16), 256, "130M", PUBLISHED_130M),
        ("v5e:16x16", MeshConfig(fsdp=256), 256, "2.8B", PUBLISHED_2_8B),
        ("v5p:8x8x8", MeshConfig(fsdp=64), 512, "130M", PUBLISHED_130M),
        ("v5p:8x8x8", MeshConfig(fsdp=64), 512, "2.8B", PUBLISHED_2_8B),
    )
}


def check_report(report: StepEstimate, *, sequence: int = 1) -> None:
    """The state is updated in place, everything fits, and the kernels run apart on every device."""
    assert report.reused >= report.memory["parameters"] + report.memory["optimizer state"]
    assert report.capacity is None or report.total_memory < report.capacity
    # Only parts of a sequence pass on the state at their edges.
    whole = set() if sequence > 1 else {"selective_scan_pallas_tpu_edge"}
    of_mamba1 = {name for name in KERNELS if not name.startswith("ssd")}
    assert report.kernels.keys() == of_mamba1 - whole
    # An exchange in a kernel's scope would be one for every layer. The sum of a gradient over devices is none: libtpu
    # 0.0.48 names it after the kernel that it follows.
    in_scope = [line for line in report.collective_lines if "selective_scan" in line or "causal_conv1d" in line]
    assert not [line for line in in_scope if "_backward/pallas_call/psum" not in line]
    if report.expected_seconds is not None:
        check_breakdown(report)


def check_breakdown(report: StepEstimate) -> None:
    """The parts of the time add up to that of operations and kernels, and with the waits to an expected one."""
    seconds, expected = report.seconds_by_kind, report.expected_seconds
    assert seconds is not None
    assert expected is not None
    assert report.operation_seconds is not None
    assert report.kernel_seconds is not None
    total, waits = sum(seconds.values()), seconds["exchanges not hidden"]
    assert total - waits == pytest.approx(report.operation_seconds + report.kernel_seconds)
    assert seconds["kernels"] == pytest.approx(report.kernel_seconds)
    least, most = expected
    assert least * (1 - 1e-9) <= total <= most * (1 + 1e-9)
    assert seconds["other"] < 0.01 * total
    assert all(seconds[kind] > 0 for kind in seconds if kind != "other")


@pytest.mark.slow
@pytest.mark.parametrize("target", [pytest.param(target, id=name) for name, target in PODS.items()])
def test_step_compiles_for_the_pod(target: Target) -> None:
    report = compile_target(target)
    check_report(report)
    assert report.collectives.keys() & {"all-reduce", "reduce-scatter"}, "gradients are summed"
    assert "all-gather" in report.collectives, "parameters are gathered"


def test_replicas_exchange_gradients_only() -> None:
    report = compile_target(dataclasses.replace(FOUR_CHIPS, mesh=MeshConfig(data=4)))
    check_report(report)
    assert report.collectives.keys() == {"all-reduce"}
    # Gradients travel twice, to be summed and back, in float32 or, of matrix products, in bfloat16.
    size = report.memory["parameters"]
    assert size < report.collectives["all-reduce"][1] < 2.5 * size
    lines = report.lines()
    assert lines[0] == "4 devices of kind TPU v5 lite"
    assert any("model FLOPs utilisation at most" in line for line in lines)


def test_products_with_gathered_matrices_are_not_cut() -> None:
    """Cut into pieces, one for each device that holds a part, the matrices would be passed on piece by piece."""
    model = ModelConfig(vocab_size=512, d_model=1024, num_layers=2)
    mesh = MeshConfig(data=1, fsdp=8, tensor=2)
    target = Target(topology="v5e:4x4", mesh=mesh, model=model, length=2048, sequences=64)
    report = compile_target(target)
    check_report(report)
    assert "collective-permute" not in report.collectives, report.lines()


def test_command_line() -> None:
    """`train.py --compile-only` reports on two slices, of which only gradients pass between one and the other."""
    command = [sys.executable, "train.py", "configs/quickstart.py", "--compile-only"]
    command += ["--topology", "v5e:2x2", "--num-slices", "2", "--mesh.fsdp", "4"]
    command += ["--model.num-layers", "1", "--data.global-batch", "8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("8 devices of kind TPU v5 lite in 2 slices\nmemory of a device:\n  parameters ")
    assert re.search(r"^between slices:\n  all-reduce .*\nkernels in a step:$", done.stdout, re.MULTILINE)


def test_unknown_topologies() -> None:
    with pytest.raises(InputError, match="no TPU topology 'v5e:3': expected a generation and the chips along its axes"):
        compile_here(FOUR_CHIPS.program, FOUR_CHIPS.mesh, "v5e:3", 1)
    with pytest.raises(InputError, match="num_slices must be positive, got 0"):
        compile_here(FOUR_CHIPS.program, FOUR_CHIPS.mesh, "v5e:2x2", 0)
    with pytest.raises(InputError, match="cannot be split over 2 slices"):
        compile_here(FOUR_CHIPS.program, MeshConfig(data=1, fsdp=8), "v5e:2x2", 2)


CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "pods").glob("[a-z]*.py"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PodConfig:
    """A config for a pod, and what its docstring says: where it is compiled for, and lines of the report.

    Attributes:
        config: of the run.
        topology: of a slice.
        num_slices: of the pod.
        report: lines.
    """

    config: ExperimentConfig
    topology: str
    num_slices: int
    report: list[str]

    @classmethod
    def read(cls, path: Path) -> "PodConfig":
        """From the file of the config."""
        text = path.read_text().split('"""')[1]
        command = (
            rf"python train\.py configs/pods/{path.name} --compile-only --topology (\S+)(?: --num-slices (\d+))?\n"
        )
        place = re.search(rf"\nCompiled:  {command}", text)
        assert place is not None, "the docstring names the command that compiles the config for its pod"
        lines = text.split("\nReport:")[1].splitlines()[1:]
        return cls(
            config=load_config(str(path), []),
            topology=place[1],
            num_slices=int(place[2] or 1),
            report=[line.strip() for line in lines if line.strip()],
        )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_pod_configs_fit_their_pods(path: Path) -> None:
    pod = PodConfig.read(path)
    config = pod.config
    TrainProgram(config.program, make_mesh(config.mesh, tpu_devices(pod.topology, pod.num_slices)))
    assert config.name == path.stem
    assert config.train.run_dir == f"runs/{path.stem}"


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_pod_configs_are_what_they_say(path: Path) -> None:
    """The figures in their docstrings: memory, every kind of exchange, time. Compile again where they have changed."""
    pod = PodConfig.read(path)
    report = compile_apart(pod.config.program, pod.config.mesh, pod.topology, pod.num_slices)
    check_report(report, sequence=pod.config.mesh.sequence)
    lines = [line.strip() for line in report.lines()]
    assert len(pod.report) > 5
    assert not [line for line in pod.report if line not in lines], "\n".join(lines)
    if pod.num_slices > 1:
        # A device receives the sums of its part of the gradients, in float32 at the most.
        assert report.between_slices.keys() == {"all-reduce"}
        assert report.between_slices["all-reduce"][1] < 1.1 * report.memory["parameters"]


@pytest.mark.slow
def test_too_large_a_step() -> None:
    target = dataclasses.replace(FOUR_CHIPS, topology="v5e:1x1", mesh=MeshConfig(), length=2048, sequences=2**14)
    with pytest.raises(InputError, match=r"the step does not fit v5e:1x1: it needs .*; try a larger mesh\.fsdp"):
        compile_target(target)
