"""State-space duality: contract of every implementation, extremes, and the reference against others' results."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import config as jaxtyping_config
from safetensors.numpy import load_file

from pallas_kernels import (
    SSDArguments,
    as_decaying_attention,
    ssd,
    ssd_final_state,
    ssd_initial_cotangent,
    ssd_state_update,
)
from pallas_kernels.ssd.arg_specs import FULL, SPECS, SSDSpec
from pallas_kernels.ssd_state_update import arg_specs as update
from tests.kernels import op_contract
from tests.kernels.op_contract import Call, Op, make_call, with_arrays
from tests.programs import temporary_bytes

OP = Op(name="ssd", function=ssd)
UPDATE = Op(name="ssd_state_update", function=ssd_state_update)
IMPLEMENTATIONS = ("xla",)
UNSEGMENTED = dataclasses.replace(FULL, has_segments=False)
GOLDEN = Path(__file__).parents[1] / "golden" / "layers"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_values_and_gradients(spec: SSDSpec, implementation: str) -> None:
    op_contract.check_values_and_gradients(OP, implementation, make_call(spec))


@pytest.mark.parametrize("spec", update.SPECS[:4], ids=lambda spec: spec.name)
def test_values_and_gradients_of_one_token(spec: update.SSDUpdateSpec) -> None:
    op_contract.check_values_and_gradients(UPDATE, "xla", make_call(spec))


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_backend_is_visible(implementation: str) -> None:
    op_contract.check_backend_is_visible(OP, implementation, make_call(FULL))
    if implementation in ("reference", "xla"):
        op_contract.check_backend_is_visible(UPDATE, implementation, make_call(update.SPECS[0]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_split_equals_one_pass(implementation: str) -> None:
    op_contract.check_split(OP, implementation, make_call(UNSEGMENTED), at=41)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_causality(implementation: str) -> None:
    op_contract.check_causality(OP, implementation, make_call(UNSEGMENTED), at=70)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_segments(implementation: str) -> None:
    op_contract.check_segments(OP, implementation, make_call(UNSEGMENTED), starts=(43, 64, 128))


def check_documents(implementation: str, call: Call) -> None:
    """A document's outputs, states and gradients do not change by a bit when another's do; of 131 tokens in 2 rows."""
    ids = jnp.asarray(np.tile(np.repeat([0, 1, 2], [37, 60, 34]), (2, 1)), jnp.int32)
    packed = dataclasses.replace(call, integers={"segment_ids": ids})
    run = op_contract.compiled(OP, packed, implementation)
    cotangents = op_contract.cotangents_of(OP, packed)
    plain = run(packed.arrays, cotangents)
    rng = np.random.default_rng(3)
    sequences = [name for name, array in packed.arrays.items() if OP.is_sequence(name, array)]
    noise = {name: rng.normal(size=np.shape(packed.arrays[name][:, 36])) for name in sequences}
    moved = run(
        packed.arrays
        | {
            name: packed.arrays[name].at[:, 36].set(noise[name].astype(packed.arrays[name].dtype)) for name in sequences
        },
        dataclasses.replace(cotangents, y=cotangents.y.at[:, 36].multiply(-3)),
    )
    after = {name: (plain[1][name][:, 37:], moved[1][name][:, 37:]) for name in sequences}
    after |= {"y": (plain[0].y[:, 37:], moved[0].y[:, 37:]), "state": (plain[0].final_state, moved[0].final_state)}
    for name, (one, other) in after.items():
        np.testing.assert_array_equal(one, other, err_msg=name)
    assert not np.array_equal(plain[0].y[:, 36], moved[0].y[:, 36])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_document_does_not_move_another_by_a_bit(implementation: str) -> None:
    check_documents(implementation, make_call(UNSEGMENTED))


def _rates_side_by_side() -> Call:
    """Step sizes from 0 to 100 side by side: up to 1000 nats of decay a token, and everything between."""
    call = make_call(dataclasses.replace(UNSEGMENTED, has_softplus=False, has_bias=False))
    rng = np.random.default_rng(3)
    shape = call.arrays["dt"].shape
    dt = 10.0 ** rng.integers(-9, 3, shape) * (rng.random(shape) < 0.9)
    # x shrinks where dt grows: otherwise single huge terms would set the scale that errors are measured by.
    return with_arrays(call, dt=dt, x=np.asarray(call.arrays["x"]) / np.maximum(dt, 1)[..., None])


def _nats_per_chunk(nats: float) -> Call:
    """Steady decays whose sum over 64 tokens is so large; `exp(-s)` of it overflows from 88 on."""
    call = make_call(dataclasses.replace(UNSEGMENTED, has_softplus=False, has_bias=False))
    return with_arrays(
        call, A=np.full(call.arrays["A"].shape, -16.0), dt=np.full(call.arrays["dt"].shape, nats / 64 / 16)
    )


def _strong_then_weak() -> Call:
    """A few tokens of 100 nats among tokens of 0.01: a running sum has lost what the weak ones add."""
    call = make_call(dataclasses.replace(UNSEGMENTED, has_softplus=False, has_bias=False))
    dt = np.full(call.arrays["dt"].shape, 0.01)
    dt[:, 5:64:8] = 100.0
    x = np.asarray(call.arrays["x"]) / np.maximum(dt, 1)[..., None]
    return with_arrays(call, A=np.full(call.arrays["A"].shape, -1.0), dt=dt, x=x)


EXTREMES: dict[str, Callable[[], Call]] = {
    "rates_side_by_side": _rates_side_by_side,
    "102_nats": functools.partial(_nats_per_chunk, 102.0),
    "410_nats": functools.partial(_nats_per_chunk, 410.0),
    "800_nats": functools.partial(_nats_per_chunk, 800.0),
    "strong_then_weak": _strong_then_weak,
}


SLOW = ("102_nats", "410_nats")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in EXTREMES]
)
def test_extreme_decays(name: str, implementation: str) -> None:
    op_contract.check_values_and_gradients(OP, implementation, EXTREMES[name]())


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_zero_step_keeps_the_state(implementation: str) -> None:
    arrays = make_call(UNSEGMENTED).arrays
    arrays = {name: arrays[name] for name in ("x", "A", "B", "C", "initial_state")} | {
        "dt": jnp.zeros_like(arrays["dt"])
    }
    outputs = ssd(**arrays, implementation=implementation)
    np.testing.assert_array_equal(outputs.final_state, arrays["initial_state"])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_million_tokens(implementation: str) -> None:
    """A state that never decays counts tokens, which is exact in float32; 2^20 tokens of 2^13 values pass 2^32."""
    length = 2**20 + 1
    ones = jnp.ones((1, length, 1, 1))
    run = jax.jit(
        lambda x: ssd(x, jnp.ones((1, length, 1)), -1e-30 * jnp.ones(1), ones, ones, implementation=implementation)
    )
    outputs = run(ones)
    np.testing.assert_array_equal(outputs.y[0, :, 0, 0], np.arange(1, length + 1))
    gradient = jax.jit(jax.grad(lambda x: run(x).y[:, -1].sum()))(ones)
    np.testing.assert_array_equal(gradient, np.ones(ones.shape))


def test_reference_equals_numpy() -> None:
    """The oracle itself, against loops over every index in double precision."""
    spec = SSDSpec(name="oracle", length=9, has_segments=True, has_skip="by channel", dt_limit=(0.2, 0.6))
    arguments = spec.arguments()
    v = arguments.wide | arguments.narrow | arguments.integers
    y, state = np.zeros(v["x"].shape), v["initial_state"].copy()
    for b, t, h in np.ndindex(v["x"].shape[:3]):
        group = h // (spec.heads // spec.groups)
        dt = np.clip(np.log1p(np.exp(v["dt"][b, t, h] + v["dt_bias"][h])), 0.2, 0.6)
        if t and v["segment_ids"][b, t] != v["segment_ids"][b, t - 1]:
            state[b, h] = 0
        state[b, h] = np.exp(dt * v["A"][h]) * state[b, h] + dt * np.outer(v["x"][b, t, h], v["B"][b, t, group])
        y[b, t, h] = state[b, h] @ v["C"][b, t, group] + v["D"][h] * v["x"][b, t, h]
    with jax.enable_x64(True):
        call: dict[str, Any] = {name: jnp.asarray(value) for name, value in v.items()} | dict(arguments.static)
        outputs = ssd(**call, implementation="reference")
        np.testing.assert_allclose(outputs.y, y, rtol=0, atol=1e-12)
        np.testing.assert_allclose(outputs.final_state, state, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["ssd_groups1_state", "ssd_groups2_segments"])
def test_authors_results(name: str) -> None:
    """Outputs and gradients of the authors' minimal form in float64, which the reference computes in as well."""
    with jax.enable_x64(True):
        tensors = {key: jnp.asarray(value) for key, value in load_file(GOLDEN / f"{name}.safetensors").items()}
        inputs = {key.removeprefix("in."): value for key, value in tensors.items() if key.startswith("in.")}
        integers: dict[str, Any] = {key: inputs.pop(key) for key in ("segment_ids",) if key in inputs}

        def run(inputs: dict[str, Any]) -> Any:
            return ssd(**inputs, **integers, dt_softplus=True, implementation="reference")

        def projected(inputs: dict[str, jax.Array]) -> jax.Array:
            output = run(inputs)
            return jnp.vdot(output.y, tensors["proj.y"]) + jnp.vdot(output.final_state, tensors["proj.final_state"])

        output = run(inputs)
        np.testing.assert_allclose(output.y, tensors["out.y"], rtol=0, atol=1e-12)
        np.testing.assert_allclose(output.final_state, tensors["out.final_state"], rtol=0, atol=1e-12)
        for key, gradient in jax.grad(projected)(inputs).items():
            scale = np.max(np.abs(tensors[f"grad.{key}"]))
            np.testing.assert_allclose(gradient, tensors[f"grad.{key}"], rtol=0, atol=1e-12 * scale, err_msg=key)


