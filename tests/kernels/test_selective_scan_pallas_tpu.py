"""The TPU kernels of the selective scan: interpreted, with poisoned memory; and compiled for TPUs not at hand."""

import dataclasses
import functools
import importlib.util

import jax
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import selective_scan
from pallas_kernels.common.ahead_of_time import compile_for, tpu_devices
from pallas_kernels.common.arg_spec import DType
from pallas_kernels.common.tpu_tiles import SPAN
from pallas_kernels.selective_scan.arg_specs import FULL, Layout, ScanSpec
from pallas_kernels.selective_scan.pallas_tpu import op as pallas_tpu
from pallas_kernels.selective_scan.pallas_tpu.geometry import SLICE
from pallas_kernels.selective_scan.pallas_tpu.tilings import GENERATIONS, Generation, choose_geometry
from tests.kernels import op_contract, test_selective_scan
from tests.kernels.op_contract import make_call
from tests.kernels.test_selective_scan import OP
from tests.kernels.test_selective_scan_pallas_gpu import LARGE_SPECS, SMALL, SMALL_SPECS, call_name
from tests.programs import temporary_bytes, text_of

needs_tpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed"
)
# Small blocks: several along every axis of the grid.
TINY = Generation(tokens=SPAN, tiles=1, strip_bytes=2**20, vmem_bytes=2**20, cores=2)
BLOCKS = dataclasses.replace(FULL, name="blocks", batch=1, length=37, channels=400, states=3)


@pytest.mark.parametrize("spec", SMALL_SPECS, ids=call_name)
def test_values_and_gradients(spec: ScanSpec) -> None:
    limit = test_selective_scan.RELATIVE_ERROR[spec.dtype]
    op_contract.check_values_and_gradients(OP, "pallas_tpu", make_call(spec), relative=limit)


@pytest.mark.slow
@pytest.mark.parametrize("spec", LARGE_SPECS, ids=call_name)
def test_values_and_gradients_of_larger_calls(spec: ScanSpec) -> None:
    op_contract.check_values_and_gradients(OP, "pallas_tpu", make_call(spec))


@pytest.mark.slow
@pytest.mark.parametrize("B", ["shared", "grouped"])
def test_many_blocks_and_strips_without_races(B: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pallas_tpu, "generation", lambda kind: TINY)
    monkeypatch.setattr(pallas_tpu, "INTERPRETER", pltpu.InterpretParams(detect_races=True))
    spec = dataclasses.replace(BLOCKS, B=B)
    groups = spec.groups if B == "grouped" else 1
    geometry = choose_geometry(
        TINY, batch=1, length=spec.length, groups=groups, channels=spec.channels // groups, states=spec.states
    )
    assert geometry.grid == (1, 2, 3, 2)
    op_contract.check_values_and_gradients(OP, "pallas_tpu", make_call(spec))
    races = interpret_pallas_call.races
    assert races is not None
    assert not races.races_found


@pytest.mark.slow
def test_split_causality_and_segments() -> None:
    call = make_call(test_selective_scan.UNSEGMENTED)
    op_contract.check_split(OP, "pallas_tpu", call, at=21)
    op_contract.check_causality(OP, "pallas_tpu", call, at=33)
    op_contract.check_segments(OP, "pallas_tpu", call, starts=(43, 64))


@pytest.mark.slow
@pytest.mark.parametrize("call", ["extreme_decays", "hundreds_of_nats_per_chunk", "tiny_softplus"])
def test_extremes(call: str) -> None:
    op_contract.check_values_and_gradients(OP, "pallas_tpu", test_selective_scan.EXTREMES[call]())


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "limit"), test_selective_scan.RELATIVE_ERROR.items())
def test_relative_error_of_many_channels(dtype: DType, limit: float) -> None:
    spec = dataclasses.replace(FULL, length=64, channels=16, states=16, dtype=dtype)
    op_contract.check_values_and_gradients(OP, "pallas_tpu", make_call(spec), relative=limit)


def test_padding_leaves_no_trace() -> None:
    test_selective_scan.check_padding_leaves_no_trace("pallas_tpu", length=SPAN + 1)


