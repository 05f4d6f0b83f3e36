"""The Triton kernels of the selective scan, without a GPU: arithmetic, compilation, refusals.

Arithmetic runs in Triton's interpreter. It replaces the compiler for a whole process, from before triton is imported,
so one test runs the others that need it in a second process.
"""

import dataclasses
import functools
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import selective_scan
from pallas_kernels.common.ahead_of_time import tracing_for_kind
from pallas_kernels.selective_scan.arg_specs import FULL, SPECS, ScanSpec
from pallas_kernels.selective_scan.arguments import ScanArguments, ScanOutput
from pallas_kernels.selective_scan.triton import call as triton_call
from pallas_kernels.selective_scan.triton import op as triton_backend
from pallas_kernels.selective_scan.triton.op import Tile, Tiling
from tests.kernels import op_contract
from tests.kernels.op_contract import Op, make_call, with_arrays
from tests.kernels.triton_interpreter import HostArray, compiled, interpreted, round_to_nearest

REAL_SPECS = tuple(spec for spec in SPECS if not spec.is_complex)
UNSEGMENTED = dataclasses.replace(FULL, length=67, has_segments=False)
# Few and large tiles, because the interpreter takes as long for a small operation as for a large one.
LARGE = Tiling(
    lanes_per_channel=1,
    states=4,
    chunk=32,
    forward=Tile(tokens=16, channels=8, warps=1),
    backward=Tile(tokens=16, channels=8, warps=1),
)
# Blocks that do not divide a group, and more than one state of a channel in a lane and more than one lane for it.
NARROW = Tiling(
    lanes_per_channel=2,
    states=2,
    chunk=8,
    forward=Tile(tokens=2, channels=2, warps=1),
    backward=Tile(tokens=4, channels=2, warps=1),
)


def run(*, implementation: str, tiling: Tiling | None = None, **arguments) -> ScanOutput:
    """The reference, or the Triton backend whatever the platform."""
    if implementation == "reference":
        return selective_scan(**arguments, implementation="reference")
    return triton_backend.selective_scan(ScanArguments.of(**arguments), tiling=tiling)


def op(tiling: Tiling | None = None) -> Op:
    return Op(name="selective_scan", function=functools.partial(run, tiling=tiling))


