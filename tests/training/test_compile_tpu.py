"""The whole training step, compiled ahead of time for TPU pods that are not there."""

import concurrent.futures
import dataclasses
import importlib.util
import multiprocessing
import subprocess
import sys

import jax
import pytest

from configs import mamba_2_8b, mamba_130m
from mamba_jax.config import (
    DataConfig,
    ExperimentConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TextFolderSource,
    TrainConfig,
)
from mamba_jax.errors import InputError
from mamba_jax.training.pod_compile import KERNELS, StepReport, compile_step

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

    @property
    def config(self) -> ExperimentConfig:
        """A config of which only the step counts."""
        return ExperimentConfig(
            name="pod",
            model=self.model,
            data=DataConfig(train=TextFolderSource(path="none"), seq_len=self.length, global_batch=self.sequences),
            optimizer=OptimizerConfig(peak_lr=1e-3),
            train=TrainConfig(num_steps=100, run_dir="none"),
            mesh=self.mesh,
        )


def compile_target(target: Target) -> StepReport:
    """Compiles the step in this process."""
    jax.config.update("jax_platforms", "cpu")
    return compile_step(target.config, target.topology)


def compile_apart(target: Target) -> StepReport:
    """In a process of its own: the compiler ends its process where it finds a defect of its own."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as process:
        return process.submit(compile_target, target).result()


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


def check_report(report: StepReport) -> None:
    """The state is updated in place, everything fits, and the kernels run apart on every device."""
    assert report.reused >= report.memory["parameters"] + report.memory["optimizer state"]
    assert report.capacity is None or report.total_memory < report.capacity
    assert report.kernels.keys() == set(KERNELS)
    # An exchange in a kernel's scope would be one for every layer.
    assert not [line for line in report.collective_lines if "selective_scan" in line or "causal_conv1d" in line]


@pytest.mark.slow
@pytest.mark.parametrize("target", [pytest.param(target, id=name) for name, target in PODS.items()])
def test_step_compiles_for_the_pod(target: Target) -> None:
    report = compile_apart(target)
    check_report(report)
    assert report.collectives.keys() & {"all-reduce", "reduce-scatter"}, "gradients are summed"
    assert "all-gather" in report.collectives, "parameters are gathered"


def test_replicas_exchange_gradients_only() -> None:
    report = compile_apart(dataclasses.replace(FOUR_CHIPS, mesh=MeshConfig(data=4)))
    check_report(report)
    assert report.collectives.keys() == {"all-reduce"}
    # Gradients travel twice, to be summed and back, in float32 or, of matrix products, in bfloat16.
    size = report.memory["parameters"]
    assert size < report.collectives["all-reduce"][1] < 2.5 * size
    lines = report.lines()
    assert lines[0] == "4 devices of kind TPU v5 lite"
    assert "model FLOPs utilisation at most" in lines[-1]


def test_command_line() -> None:
    """`train.py --compile-only` reports, and says in one line what is wrong."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "train.py", "configs/quickstart.py", "--compile-only", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)

    done = run("--topology", "v5e:2x2", "--model.num-layers", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("4 devices of kind TPU v5 lite\nmemory of a device:\n  parameters ")
    missing, unknown = run(), run("--topology", "v5e:3")
    assert (missing.returncode, unknown.returncode) == (2, 2)
    assert missing.stderr.startswith("error: --compile-only needs --topology, such as --topology v5e:4x4")
    assert "error: no TPU topology 'v5e:3': expected a generation and the chips along its axes" in unknown.stderr


@pytest.mark.slow
def test_too_large_a_step() -> None:
    target = dataclasses.replace(FOUR_CHIPS, topology="v5e:1x1", mesh=MeshConfig(), length=2048, sequences=2**14)
    with pytest.raises(InputError, match=r"the step does not fit v5e:1x1: it needs .*; try a larger mesh\.fsdp"):
        compile_apart(target)