def test_steps_equal_the_sequence() -> None:
    call = make_call(SSDSpec(name="steps", length=19))
    whole = ssd(**call.arrays, **call.static, implementation="xla")
    tokens = {name: jnp.moveaxis(call.arrays[name], 1, 0) for name in ("x", "dt", "B", "C")}
    constants: dict[str, Any] = {name: call.arrays[name] for name in ("A", "D", "dt_bias")}

    def step(state: jax.Array, tokens: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        outputs = ssd_state_update(state, **tokens, **constants, **call.static)
        return outputs.state, outputs.y

    state, y = jax.lax.scan(step, call.arrays["initial_state"], tokens)
    # Both run the same float32 equations; sums over N and tokens are rounded in another order.
    np.testing.assert_allclose(jnp.moveaxis(y, 0, 1), whole.y, rtol=0, atol=5e-6)
    np.testing.assert_allclose(state, whole.final_state, rtol=0, atol=2e-6)


@pytest.mark.parametrize("has_segments", [False, True])
def test_edge_states(has_segments: bool) -> None:
    """They are the op's own state and gradient where the other edge is zero."""
    call = make_call(dataclasses.replace(FULL, has_segments=has_segments, has_initial_state=False))
    core = as_decaying_attention(SSDArguments.of(**call.arrays, **call.integers, **call.static))
    cotangents = op_contract.cotangents_of(OP, call)
    zero = jnp.zeros_like(cotangents.final_state)

    def run(state: jax.Array) -> Any:
        return ssd(**call.arrays, **call.integers, **call.static, initial_state=state, implementation="reference")

    outputs, vjp = jax.vjp(run, zero)
    (gradient,) = vjp(dataclasses.replace(cotangents, final_state=zero))
    np.testing.assert_allclose(ssd_final_state(core), outputs.final_state, rtol=0, atol=5e-6)
    np.testing.assert_allclose(ssd_initial_cotangent(cotangents.y, core), gradient, rtol=0, atol=2e-5)
    assert np.any(gradient)
    assert np.any(outputs.final_state)


def test_backward_keeps_boundary_states_only() -> None:
    """Temporaries of forward + backward stay far below a matrix of all pairs of tokens within chunks."""
    spec = SSDSpec(name="memory", length=4096, heads=8, width=16, states=16, groups=1)
    arrays = make_call(spec).arrays
    gradient = jax.grad(lambda arrays: ssd(**arrays, dt_softplus=True, implementation="xla").y.sum())
    temporaries = temporary_bytes(jax.jit(gradient).lower(arrays).compile())
    all_pairs = 4 * spec.batch * spec.length * spec.heads * 64
    assert temporaries < all_pairs


@pytest.fixture
def only_our_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the annotations' run-time checks, as in production."""
    monkeypatch.setattr(jaxtyping_config, "jaxtyping_disable", True)


X, DT, A = np.ones((2, 5, 4, 3)), np.ones((2, 5, 4)), -np.ones(4)
B = np.ones((2, 5, 2, 6))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": X[0]}, r"ssd: x has shape \(5, 4, 3\), expected non-empty \(B, L, H, P\)"),
        ({"dt": DT[:, :4]}, r"dt has shape \(2, 4, 4\), expected \(B, L, H\) = \(2, 5, 4\)"),
        ({"A": A[:2]}, r"A has shape \(2,\), expected \(H,\) = \(4,\)"),
        ({"B": np.ones((2, 5, 3, 6))}, "B has 3 groups, which do not divide H=4"),
        ({"C": np.ones((2, 5, 4, 6))}, "C has 4 groups, another array has 2: make them equal"),
        ({"D": np.ones((4, 2))}, r"D has shape \(4, 2\), expected \(H,\) or \(H, P\) = \(4,\) or \(4, 3\)"),
        ({"dt_limit": (0.1, 0.01)}, r"dt_limit must be two numbers, 0 <= least <= greatest, got \(0.1, 0.01\)"),
        ({"dt_limit": 0.1}, "dt_limit must be two numbers, 0 <= least <= greatest, got 0.1"),
        ({"dt_softplus": "yes"}, "unknown dt_softplus 'yes'; choose False or True"),
        ({"implementation": "cuda"}, "unknown implementation 'cuda'"),
    ],
)
@pytest.mark.usefixtures("only_our_checks")
def test_bad_arguments_are_one_line(changes: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {"x": X, "dt": DT, "A": A, "B": B, "C": B} | changes
    with pytest.raises(ValueError, match=message) as error:
        ssd(**call)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("only_our_checks")
def test_lists_and_limits_in_a_list_are_taken() -> None:
    limits: Any = [0, 0.5]
    output = ssd(X.tolist(), DT.tolist(), A.tolist(), B.tolist(), B.tolist(), dt_limit=limits)
    expected = ssd(X, 0.5 * DT, A, B, B)
    np.testing.assert_array_equal(output.y, expected.y)
