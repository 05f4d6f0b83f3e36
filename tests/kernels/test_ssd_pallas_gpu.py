"""The Mosaic GPU kernels of state-space duality: on a GPU if there is one, else interpreted; and lowered for a GPU.

The kernels multiply bfloat16, so results of the core are compared as vectors with the float64 reference. Interpreting
is slow: without a GPU only small calls run, and the others are marked slow.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import SSDArguments, as_decaying_attention, ssd
from pallas_kernels.common.ahead_of_time import tracing_for_kind
from pallas_kernels.ssd.arg_specs import SSDSpec
from pallas_kernels.ssd.arguments import DecayingAttentionArguments, SSDOutput
from pallas_kernels.ssd.core import decaying_attention
from pallas_kernels.ssd.pallas_gpu import op as pallas_gpu
from pallas_kernels.ssd.pallas_gpu.geometry import choose_parts
from tests.kernels import op_contract, test_ssd
from tests.kernels.op_contract import Call, Op, make_call

ON_GPU = jax.default_backend() == "gpu"
slow_interpreted = pytest.mark.slow if not ON_GPU else pytest.mark.filterwarnings("default")
# Four roundings to bfloat16 at their largest: of what a product reads from registers, of the state before a chunk, of
# its gradient after the chunk, and of the result. On average it is a third of that.
LIMIT = 4 * 2.0**-9

SMALL = SSDSpec(name="small", length=70, batch=1, heads=2, groups=1, has_segments=True, dtype="bfloat16")
LARGE = (
    dataclasses.replace(SMALL, name="groups", length=131, batch=2, heads=6, groups=2, width=64, states=128),
    dataclasses.replace(SMALL, name="odd_heads", heads=3, groups=3, width=40, states=24, has_skip="by channel"),
    dataclasses.replace(SMALL, name="wide_heads", width=128, states=64, has_initial_state=False, has_segments=False),
    dataclasses.replace(SMALL, name="bare", has_skip=False, has_bias=False, has_initial_state=False, length=64),
    dataclasses.replace(SMALL, name="one_token", length=1),
)


def _core(*, implementation: str, **arrays: jax.Array) -> SSDOutput:
    return decaying_attention(DecayingAttentionArguments.of(**arrays), implementation=implementation)


CORE = Op(name="ssd", function=_core)


def check_values_and_gradients(call: Call, implementation: str = "pallas_gpu") -> None:
    """Outputs and every gradient of the core are within `LIMIT` of the reference; twice gives the same bits."""
    core = as_decaying_attention(SSDArguments.of(**call.arrays, **call.integers, **call.static))
    operands, integers = core.operands()
    core_call = Call(operands.arrays(), integers, {})
    cotangents = op_contract.cotangents_of(CORE, core_call)
    run = op_contract.compiled(CORE, core_call, implementation)
    results, again = (run(core_call.arrays, cotangents) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, results, again)
    expected_outputs, expected_gradients = op_contract.in_double_precision(CORE, core_call)
    pairs = {name: (value, expected_outputs[name]) for name, value in vars(results[0]).items()}
    pairs |= {f"gradient of {name}": (value, expected_gradients[name]) for name, value in results[1].items()}
    for name, (actual, expected) in pairs.items():
        error = np.linalg.norm(np.asarray(actual, np.float64) - expected)
        assert error <= LIMIT * np.linalg.norm(expected), f"{name}: {error / np.linalg.norm(expected):.2e}"


def narrowed(call: Call) -> Call:
    """The call with its sequences in bfloat16."""
    narrow = {key: call.arrays[key].astype(jnp.bfloat16) for key in ("x", "B", "C")}
    return dataclasses.replace(call, arrays=call.arrays | narrow)


def test_values_and_gradients() -> None:
    check_values_and_gradients(make_call(SMALL))


@slow_interpreted
@pytest.mark.parametrize("spec", LARGE, ids=lambda spec: spec.name)
def test_values_and_gradients_of_larger_calls(spec: SSDSpec) -> None:
    check_values_and_gradients(make_call(spec))


@slow_interpreted
@pytest.mark.parametrize("name", test_ssd.EXTREMES)
def test_extreme_decays(name: str) -> None:
    check_values_and_gradients(narrowed(test_ssd.EXTREMES[name]()))


@slow_interpreted
@pytest.mark.parametrize("parts", [2, 3])
def test_parts(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of the sequence at the same time; of three, the last has fewer chunks."""
    monkeypatch.setattr(pallas_gpu, "choose_parts", lambda *sizes: parts)
    check_values_and_gradients(make_call(dataclasses.replace(SMALL, name="parts", length=64 * 5, batch=2)))


