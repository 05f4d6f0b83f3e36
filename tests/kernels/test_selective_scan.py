"""The selective scan: contract of every implementation, extremes, and the reference against plain NumPy."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import selective_scan
from pallas_kernels.common.arg_spec import DType
from pallas_kernels.selective_scan.arg_specs import FULL, SPECS, Layout, ScanSpec
from tests.kernels import op_contract
from tests.kernels.op_contract import Call, Op, make_call, with_arrays
from tests.programs import temporary_bytes

OP = Op(name="selective_scan", function=selective_scan)
# On the CPU "xla" is lowered to the operations of "xla_sequential", which a test below proves.
IMPLEMENTATIONS = ("xla_sequential", "xla_associative")
# The Triton backend needs a GPU; test_selective_scan_triton.py interprets and compiles its kernels where there is none,
# and test_selective_scan_pallas_gpu.py holds the Mosaic GPU backend to the same contract.
WITH_TRITON = (*IMPLEMENTATIONS, "triton") if jax.default_backend() == "gpu" else IMPLEMENTATIONS
UNSEGMENTED = dataclasses.replace(FULL, length=67, has_segments=False)


@pytest.mark.parametrize("implementation", WITH_TRITON)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_values_and_gradients(spec: ScanSpec, implementation: str) -> None:
    if implementation == "triton" and spec.is_complex:
        pytest.skip("'triton' takes a real A only")
    op_contract.check_values_and_gradients(OP, implementation, make_call(spec))


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["grouped", "constant"])
@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("length", [256, 512, 1024, 2048, 4096])
def test_official_grid(length: int, is_complex: bool, layout: Layout, dtype: DType, implementation: str) -> None:
    spec = ScanSpec(
        name="grid", length=length, channels=4, states=8, B=layout, C=layout, is_complex=is_complex, dtype=dtype
    )
    op_contract.check_values_and_gradients(OP, implementation, make_call(spec))


@pytest.mark.parametrize("implementation", ["reference", "xla", *IMPLEMENTATIONS])
def test_backend_is_visible(implementation: str) -> None:
    op_contract.check_backend_is_visible(OP, implementation, make_call(FULL))


@pytest.mark.parametrize(
    ("platform", "recurrence"), [("cpu", "sequential"), ("cuda", "associative"), ("tpu", "associative")]
)
def test_recurrence_is_chosen_by_the_platform_of_lowering(platform: str, recurrence: str) -> None:
    arrays = make_call(UNSEGMENTED).arrays
    gradient = jax.grad(lambda arrays: selective_scan(**arrays, dt_softplus=True, implementation="xla").y.sum())
    text = jax.jit(gradient).trace(arrays).lower(lowering_platforms=(platform,)).as_text(debug_info=True)
    assert {name for name in ("sequential", "associative") if f"/{name}/" in text} == {recurrence}


@pytest.mark.parametrize("implementation", WITH_TRITON)
def test_split_equals_one_pass(implementation: str) -> None:
    op_contract.check_split(OP, implementation, make_call(UNSEGMENTED), at=21)


@pytest.mark.parametrize("implementation", WITH_TRITON)
def test_causality(implementation: str) -> None:
    op_contract.check_causality(OP, implementation, make_call(UNSEGMENTED), at=33)


@pytest.mark.parametrize("implementation", WITH_TRITON)
def test_segments(implementation: str) -> None:
    op_contract.check_segments(OP, implementation, make_call(UNSEGMENTED), starts=(43, 64))


@functools.cache
def _extreme_decays(discretization: Literal["euler", "zoh"]) -> Call:
    """Step sizes from 0 to 100 side by side: up to 1000 nats of decay a token, and everything between."""
    spec = dataclasses.replace(UNSEGMENTED, has_softplus=False, has_bias=False, discretization=discretization)
    call = make_call(spec)
    rng = np.random.default_rng(3)
    shape = call.arrays["dt"].shape
    dt = 10.0 ** rng.integers(-9, 3, shape) * (rng.random(shape) < 0.9)
    # x shrinks where dt grows: otherwise single huge terms would set the scale that errors are measured by.
    return with_arrays(call, dt=dt, x=np.asarray(call.arrays["x"]) / np.maximum(dt, 1))


@functools.cache
def _hundreds_of_nats_per_chunk() -> Call:
    """Mamba's initial A = -1 .. -16 with large steps: forms that factor exp(a - b) overflow here."""
    call = make_call(dataclasses.replace(UNSEGMENTED, states=16, has_softplus=False, has_bias=False))
    A = np.tile(-np.arange(1.0, 17), (UNSEGMENTED.channels, 1))
    return with_arrays(call, A=A, dt=np.full(call.arrays["dt"].shape, 1.6))