def test_zero_step_keeps_the_state() -> None:
    test_selective_scan.check_zero_step_keeps_the_state("pallas_tpu")


@pytest.mark.parametrize("implementation", ["pallas_gpu", "pallas_tpu"])
def test_state_without_decay_ends_with_its_segment(implementation: str) -> None:
    call = make_call(SMALL)
    arrays = call.arrays | {"A": call.arrays["A"].at[0].set(0.0)}
    outputs = {
        name: selective_scan(**arrays, **call.integers, **call.static, implementation=name)
        for name in ("reference", implementation)
    }
    np.testing.assert_allclose(outputs[implementation].y, outputs["reference"].y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("change", "reason"), test_selective_scan.DECLINED_BY_PALLAS, ids=str)
def test_declines(change: dict, reason: str) -> None:
    test_selective_scan.check_declines("pallas_tpu", change, reason)


@pytest.mark.parametrize("states", [1, 16, 17, 64, 256])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 70000, 1, 5120), (8, 2048, 1, 1536), (4, 512, 8, 640)], ids=str)
@pytest.mark.parametrize("kind", GENERATIONS)
def test_blocks_cover_the_scan(kind: str, shape: tuple[int, int, int, int], states: int) -> None:
    batch, length, groups, channels = shape
    sizes = {"batch": batch, "length": length, "groups": groups, "channels": channels}
    geometry = choose_geometry(GENERATIONS[kind], **sizes, states=states)
    assert geometry.length - length < geometry.tiling.tokens
    assert channels <= geometry.channels
    assert geometry.channels % (geometry.strips_per_group * geometry.tiling.channels) == 0
    assert geometry.states % min(SLICE, geometry.states) == 0
    assert geometry.states >= states


def compiled_pass(spec: ScanSpec, topology: str, implementation: str | None) -> jax.stages.Compiled:
    """Forward and backward pass of a call without initial state, compiled for a device of a topology."""
    call = make_call(dataclasses.replace(spec, batch=1, length=1))
    shapes = {
        name: jax.ShapeDtypeStruct(
            (spec.batch, spec.length, *array.shape[2:]) if OP.is_sequence(name, array) else array.shape, array.dtype
        )
        for name, array in call.arrays.items()
        if name != "initial_state"
    }

    def both(arrays, cotangent):
        run = functools.partial(selective_scan, **call.static, implementation=implementation)
        y, vjp = jax.vjp(lambda arrays: run(**arrays).y, arrays)
        return y, vjp(cotangent)

    return compile_for(tpu_devices(topology)[0], both, shapes, shapes["x"])


PUBLISHED = ScanSpec(name="130M", batch=4, length=2048, channels=1536, states=16, dtype="bfloat16")


@needs_tpu_compiler
@pytest.mark.parametrize(
    "topology",
    [
        "v5e:1x1",
        *(pytest.param(t, marks=pytest.mark.slow) for t in ("v4:1x1x1", "v5p:1x1x1", "v6e:1x1", "tpu7x:1x1x1")),
    ],
)
def test_compiles_within_memory(topology: str) -> None:
    """For every generation of the table; the memory that nothing but the kernels' own arrays takes stays small."""
    compiled = compiled_pass(PUBLISHED, topology, None)
    text = text_of(compiled)
    assert "selective_scan_pallas_tpu_forward" in text
    assert "selective_scan_pallas_tpu_backward" in text
    assert temporary_bytes(compiled) < 80e6


@needs_tpu_compiler
@pytest.mark.slow
@pytest.mark.parametrize("states", [1, 24, 256])
@pytest.mark.parametrize("channels", [128, 5120])
@pytest.mark.parametrize("topology", ["v4:1x1x1", "v5e:1x1"])
def test_compiles_with_any_number_of_states(topology: str, channels: int, states: int) -> None:
    spec = dataclasses.replace(PUBLISHED, batch=1, length=300, channels=channels, states=states, dtype="float32")
    assert "selective_scan_pallas_tpu_backward" in text_of(compiled_pass(spec, topology, "pallas_tpu"))
