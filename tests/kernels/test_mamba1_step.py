"""The Mamba-1 step: values in plain JAX, and its Triton kernels interpreted, compiled and refused without a GPU."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import causal_conv1d, selective_state_update
from pallas_kernels.common.ahead_of_time import tracing_for_kind
from pallas_kernels.common.arg_spec import BFLOAT16_ROUNDING, allowed_error
from pallas_kernels.common.triton.tiles import Tile
from pallas_kernels.mamba1_step.api import mamba1_step
from pallas_kernels.mamba1_step.arguments import Mamba1Weights, StepArguments
from pallas_kernels.mamba1_step.triton import op as triton_backend
from pallas_kernels.mamba1_step.triton.tilings import RecurrenceTile, Tiling, default_tiling
from tests.kernels.triton_interpreter import compiled, interpreted
from tests.kernels.triton_steps import (
    check_binaries,
    compiled_by,
    drawn,
    in_double,
    in_int8,
    int8_shapes,
    interpreter,  # noqa: F401
    on_gpu,
    without_gpu,
)

EPS = 1e-5
MATRICES = ("in_proj", "x_proj", "dt_proj", "out_proj")
# Sizes that no tile divides.
D, E, N, R, K = 40, 80, 8, 3, 4
_TILE = Tile(columns=16, depth=32, stages=2, warps=1)
ONE = RecurrenceTile(rows=1, channels=32, warps=1)
FOUR = RecurrenceTile(rows=4, channels=32, warps=1)
SIXTEEN = RecurrenceTile(rows=16, channels=16, warps=1)


_WIDE_TILE = Tile(columns=64, depth=32, stages=2, warps=1, rows=32)


def of_tiles(advance: RecurrenceTile, *, tile: Tile = _TILE, dt: Tile | None = _TILE, parts: int = 1) -> Tiling:
    """Tiles for the sizes above."""
    return Tiling(
        project_in=tile,
        project_selection=dataclasses.replace(tile, parts=3),
        project_dt=dt,
        advance=advance,
        project_out=dataclasses.replace(tile, parts=parts),
    )


TILINGS = {
    "no_dt": of_tiles(ONE, dt=None),
    "one_row": of_tiles(ONE),
    "four_rows": of_tiles(FOUR, parts=2),
    "sixteen_rows": of_tiles(SIXTEEN),
    "wide": of_tiles(FOUR, tile=_WIDE_TILE, dt=_WIDE_TILE, parts=3),
}
CALLS = [("no_dt", 1), ("no_dt", 5), ("one_row", 5), ("one_row", 16), ("wide", 3), ("wide", 16)]
CALLS += [(name, 20) for name in TILINGS] + [("wide", 40)]


def make_call(*, rows: int, states: int = N, taps: int = K, seed: int = 0) -> dict:
    """Arguments of a call in double precision, with outputs of the size of their inputs."""
    rng = np.random.default_rng(seed)

    def matrix(terms: int, *shape: int) -> Any:
        return rng.normal(size=(terms, *shape)) / np.sqrt(terms)

    drawn: dict[str, Any] = dict(
        norm_scale=rng.uniform(0.5, 1.5, D),
        in_proj=matrix(D, 2, E),
        conv_weight=rng.normal(size=(taps, E)) / 2,
        conv_bias=rng.normal(size=E) / 4,
        x_proj=matrix(E, R + 2 * states),
        dt_proj=matrix(R, E),
        dt_bias=rng.uniform(-3, 0, E),
        A_log=np.log(rng.uniform(0.5, states, (E, states))),
        D=rng.normal(size=E),
        out_proj=matrix(E, D),
    )
    state = {"residual": rng.normal(size=(rows, D)) * 3, "window": rng.normal(size=(rows, taps - 1, E))}
    return {**state, "state": rng.normal(size=(rows, E, states)), "weights": Mamba1Weights(**drawn)}


def in_dtype(call: dict, dtype: str) -> dict:
    """A call as a model makes it that computes in `dtype`: matrices and window in it, all else in float32."""
    narrow = {"in_proj", "x_proj", "dt_proj", "out_proj", "window"}

    def rounded(name: str, array: np.ndarray) -> jax.Array:
        return jnp.asarray(array, jnp.float32).astype(dtype if name in narrow else "float32")

    weights = {name: rounded(name, array) for name, array in vars(call["weights"]).items() if array is not None}
    arrays = {name: rounded(name, array) for name, array in call.items() if name != "weights"}
    return {**arrays, "weights": Mamba1Weights(**weights)}


def exact(call: dict):
    """The step in double precision, on the very numbers of `call`."""
    with jax.enable_x64(True):
        return mamba1_step(**in_double(call), eps=EPS, implementation="xla")


def by_kernels(call: dict, tiling: Tiling | None = None):
    arguments = {name: array for name, array in call.items() if name != "weights"}
    step = StepArguments.of(**arguments, **vars(call["weights"]), eps=EPS)
    return triton_backend.mamba1_step(step, tiling=tiling)


def check_values(outputs, call: dict, dtype: str) -> None:
    """Compares with double precision.

    In float32 an output is off by what the longest chain of sums allows. In bfloat16 seven values on the way are
    rounded, each by at most half an epsilon; products with random signs keep relative errors in norm, and the step
    size's error grows by at most the exponent's size, about 1. The state's own rounding is that of its dtype.
    """
    right = exact(call)
    if dtype == "float32":
        for name in ("residual", "window", "state"):
            allowed = allowed_error(np.asarray(getattr(right, name)), jnp.float32, terms=D + 2 * E + R)
            error = np.abs(np.asarray(getattr(outputs, name), np.float64) - np.asarray(getattr(right, name)))
            assert (error <= allowed).all(), (name, (error / allowed).max())
        return
    before = {"residual": np.asarray(call["residual"], np.float64), "window": 0, "state": 0}
    for name, start in before.items():
        change = np.asarray(getattr(right, name)) - start
        error = np.asarray(getattr(outputs, name), np.float64) - start - change
        relative = np.linalg.norm(error) / np.linalg.norm(change)
        assert relative < 2 * 7 * BFLOAT16_ROUNDING / 2, (name, relative)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plain_values(dtype: str) -> None:
    call = in_dtype(make_call(rows=5), dtype)
    outputs = mamba1_step(**call, eps=EPS)
    assert outputs.residual.dtype == outputs.state.dtype == jnp.float32
    assert outputs.window.dtype == call["window"].dtype
    check_values(outputs, call, dtype)


def test_plain_form_is_the_layers_one_by_one() -> None:
    call = in_dtype(make_call(rows=5), "float32")
    w, residual = call["weights"], call["residual"]
    u = residual / jnp.sqrt(jnp.mean(residual**2, axis=-1, keepdims=True) + EPS) * w.norm_scale[None]
    xz = jnp.einsum("bd,dpe->bpe", u, w.in_proj)
    convolved = causal_conv1d(
        xz[:, :1], w.conv_weight, bias=w.conv_bias, initial_window=call["window"], activation="silu"
    )
    x = convolved.y[:, 0]
    dt, B, C = jnp.split(x @ w.x_proj, [R, R + N], axis=-1)
    scan = selective_state_update(
        call["state"],
        x,
        dt @ w.dt_proj,
        -jnp.exp(w.A_log),
        B[:, None],
        C[:, None],
        D=w.D,
        z=xz[:, 1],
        dt_bias=w.dt_bias,
        dt_softplus=True,
    )
    outputs = mamba1_step(**call, eps=EPS)
    right = {"residual": residual + scan.y @ w.out_proj, "window": convolved.final_window, "state": scan.state}
    for name, array in right.items():
        # Both are float32; sums are rounded in another order.
        np.testing.assert_allclose(getattr(outputs, name), array, rtol=0, atol=1e-5 * float(jnp.abs(array).max()))


def test_bad_input_is_named() -> None:
    call = in_dtype(make_call(rows=2), "float32")
    wrong = {
        "expected R [+] 2 N = 19": {"x_proj": call["weights"].x_proj[:, 1:]},
        r"expected \(D, 2, E\)": {"in_proj": call["weights"].in_proj[:, :1]},
        "cast them to one dtype": {"out_proj": call["weights"].out_proj.astype(jnp.bfloat16)},
        "in_proj is float32 with in_proj_scale: give it to int8": {"in_proj_scale": jnp.ones((2, E))},
    }
    for message, change in wrong.items():
        with pytest.raises(ValueError, match=message):
            mamba1_step(**call | {"weights": dataclasses.replace(call["weights"], **change)}, eps=EPS)
    with pytest.raises(ValueError, match=r"window has shape \(2, 2, 80\)"):
        mamba1_step(**call | {"window": call["window"][:, 1:]}, eps=EPS)


@without_gpu
def test_triton_declines() -> None:
    call = in_dtype(make_call(rows=2), "float32")
    with pytest.raises(NotImplementedError, match=r"'triton' needs a CUDA GPU of compute capability 8\.0"):
        by_kernels(call)
    half = jax.tree.map(lambda array: array.astype(jnp.float16), call)
    with pytest.raises(NotImplementedError, match="computes in bfloat16 or float32, got float16"):
        by_kernels(half)


@interpreted
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "rows"), CALLS)
def test_interpreted_values(name: str, rows: int, dtype: str) -> None:
    call = in_dtype(make_call(rows=rows), dtype)
    check_values(by_kernels(call, TILINGS[name]), call, dtype)


def int8_call(rows: int, dtype: str) -> dict:
    call = in_dtype(make_call(rows=rows), dtype)
    return call | {"weights": in_int8(call["weights"], *MATRICES)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plain_values_of_int8_weights(dtype: str) -> None:
    call = int8_call(5, dtype)
    outputs = mamba1_step(**call, eps=EPS)
    check_values(outputs, call, dtype)


@interpreted
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "rows"), CALLS)
def test_interpreted_values_of_int8_weights(name: str, rows: int, dtype: str) -> None:
    call = int8_call(rows, dtype)
    check_values(by_kernels(call, TILINGS[name]), call, dtype)


@interpreted
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(("states", "taps"), [(1, 4), (5, 3), (16, 2), (8, 1)])
def test_interpreted_other_states_and_taps(states: int, taps: int) -> None:
    call = in_dtype(make_call(rows=3, states=states, taps=taps), "float32")
    check_values(by_kernels(call), call, "float32")


@interpreted
@pytest.mark.usefixtures("interpreter")
def test_interpreted_few_rows_of_many() -> None:
    call = in_dtype(make_call(rows=21), "bfloat16")
    check_values(by_kernels(call, of_tiles(FOUR)), call, "bfloat16")


@interpreted
@pytest.mark.usefixtures("interpreter")
def test_interpreted_state_in_bfloat16() -> None:
    call = in_dtype(make_call(rows=3), "bfloat16")
    call["state"] = call["state"].astype(jnp.bfloat16)
    outputs = by_kernels(call)
    assert outputs.state.dtype == jnp.bfloat16
    check_values(outputs, call, "bfloat16")


@interpreted
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("rows", [16, 20])
def test_interpreted_rows_are_independent(rows: int) -> None:
    call = in_dtype(make_call(rows=rows), "bfloat16")
    other = in_dtype(make_call(rows=rows, seed=1), "bfloat16")
    mixed = {name: other[name].at[3].set(call[name][3]) for name in ("residual", "window", "state")}
    alone, among = by_kernels(call), by_kernels(call | mixed)
    for name in ("residual", "window", "state"):
        np.testing.assert_array_equal(getattr(alone, name)[3], getattr(among, name)[3])


SHAPES = {"130m": (768, 48), "2.8b": (2560, 160)}


def shapes_of_call(rows: int, width: int, rank: int, *, is_int8: bool = False) -> dict:
    """Shapes of a call of a published size in bfloat16, the matrices in it or in int8."""
    inner, states = 2 * width, 16

    def single(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def half(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    weights = Mamba1Weights(
        norm_scale=single(width),
        in_proj=half(width, 2, inner),
        conv_weight=single(4, inner),
        conv_bias=single(inner),
        x_proj=half(inner, rank + 2 * states),
        dt_proj=half(rank, inner),
        dt_bias=single(inner),
        A_log=single(inner, states),
        D=single(inner),
        out_proj=half(inner, width),
    )
    if is_int8:
        weights = int8_shapes(weights, *MATRICES)
    arrays = {"residual": single(rows, width), "window": half(rows, 3, inner), "state": single(rows, inner, states)}
    return {**arrays, "weights": weights}


@compiled
@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("rows", [1, 16, 128])
@pytest.mark.parametrize("size", SHAPES)
def test_kernels_compile(size: str, rows: int, is_int8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels compile for Hopper, without arrays in local memory."""
    binaries = compiled_by(monkeypatch)
    jax.eval_shape(by_kernels, shapes_of_call(rows, *SHAPES[size], is_int8=is_int8))
    expected = {"project_in", "multiply_in_parts", "advance"} | ({"normalize"} if rows > 1 else set())
    if default_tiling(rows, width=SHAPES[size][0]).project_dt is not None:
        expected |= {"sum_parts", "project_dt"}
    assert binaries.keys() == expected | {"project_out" if rows <= 16 else "add_to_residual"}
    check_binaries(binaries)


@compiled
def test_lowers_for_a_gpu_that_is_not_there() -> None:
    pytest.importorskip("triton")
    program = jax.jit(by_kernels)
    with tracing_for_kind("gpu", "NVIDIA H100 80GB HBM3"):
        lowered = program.trace(shapes_of_call(1, *SHAPES["130m"])).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("@__gpu$xla.gpu.ptx") == 4


@on_gpu
@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 16, 20, 128])
@pytest.mark.parametrize("size", SHAPES)
def test_values_on_a_gpu(size: str, rows: int, is_int8: bool) -> None:
    call = drawn(shapes_of_call(rows, *SHAPES[size]))
    if is_int8:
        call["weights"] = in_int8(call["weights"], *MATRICES)
    check_values(jax.jit(by_kernels)(call), call, "bfloat16")


@on_gpu
@pytest.mark.parametrize(("name", "rows"), CALLS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_of_odd_sizes_on_a_gpu(name: str, dtype: str, rows: int) -> None:
    call = in_dtype(make_call(rows=rows), dtype)
    check_values(by_kernels(call, TILINGS[name]), call, dtype)