@functools.cache
def _tiny_softplus() -> Call:
    """softplus(-30) = 9e-14 is neither 0 nor 1e-8: y and the gradients keep their relative accuracy."""
    spec = dataclasses.replace(UNSEGMENTED, has_bias=False, has_skip=False, has_initial_state=False)
    call = make_call(spec)
    return with_arrays(call, dt=np.asarray(call.arrays["dt"]) - 30)


EXTREMES = {
    "extreme_decays": functools.partial(_extreme_decays, "euler"),
    "hundreds_of_nats_per_chunk": _hundreds_of_nats_per_chunk,
    "tiny_softplus": _tiny_softplus,
}


@pytest.mark.parametrize("implementation", WITH_TRITON)
@pytest.mark.parametrize("discretization", ["euler", "zoh"])
def test_extreme_decays(implementation: str, discretization: Literal["euler", "zoh"]) -> None:
    op_contract.check_values_and_gradients(OP, implementation, _extreme_decays(discretization))


@pytest.mark.parametrize("implementation", WITH_TRITON)
def test_hundreds_of_nats_per_chunk(implementation: str) -> None:
    op_contract.check_values_and_gradients(OP, implementation, _hundreds_of_nats_per_chunk())


@pytest.mark.parametrize("implementation", WITH_TRITON)
def test_tiny_softplus(implementation: str) -> None:
    op_contract.check_values_and_gradients(OP, implementation, _tiny_softplus())


def check_zero_step_keeps_the_state(implementation: str) -> None:
    arrays = make_call(UNSEGMENTED).arrays
    arrays = {name: arrays[name] for name in ("x", "A", "B", "C", "initial_state")} | {
        "dt": jnp.zeros_like(arrays["x"])
    }
    outputs = selective_scan(**arrays, implementation=implementation)
    np.testing.assert_array_equal(outputs.final_state, arrays["initial_state"])


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_zero_step_keeps_the_state(implementation: str) -> None:
    check_zero_step_keeps_the_state(implementation)


def check_beyond_61k_tokens(implementation: str) -> None:
    """A state that never decays counts tokens: exact in float32 up to 2^24, whatever the length."""
    length = 70_001
    x, dt = jnp.ones((1, length, 8)), jnp.ones((1, length, 8))
    A, B, C = jnp.full((8, 2), -1e-30), jnp.ones((1, length, 2)), jnp.ones((1, length, 2))
    run = jax.jit(lambda x: selective_scan(x, dt, A, B, C, implementation=implementation))
    outputs = run(x)
    expected = np.broadcast_to(2.0 * np.arange(1, length + 1)[None, :, None], outputs.y.shape)
    np.testing.assert_array_equal(outputs.y, expected)
    gradient = jax.jit(jax.grad(lambda x: run(x).y[:, -1].sum()))(x)
    np.testing.assert_array_equal(gradient, np.full(x.shape, 2.0))


@pytest.mark.parametrize("implementation", WITH_TRITON)
def test_beyond_61k_tokens(implementation: str) -> None:
    check_beyond_61k_tokens(implementation)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_beyond_61k_tokens_with_everything(implementation: str) -> None:
    op_contract.check_values_and_gradients(OP, implementation, make_call(dataclasses.replace(FULL, length=70_001)))


