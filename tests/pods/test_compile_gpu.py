"""The whole training step, compiled ahead of time for H100s that are not there; needs the `cuda` extra."""

import re
from pathlib import Path

import pytest

from mamba_jax.config import MeshConfig
from mamba_jax.sharding import make_mesh
from mamba_jax.training.program import TrainProgram
from pallas_kernels.common.ahead_of_time import compile_lowered, cuda_devices
from tests.pods.test_compile_tpu import SMALL, Target
from tests.programs import text_of

TARGET = Path(__file__).parents[2] / "benchmarks" / "targets" / "h100_sxm.txtpb"


@pytest.mark.parametrize("count", [1, 8])
def test_step_compiles_with_the_kernels_inside(count: int) -> None:
    pytest.importorskip("jax_cuda13_plugin")
    target = Target(topology=f"1x1x{count}", mesh=MeshConfig(data=count), model=SMALL, length=1024, sequences=2 * count)
    lowered = TrainProgram(target.program, make_mesh(target.mesh, cuda_devices(TARGET, count))).lower(("cuda",))
    text = lowered.as_text()
    assert all(f"pallas_gpu_{kernel}" in text for kernel in ("forward", "backward", "parts"))
    assert all(f"causal_conv1d_{kernel}" in text for kernel in ("forward", "backward"))
    program = text_of(compile_lowered(lowered))
    gathers = re.findall(r" (?:all-gather|all-to-all|collective-permute)(?:-start)?\(.*", program)
    assert not [line for line in gathers if "selective_scan" in line]