def interpreted_call(kernel, inputs, outputs, constants, *, programs, warps, name):
    """`triton_call.call` in the interpreter. What a kernel does not write is NaN."""
    assert kernel.arg_names == [*inputs, *outputs, *constants]
    present = [array for array in inputs.values() if array is not None]
    written = {key: output for key, output in outputs.items() if output is not None}

    def launch(*arrays):
        remaining = iter(arrays)
        host = [HostArray(np.zeros(1, np.float32) if i is None else np.array(next(remaining))) for i in inputs.values()]
        results = {
            key: HostArray(
                np.full((1,) if output is None else output.shape, np.nan, getattr(output, "dtype", np.float32))
            )
            for key, output in outputs.items()
        }
        with np.errstate(all="ignore"):
            kernel[(programs,)](*host, *results.values(), **constants)
        return [results[key].array for key in written]

    return dict(zip(written, jax.pure_callback(launch, list(written.values()), *present), strict=True))


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the kernels in the interpreter."""
    round_to_nearest(monkeypatch)
    monkeypatch.setattr(triton_call, "import_kernels", lambda op, module: importlib.import_module(module))
    monkeypatch.setattr(triton_call, "call", interpreted_call)


@compiled
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_arithmetic_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", str(Path(__file__)), "-k", "interpreted"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]
    assert "passed" in result.stdout


@interpreted
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("spec", REAL_SPECS, ids=lambda spec: spec.name)
def test_interpreted_values_and_gradients(spec: ScanSpec) -> None:
    tiling = dataclasses.replace(LARGE, states=spec.states)
    op_contract.check_values_and_gradients(op(tiling), "triton", make_call(spec))


@interpreted
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", ["full", "grouped_zoh"])
def test_interpreted_in_narrow_blocks(name: str) -> None:
    spec = next(spec for spec in SPECS if spec.name == name)
    op_contract.check_values_and_gradients(op(NARROW), "triton", make_call(dataclasses.replace(spec, length=19)))


@interpreted
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("states", [3, 16, 40, 200])
def test_interpreted_any_number_of_states(states: int) -> None:
    spec = dataclasses.replace(FULL, length=5, states=states, B="grouped", C="grouped")
    op_contract.check_values_and_gradients(op(), "triton", make_call(spec))


@interpreted
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("discretization", ["euler", "zoh"])
def test_interpreted_extreme_decays(discretization: Literal["euler", "zoh"]) -> None:
    spec = dataclasses.replace(UNSEGMENTED, has_softplus=False, has_bias=False, discretization=discretization)
    call = make_call(spec)
    rng = np.random.default_rng(3)
    shape = call.arrays["dt"].shape
    dt = 10.0 ** rng.integers(-9, 3, shape) * (rng.random(shape) < 0.9)
    call = with_arrays(call, dt=dt, x=np.asarray(call.arrays["x"]) / np.maximum(dt, 1))
    op_contract.check_values_and_gradients(op(LARGE), "triton", call)


@interpreted
@pytest.mark.usefixtures("interpreter")
def test_interpreted_tiny_softplus() -> None:
    spec = dataclasses.replace(UNSEGMENTED, has_bias=False, has_skip=False, has_initial_state=False)
    call = make_call(spec)
    call = with_arrays(call, dt=np.asarray(call.arrays["dt"]) - 30)
    op_contract.check_values_and_gradients(op(LARGE), "triton", call)


@interpreted
@pytest.mark.usefixtures("interpreter")
def test_interpreted_segments_causality_and_split() -> None:
    call = make_call(UNSEGMENTED)
    op_contract.check_segments(op(LARGE), "triton", call, starts=(43, 64))
    op_contract.check_causality(op(LARGE), "triton", call, at=33)
    op_contract.check_split(op(LARGE), "triton", call, at=21)


@interpreted
@pytest.mark.usefixtures("interpreter")
def test_interpreted_nan_is_not_lost() -> None:
    call = make_call(UNSEGMENTED)
    dt = np.array(call.arrays["dt"])
    dt[0, 5, 1] = np.nan
    outputs = run(**call.arrays | {"dt": jnp.asarray(dt)}, **call.static, tiling=LARGE, implementation="triton")
    is_nan = np.isnan(np.asarray(outputs.y))
    assert is_nan[0, 5:, 1].all()
    assert is_nan.sum() == is_nan.shape[1] - 5


@compiled
@pytest.mark.parametrize("compute_capability", [80, 90])
@pytest.mark.parametrize(
    "spec",
    [
        ScanSpec(name="float32", length=2048, batch=8, channels=1536, states=16),
        ScanSpec(name="bfloat16", length=2048, batch=8, channels=1536, states=16, dtype="bfloat16"),
        ScanSpec(name="everything", length=67, B="grouped", C="constant", discretization="zoh", has_segments=True),
    ],
    ids=lambda spec: spec.name,
)
def test_kernels_compile(spec: ScanSpec, compute_capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kernels compile to machine code, and the registers of a thread suffice."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget  # pyrefly: ignore[missing-import]
    from triton.compiler import ASTSource  # pyrefly: ignore[missing-import]

    names = {"float32": "*fp32", "bfloat16": "*bf16", "int32": "*i32"}
    binaries = {}

    def compile_kernel(kernel, inputs, outputs, constants, *, programs, warps, name):
        arrays = [*inputs.values(), *outputs.values()]
        types = [names[str(getattr(array, "dtype", "float32"))] for array in arrays]
        signature = dict(zip(kernel.arg_names, [*types, *["constexpr"] * len(constants)], strict=True))
        aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(arrays))}
        source = ASTSource(kernel, signature, constexprs=dict(constants), attrs=aligned)
        target = GPUTarget("cuda", compute_capability, 32)
        # jax-triton asks for contraction to fused multiply-adds too.
        options = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}
        binaries[name] = triton.compile(source, target=target, options=options)
        return {key: jnp.zeros(output.shape, output.dtype) for key, output in outputs.items() if output is not None}

    monkeypatch.setattr(triton_call, "import_kernels", lambda op, module: importlib.import_module(module))
    monkeypatch.setattr(triton_call, "call", compile_kernel)
    call = shape_of_call(spec)
    forward_and_backward = functools.partial(outputs_and_gradients, call["static"])
    jax.eval_shape(forward_and_backward, call["arrays"], call["integers"])
    assert binaries.keys() == {"selective_scan_forward", "selective_scan_backward"}
    for name, binary in binaries.items():
        assert binary.asm["cubin"]
        assert f".target sm_{compute_capability}" in binary.asm["ptx"]
        assert ".local" not in binary.asm["ptx"], f"{name} indexes its registers"


def shape_of_call(spec: ScanSpec) -> dict:
    """Shapes of a call's arguments; nothing of their size is drawn."""
    sequence = (spec.batch, spec.length)
    layouts = {
        "shared": (*sequence, spec.states),
        "grouped": (*sequence, spec.groups, spec.states),
        "constant": (spec.channels, spec.states),
    }
    shapes = dict.fromkeys(("x", "dt", "z"), (*sequence, spec.channels)) | {"B": layouts[spec.B], "C": layouts[spec.C]}
    arrays = {name: jax.ShapeDtypeStruct(shape, jnp.dtype(spec.dtype)) for name, shape in shapes.items()}
    wide: dict[str, tuple[int, ...]] = {
        "A": (spec.channels, spec.states),
        "D": (spec.channels,),
        "dt_bias": (spec.channels,),
    }
    wide["initial_state"] = (spec.batch, spec.channels, spec.states)
    arrays |= {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in wide.items()}
    integers = {"segment_ids": jax.ShapeDtypeStruct(sequence, jnp.int32)} if spec.has_segments else {}
    return {
        "arrays": arrays,
        "integers": integers,
        "static": {"dt_softplus": True, "discretization": spec.discretization},
    }