def test_reference_equals_numpy() -> None:
    """The oracle itself, against loops over every index in double precision."""
    spec = ScanSpec(
        name="oracle",
        length=9,
        B="grouped",
        is_complex=True,
        has_complex_matrices=True,
        discretization="zoh",
        has_segments=True,
    )
    arguments = spec.arguments()
    v = arguments.wide | arguments.narrow | arguments.integers
    y, state = np.zeros(v["x"].shape), v["initial_state"].copy()
    for b, t, e in np.ndindex(v["x"].shape):
        group = e // (spec.channels // spec.groups)
        dt = np.log1p(np.exp(v["dt"][b, t, e] + v["dt_bias"][e]))
        if t and v["segment_ids"][b, t] != v["segment_ids"][b, t - 1]:
            state[b, e] = 0
        decay = np.exp(dt * v["A"][e])
        state[b, e] = decay * state[b, e] + (decay - 1) / v["A"][e] * v["B"][b, t, group] * v["x"][b, t, e]
        y[b, t, e] = 2 * np.sum(v["C"][b, t] * state[b, e]).real + v["D"][e] * v["x"][b, t, e]
        y[b, t, e] *= v["z"][b, t, e] / (1 + np.exp(-v["z"][b, t, e]))
    with jax.enable_x64(True):
        arrays: dict[str, Any] = {name: jnp.asarray(value) for name, value in v.items()}
        options: dict[str, Any] = dict(arguments.static)
        outputs = selective_scan(**arrays, **options, implementation="reference")
        # Both sides round in double precision; (decay - 1) / A of the loops cancels down to dt |A| > 1e-2.
        np.testing.assert_allclose(outputs.y, y, rtol=0, atol=1e-12)
        np.testing.assert_allclose(outputs.final_state, state, rtol=0, atol=1e-12)


def test_backward_keeps_boundary_states_only() -> None:
    """Temporaries of forward + backward stay near the arguments' size, far below the (B, L, E, N) states."""
    spec = ScanSpec(name="memory", length=1024, channels=64, states=16)
    arrays = make_call(spec).arrays
    gradient = jax.grad(lambda arrays: selective_scan(**arrays, dt_softplus=True, implementation="xla").y.sum())
    temporaries = temporary_bytes(jax.jit(gradient).lower(arrays).compile())
    all_states = 4 * spec.batch * spec.length * spec.channels * spec.states
    assert temporaries < all_states / 2


# Root mean square of a kernel's error over that of the exact result: the limits that the docs promise.
RELATIVE_ERROR = {"float32": 1e-6, "bfloat16": 3e-3}


# What the Pallas kernels leave to other implementations.
DECLINED_BY_PALLAS = (
    ({"is_complex": True}, "takes a real A only, got complex64"),
    ({"B": "constant"}, "takes B and C with a time axis only"),
    ({"discretization": "zoh"}, "discretizes with 'euler' only, got 'zoh'"),
    ({"states": 257}, "takes at most 256 states, got 257"),
)


def check_declines(implementation: str, change: dict, reason: str) -> None:
    call = make_call(dataclasses.replace(FULL, **change))
    with pytest.raises(NotImplementedError, match=reason):
        selective_scan(**call.arrays, **call.integers, **call.static, implementation=implementation)


def check_padding_leaves_no_trace(implementation: str, length: int) -> None:
    """Channels, states and tokens that pad a kernel's blocks count for nothing, even if a bias opens softplus wide."""
    call = make_call(dataclasses.replace(UNSEGMENTED, batch=1, length=length))
    arrays = call.arrays | {"dt_bias": jnp.full_like(call.arrays["dt_bias"], 3.0)}

    def loss(arrays, implementation):
        outputs = selective_scan(**arrays, **call.static, implementation=implementation)
        return jnp.sum(outputs.final_state) + jnp.sum(outputs.y)

    actual = jax.jit(functools.partial(jax.grad(loss), implementation=implementation))(arrays)
    for name, gradient in jax.grad(loss)(arrays, "reference").items():
        np.testing.assert_allclose(actual[name], gradient, rtol=2e-5, atol=2e-4, err_msg=name)