@slow_interpreted
def test_a_document_does_not_move_another_by_a_bit() -> None:
    test_ssd.check_documents("pallas_gpu", make_call(dataclasses.replace(SMALL, length=131, batch=2)))


@pytest.mark.skipif(not ON_GPU, reason="takes hours to interpret")
def test_a_million_tokens() -> None:
    """The end of 2^20 tokens, whose values pass 2^32 bytes, equals that of the second half alone."""
    length, heads, width, states = 2**20, 40, 64, 64
    keys = jax.random.split(jax.random.key(0), 4)

    @jax.jit
    def draw():
        x = jax.random.normal(keys[0], (1, length, heads, width), jnp.bfloat16)
        B, C = (jax.random.normal(key, (1, length, 1, states), jnp.bfloat16) for key in keys[1:3])
        return x, jax.nn.softplus(jax.random.normal(keys[3], (1, length, heads)) - 4), B, C

    @jax.jit
    def run(x, dt, B, C, state):
        def tail(x, dt, B, C):
            output = ssd(x, dt, -jnp.ones(heads), B, C, initial_state=state, implementation="pallas_gpu")
            return output.y[:, -4096:], output.final_state

        (y, final_state), vjp = jax.vjp(tail, x, dt, B, C)
        return y, final_state, *(gradient[:, -2048:] for gradient in vjp((jnp.ones_like(y), final_state)))

    arrays, half = draw(), length // 2
    assert arrays[0].size > 2**31
    state = jnp.zeros((1, heads, width, states))
    whole = run(*arrays, state)
    x, dt, B, C = (array[:, :half] for array in arrays)
    first = ssd(x, dt, -jnp.ones(heads), B, C, implementation="pallas_gpu")
    second = run(*(array[:, half:] for array in arrays), first.final_state)
    for actual, expected in zip(whole, second, strict=True):
        actual, expected = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
        assert np.linalg.norm(actual - expected) <= 1e-3 * np.linalg.norm(expected)


def _lowered(spec: SSDSpec, device_kind: str, implementation: str | None = None) -> str:
    """The gradient of a call, lowered for a GPU that need not be there."""
    call = make_call(spec)
    run = functools.partial(ssd, **call.integers, **call.static, implementation=implementation)
    gradient = jax.jit(jax.grad(lambda arrays: run(**arrays).y.astype(jnp.float32).sum()))
    shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), call.arrays)
    with tracing_for_kind("gpu", device_kind):
        return gradient.trace(shapes).lower(lowering_platforms=("cuda",)).as_text(debug_info=True)


def test_lowers_for_hopper() -> None:
    spec = dataclasses.replace(SMALL, length=2048, heads=8, width=64, states=128)
    text = _lowered(spec, "NVIDIA H100 80GB HBM3")
    kernels = ("ssd_walk", "ssd_walk_back", "ssd_gradients")
    assert all(name in text for name in kernels)
    shapes = {line.split("tensor<")[-1].split(">")[0] for line in text.split("\n") if "tensor<" in line}
    sizes = {shape: math.prod(int(size) for size in shape.split("x")[:-1] if size.isdigit()) for shape in shapes}
    values = spec.length * spec.heads * spec.width
    states = values // 64 * spec.states
    assert all(size <= values or size == states for size in sizes.values()), "larger than x, and not chunks' states"


def test_chosen_on_hopper_and_not_before() -> None:
    assert "ssd.pallas_gpu" in _lowered(SMALL, "NVIDIA H200")
    assert "ssd.pallas_gpu" not in _lowered(SMALL, "NVIDIA A100-SXM4-80GB")
    with pytest.raises(NotImplementedError, match=r"needs an NVIDIA GPU of compute capability 9\.0 or more"):
        _lowered(SMALL, "NVIDIA A100-SXM4-80GB", implementation="pallas_gpu")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float32"}, "multiplies bfloat16 on tensor cores, x has float32"),
        ({"states": 129}, "takes at most 128 states, got 129"),
    ],
    ids=str,
)
def test_declines(changes: dict, reason: str) -> None:
    call = make_call(dataclasses.replace(SMALL, **changes))
    with pytest.raises(NotImplementedError, match=reason):
        ssd(**call.arrays, **call.integers, **call.static, implementation="pallas_gpu")


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 80, 256), (1, 24, 2048), (8, 80, 32), (2, 3, 5)], ids=str)
def test_parts_are_not_empty(sizes: tuple[int, int, int]) -> None:
    batch, heads, chunks = sizes
    parts = choose_parts(batch, heads, chunks)
    assert 1 <= parts <= chunks
    assert (parts - 1) * -(-chunks // parts) < chunks
    assert parts == 1 or parts * batch * heads <= 2 * 132