def outputs_and_gradients(static: dict, arrays: dict, integers: dict):
    outputs, vjp = jax.vjp(lambda arrays: run(**arrays, **integers, **static, implementation="triton"), arrays)
    return outputs, vjp(outputs)[0]


@compiled
def test_lowers_for_a_gpu_that_is_not_there() -> None:
    pytest.importorskip("jax_cuda13_plugin")
    pytest.importorskip("jax_triton")
    call = shape_of_call(dataclasses.replace(FULL, channels=64, states=16))
    program = jax.jit(functools.partial(outputs_and_gradients, call["static"]))
    with tracing_for_kind("gpu", "NVIDIA A100-SXM4-80GB"):
        lowered = program.trace(call["arrays"], call["integers"]).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("triton_kernel_call") == 2


def test_declines_other_platforms() -> None:
    call = make_call(UNSEGMENTED)
    with pytest.raises(NotImplementedError, match=r"'triton' needs a CUDA GPU of compute capability 8\.0"):
        run(**call.arrays, **call.static, implementation="triton")


def test_declines_without_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_call, "cuda_compute_capability", lambda: 90)
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    with pytest.raises(NotImplementedError, match="install the cuda extra"):
        run(**make_call(UNSEGMENTED).arrays, implementation="triton")


def test_declines_what_the_kernels_do_not_do() -> None:
    arrays = make_call(UNSEGMENTED).arrays
    with pytest.raises(NotImplementedError, match="real A only"):
        run(**arrays | {"A": arrays["A"].astype(jnp.complex64)}, implementation="triton")
    wide = make_call(dataclasses.replace(UNSEGMENTED, length=1, states=300)).arrays
    with pytest.raises(NotImplementedError, match="at most 256 states, got 300"):
        run(**wide, implementation="triton")
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match="float64"):
        run(**arrays | {"x": jnp.asarray(np.asarray(arrays["x"], np.float64))}, implementation="triton")


@pytest.mark.parametrize("states", [1, 2, 3, 4, 8, 16, 17, 32, 64, 100, 128, 256])
@pytest.mark.parametrize("batch_channels", [1, 2**20])
def test_default_tiling_fits(states: int, batch_channels: int) -> None:
    tiling = triton_backend.default_tiling(states, batch_channels=batch_channels)
    assert states <= tiling.lanes_per_channel * tiling.states < 2 * states or states == 1
    for tile in (tiling.forward, tiling.backward):
        assert tiling.chunk % tile.tokens == 0
        assert tile.channels * tiling.lanes_per_channel % (32 * tile.warps) == 0
