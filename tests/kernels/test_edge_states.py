"""Edge states of the selective scan: the state that is left behind, and the cotangent of the one that enters."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax.pods.hlo import compiled_instructions
from pallas_kernels import selective_scan, selective_scan_final_state, selective_scan_initial_cotangent
from pallas_kernels.common.ahead_of_time import compile_for, tpu_devices, tracing_for_kind
from pallas_kernels.selective_scan.arg_specs import FULL, SPECS, ScanSpec
from pallas_kernels.selective_scan.pallas_gpu import op as pallas_gpu
from pallas_kernels.selective_scan.pallas_gpu.geometry import Tiling
from pallas_kernels.selective_scan.pallas_tpu import op as pallas_tpu
from pallas_kernels.selective_scan.xla import edge as edge_states_xla
from tests.kernels.op_contract import Call, assert_close, make_call
from tests.kernels.test_selective_scan_pallas_gpu import SMALL, SMALL_SPECS, call_name
from tests.kernels.test_selective_scan_pallas_tpu import BLOCKS, TINY, needs_tpu_compiler
from tests.programs import text_of

ON_GPU = jax.default_backend() == "gpu"
ENTERING = ("x", "dt", "A", "B", "dt_bias", "segment_ids")
LEAVING = ("dt", "A", "C", "z", "dt_bias", "segment_ids")


def edge_states(call: Call, dy: jax.Array, implementation: str | None) -> tuple[jax.Array, jax.Array]:
    arrays, softplus = call.arrays | call.integers, call.static["dt_softplus"]
    common: dict[str, Any] = {"dt_softplus": softplus, "implementation": implementation}
    entering = {name: arrays[name] for name in ENTERING if name in arrays}
    leaving = {name: arrays[name] for name in LEAVING if name in arrays}
    final = selective_scan_final_state(**entering, discretization=call.static["discretization"], **common)
    return final, selective_scan_initial_cotangent(dy, **leaving, **common)


@functools.cache
def expected(call: Call) -> tuple[np.ndarray, np.ndarray, jax.Array]:
    """Both by the reference in float64, and the cotangent of y that they are for."""
    dy = jnp.asarray(np.random.default_rng(2).standard_normal(call.arrays["x"].shape), call.arrays["x"].dtype)
    with jax.enable_x64(True):

        def widen(array: jax.Array) -> jax.Array:
            return jnp.asarray(np.asarray(array).astype(np.complex128 if jnp.iscomplexobj(array) else np.float64))

        arrays = jax.tree.map(widen, call.arrays)
        batch, _, channels = arrays["x"].shape
        shape = batch, channels, arrays["A"].shape[1]
        start = jnp.zeros(shape, jnp.result_type(arrays["A"].dtype, jnp.float64))

        def scan(state: jax.Array) -> tuple[jax.Array, jax.Array]:
            output = selective_scan(
                **(arrays | {"initial_state": state}), **call.integers, **call.static, implementation="reference"
            )
            return output.y, output.final_state

        @jax.jit
        def edges(start: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
            (_, final), vjp = jax.vjp(scan, start)
            return final, vjp((dy, jnp.zeros_like(final)))[0]

        final, cotangent = edges(start, widen(dy))
        return np.asarray(final), np.asarray(cotangent), dy


def check(call: Call, implementation: str | None) -> None:
    """Within the contract's bound for sums over all tokens of a row, in float32 whatever the dtype of the arguments."""
    final, cotangent, dy = expected(call)
    found = jax.jit(lambda: edge_states(call, dy, implementation))()
    terms = call.arrays["x"].shape[1]
    names = ("final state", "initial cotangent")
    assert_close(
        dict(zip(names, map(np.asarray, found), strict=True)),
        dict(zip(names, (final, cotangent), strict=True)),
        dict.fromkeys(names, jnp.float32),
        terms=terms,
        context=str(implementation),
    )


@pytest.mark.parametrize("spec", SPECS, ids=call_name)
def test_equal_the_scan_and_its_gradient(spec: ScanSpec) -> None:
    check(make_call(spec), "xla")


def test_in_double_precision() -> None:
    call = make_call(FULL)
    final, cotangent, dy = expected(call)
    with jax.enable_x64(True):
        wide = dataclasses.replace(
            call, arrays={name: jnp.asarray(array, jnp.float64) for name, array in call.arrays.items()}
        )
        found = edge_states(wide, jnp.asarray(dy, jnp.float64), "reference")
    for value, reference in zip(found, (final, cotangent), strict=True):
        assert value.dtype == np.float64
        # 67 terms, with eight roundings each, as in op_contract.py.
        np.testing.assert_allclose(value, reference, rtol=0, atol=8 * 2.0**-53 * 67**0.5 * np.max(np.abs(reference)))


@pytest.mark.parametrize("implementation", ["pallas_gpu", "pallas_tpu"])
@pytest.mark.parametrize("spec", SMALL_SPECS, ids=call_name)
def test_kernels(spec: ScanSpec, implementation: str) -> None:
    if implementation == "pallas_tpu" and ON_GPU:
        pytest.skip("for TPUs")
    check(make_call(spec), implementation)


def test_gpu_parts_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    tiling = Tiling(lanes_per_channel=8, rows=1, parts=3)
    monkeypatch.setattr(pallas_gpu, "choose_tilings", lambda *_: (tiling, tiling))
    check(make_call(dataclasses.replace(SMALL, length=37, name="parts")), "pallas_gpu")


@pytest.mark.skipif(ON_GPU, reason="for TPUs")
def test_tpu_blocks_and_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pallas_tpu, "generation", lambda kind: TINY)
    check(make_call(BLOCKS), "pallas_tpu")


@pytest.mark.parametrize("implementation", ["xla", "pallas_gpu", "pallas_tpu"])
@pytest.mark.skipif(ON_GPU, reason="interpreted")
def test_nothing_crosses_a_documents_start(implementation: str) -> None:
    """Not a bit, however large what is on the other side."""
    call = make_call(dataclasses.replace(SMALL, name="crossing"))
    ids = jnp.asarray(np.repeat([[0, 1, 2]], [6, 9, 6], axis=1), jnp.int32)
    arrays = call.arrays | {"x": call.arrays["x"].at[:, 3].set(1e30), "dt": call.arrays["dt"].at[:, 3].set(1e6)}
    changed = dataclasses.replace(call, arrays=arrays, integers={"segment_ids": ids})
    plain = dataclasses.replace(call, integers={"segment_ids": ids})
    dy = jnp.ones_like(call.arrays["x"])
    final, _ = edge_states(plain, dy, implementation)
    final_changed, _ = edge_states(changed, dy, implementation)
    np.testing.assert_array_equal(final, final_changed)
    _, cotangent = edge_states(plain, dy, implementation)
    _, cotangent_changed = edge_states(plain, dy.at[:, 8:].set(1e30), implementation)
    np.testing.assert_array_equal(cotangent, cotangent_changed)


def test_unknown_names_are_refused() -> None:
    call = make_call(SMALL)
    with pytest.raises(ValueError, match="unknown implementation 'cuda'"):
        edge_states(call, jnp.ones_like(call.arrays["x"]), "cuda")


@needs_tpu_compiler
def test_compiled_for_tpus_each_is_one_kernel_without_outputs() -> None:
    """Nothing of the length of the sequence is written."""
    device = tpu_devices("v5e:1x1")[0]
    spec = ScanSpec(name="v5e", batch=1, length=256, channels=1536, states=16, dtype="bfloat16")
    call = make_call(spec)
    dy = call.arrays["x"]
    shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), call.arrays)

    def run(arrays: dict[str, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        return edge_states(dataclasses.replace(call, arrays=arrays), dy, None)

    text = text_of(compile_for(device, run, shapes, jax.ShapeDtypeStruct(dy.shape, dy.dtype)))
    kernels = [line for line, _ in compiled_instructions(text) if "tpu_custom_call" in line]
    assert len(kernels) == 2
    assert all("f32[1,1,16,1536]" in line.split(" custom-call(")[0] for line in kernels), kernels


@pytest.mark.parametrize("index", [0, 1], ids=["final state", "initial cotangent"])
def test_lowers_for_hopper(index: int) -> None:
    call = make_call(dataclasses.replace(SMALL, name="hopper", length=700, channels=128, states=16))
    with tracing_for_kind("gpu", "NVIDIA H100 80GB HBM3"):
        text = (
            jax.jit(lambda arrays, dy: edge_states(dataclasses.replace(call, arrays=arrays), dy, None)[index])
            .trace(call.arrays, call.arrays["x"])
            .lower(lowering_platforms=("cuda",))
            .as_text()
        )
    assert "mosaic_gpu" in text


def test_a_chunk_is_shorter_than_the_longest_spec() -> None:
    """Otherwise no test would join two chunks."""
    assert max(spec.length for spec in SPECS) > edge_states_xla._CHUNK
