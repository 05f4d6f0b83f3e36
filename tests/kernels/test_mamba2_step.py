"""The Mamba-2 step: values in plain JAX, and its Triton kernels interpreted, compiled and refused without a GPU."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import causal_conv1d, ssd_state_update
from pallas_kernels.common.ahead_of_time import tracing_for_kind
from pallas_kernels.common.arg_spec import BFLOAT16_ROUNDING, allowed_error
from pallas_kernels.common.triton.tiles import Tile
from pallas_kernels.mamba2_step.api import mamba2_step
from pallas_kernels.mamba2_step.arguments import Mamba2Carry, Mamba2Weights, StepArguments
from pallas_kernels.mamba2_step.triton import op as triton_backend
from pallas_kernels.mamba2_step.triton.tilings import RecurrenceTile, Tiling, default_tiling
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

EPS, LIMIT = 1e-5, (0.01, 0.9)
MATRICES = ("in_proj", "BC_proj", "dt_proj", "out_proj")
# Sizes that no tile divides; two groups of the gated norm.
D, H, P, N, G, K = 40, 6, 12, 10, 2, 4
E, M = H * P, 2 * G * N
STATIC: dict[str, Any] = {"eps": EPS, "gated_norm_eps": 1e-4, "group_size": E // 2, "dt_limit": LIMIT}
CARRIED = ("residual", "window", "BC_window", "state")
_TILE = Tile(columns=16, depth=32, stages=2, warps=1)
SMALL = Tiling(project_in=_TILE, advance=RecurrenceTile(channels=8, warps=1), project_out=_TILE)


@dataclasses.dataclass(frozen=True)
class Call:
    """Arguments of a call."""

    before: Mamba2Carry
    weights: Mamba2Weights


def make_call(*, rows: int, taps: int = K, seed: int = 0, skips: tuple[int, ...] = (H,)) -> Call:
    """Arguments of a call in double precision, with outputs of the size of their inputs."""
    rng = np.random.default_rng(seed)

    def matrix(terms: int, *shape: int) -> Any:
        return rng.normal(size=(terms, *shape)) / np.sqrt(terms)

    drawn: dict[str, Any] = dict(
        norm_scale=rng.uniform(0.5, 1.5, D),
        in_proj=matrix(D, 2, E),
        BC_proj=matrix(D, 2, G, N),
        dt_proj=matrix(D, H),
        conv_weight=rng.normal(size=(taps, E)) / 2,
        conv_bias=rng.normal(size=E) / 4,
        BC_conv_weight=rng.normal(size=(taps, M)) / 2,
        BC_conv_bias=rng.normal(size=M) / 4,
        dt_bias=rng.uniform(-3, 0, H),
        A_log=np.log(rng.uniform(0.5, 4, H)),
        D=rng.normal(size=skips),
        gated_norm_scale=rng.uniform(0.5, 1.5, E),
        out_proj=matrix(E, D),
    )
    carried: dict[str, Any] = dict(
        residual=rng.normal(size=(rows, D)) * 3,
        window=rng.normal(size=(rows, taps - 1, E)),
        BC_window=rng.normal(size=(rows, taps - 1, M)),
        state=rng.normal(size=(rows, H, P, N)),
    )
    return Call(Mamba2Carry(**carried), Mamba2Weights(**drawn))


def in_dtype(call: Call, dtype: str) -> Call:
    """A call as a model makes it that computes in `dtype`: matrices and windows in it, all else in float32."""
    narrow = {"in_proj", "BC_proj", "dt_proj", "out_proj", "window", "BC_window"}

    def rounded(tree: Any) -> Any:
        arrays = {
            name: jnp.asarray(array, jnp.float32).astype(dtype if name in narrow else "float32")
            for name, array in vars(tree).items()
            if array is not None
        }
        return type(tree)(**arrays)

    return Call(rounded(call.before), rounded(call.weights))


def exact(call: Call, **static: Any) -> Mamba2Carry:
    """The step in double precision, on the very numbers of `call`."""
    with jax.enable_x64(True):
        before, weights = in_double((call.before, call.weights))
        return mamba2_step(before, weights, **STATIC | static, implementation="xla")


def by_kernels(call: Call, tiling: Tiling | None = None, **static: Any) -> Mamba2Carry:
    step = StepArguments.of(**vars(call.before), **vars(call.weights), **STATIC | static)
    return triton_backend.mamba2_step(step, tiling=tiling)


def check_values(outputs: Mamba2Carry, call: Call, dtype: str, **static: Any) -> None:
    """Compares with double precision.

    In float32 an output is off by what the longest chain of sums allows. In bfloat16 six values on the way are rounded,
    each by at most half an epsilon; products with random signs keep relative errors in norm, and the step size's error
    grows by at most the exponent's size, about 1. The state's own rounding is that of its dtype.
    """
    right = exact(call, **static)
    for name in CARRIED:
        before, found, expected = (
            np.asarray(getattr(tree, name), np.float64) for tree in (call.before, outputs, right)
        )
        if dtype == "float32":
            allowed = allowed_error(expected, jnp.float32, terms=D + E + N)
            assert (np.abs(found - expected) <= allowed).all(), (name, (np.abs(found - expected) / allowed).max())
        else:
            change = expected - (before if name == "residual" else 0)
            relative = np.linalg.norm(found - expected) / np.linalg.norm(change)
            assert relative < 2 * 6 * BFLOAT16_ROUNDING / 2, (name, relative)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plain_values(dtype: str) -> None:
    call = in_dtype(make_call(rows=5, skips=(H, P)), dtype)
    outputs = mamba2_step(call.before, call.weights, **STATIC)
    assert outputs.residual.dtype == outputs.state.dtype == jnp.float32
    assert outputs.window.dtype == outputs.BC_window.dtype == dtype
    check_values(outputs, call, dtype)


def test_plain_form_is_the_layers_one_by_one() -> None:
    call = in_dtype(make_call(rows=5), "float32")
    w, before = call.weights, call.before
    u = before.residual / jnp.sqrt(jnp.mean(before.residual**2, axis=-1, keepdims=True) + EPS) * w.norm_scale[None]
    z, x = (jnp.einsum("bd,de->be", u, w.in_proj[:, half]) for half in (0, 1))
    convolved = {
        name: causal_conv1d(inputs[:, None], taps, bias=bias, initial_window=window, activation="silu")
        for name, inputs, taps, bias, window in (
            ("x", x, w.conv_weight, w.conv_bias, before.window),
            ("BC", u @ w.BC_proj.reshape(D, M), w.BC_conv_weight, w.BC_conv_bias, before.BC_window),
        )
    }
    BC = convolved["BC"].y[:, 0].reshape(-1, 2, G, N)
    step = ssd_state_update(
        before.state,
        convolved["x"].y[:, 0].reshape(-1, H, P),
        u @ w.dt_proj,
        -jnp.exp(w.A_log),
        BC[:, 0],
        BC[:, 1],
        D=w.D,
        dt_bias=w.dt_bias,
        dt_softplus=True,
        dt_limit=LIMIT,
    )
    gated = (step.y.reshape(z.shape) * jax.nn.silu(z)).reshape(-1, 2, E // 2)
    normed = gated / jnp.sqrt(jnp.mean(gated**2, axis=-1, keepdims=True) + STATIC["gated_norm_eps"])
    y = normed.reshape(z.shape) * w.gated_norm_scale[None]
    right = {
        "residual": before.residual + y @ w.out_proj,
        "window": convolved["x"].final_window,
        "BC_window": convolved["BC"].final_window,
        "state": step.state,
    }
    outputs = mamba2_step(before, w, **STATIC)
    for name, array in right.items():
        # Both are float32; sums are rounded in another order.
        np.testing.assert_allclose(getattr(outputs, name), array, rtol=0, atol=1e-5 * float(jnp.abs(array).max()))


def test_bad_input_is_named() -> None:
    call = in_dtype(make_call(rows=2), "float32")
    w = call.weights
    wrong: dict[str, dict[str, Any]] = {
        r"expected \(D, 2, H P\)": {"in_proj": w.in_proj[:, :1], "BC_proj": w.BC_proj[:, :1]},
        "expected 2 G N = 20": {"BC_proj": w.BC_proj[:, :, :1]},
        "cast them to one dtype": {"out_proj": w.out_proj.astype(jnp.bfloat16)},
        "out_proj is int8 without out_proj_scale": {name: getattr(w, name).astype(jnp.int8) for name in MATRICES}
        | {f"{name}_scale": jnp.ones(getattr(w, name).shape[1:]) for name in MATRICES[:3]},
    }
    for message, change in wrong.items():
        with pytest.raises(ValueError, match=message):
            mamba2_step(call.before, dataclasses.replace(w, **change), **STATIC)
    with pytest.raises(ValueError, match="group_size=5 does not divide the 72 channels"):
        mamba2_step(call.before, w, **STATIC | {"group_size": 5})
    with pytest.raises(ValueError, match=r"BC_window has shape \(2, 2, 40\)"):
        mamba2_step(dataclasses.replace(call.before, BC_window=call.before.BC_window[:, 1:]), w, **STATIC)


@without_gpu
def test_triton_declines() -> None:
    call = in_dtype(make_call(rows=2), "float32")
    with pytest.raises(NotImplementedError, match=r"'triton' needs a CUDA GPU of compute capability 8\.0"):
        by_kernels(call)
    with pytest.raises(NotImplementedError, match="normalises whole heads of 12 channels, got group_size=6"):
        by_kernels(call, group_size=6)


@interpreted
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 5, 16, 20])
@pytest.mark.parametrize("tiling", [SMALL, None])
def test_interpreted_values(tiling: Tiling | None, rows: int, dtype: str) -> None:
    call = in_dtype(make_call(rows=rows, skips=(H,) if tiling else (H, P)), dtype)
    check_values(by_kernels(call, tiling), call, dtype)


def with_int8(call: Call) -> Call:
    return Call(call.before, in_int8(call.weights, *MATRICES))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plain_values_of_int8_weights(dtype: str) -> None:
    call = with_int8(in_dtype(make_call(rows=5), dtype))
    check_values(mamba2_step(call.before, call.weights, **STATIC), call, dtype)


@interpreted
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 16, 20])
def test_interpreted_values_of_int8_weights(rows: int, dtype: str) -> None:
    call = with_int8(in_dtype(make_call(rows=rows), dtype))
    check_values(by_kernels(call, SMALL), call, dtype)


@interpreted
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("taps", [1, 2, 3])
def test_interpreted_other_taps(taps: int) -> None:
    call = in_dtype(make_call(rows=3, taps=taps), "float32")
    check_values(by_kernels(call, SMALL), call, "float32")


@interpreted
@pytest.mark.usefixtures("interpreter")
def test_interpreted_state_in_bfloat16() -> None:
    call = in_dtype(make_call(rows=3), "bfloat16")
    before = dataclasses.replace(call.before, state=call.before.state.astype(jnp.bfloat16))
    outputs = by_kernels(Call(before, call.weights))
    assert outputs.state.dtype == jnp.bfloat16
    check_values(outputs, Call(before, call.weights), "bfloat16")


@interpreted
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("rows", [16, 20])
def test_interpreted_rows_are_independent(rows: int) -> None:
    call, other = (in_dtype(make_call(rows=rows, seed=seed), "bfloat16") for seed in (0, 1))
    mixed = jax.tree.map(lambda mine, others: others.at[3].set(mine[3]), call.before, other.before)
    alone, among = by_kernels(call), by_kernels(Call(mixed, call.weights))
    for name in CARRIED:
        np.testing.assert_array_equal(getattr(alone, name)[3], getattr(among, name)[3])


SHAPES = {"130m": (768, 24), "2.7b": (2560, 80)}


def shapes_of_call(rows: int, width: int, heads: int, *, state: Any = jnp.float32) -> Call:
    """Shapes of a call of a published size in bfloat16."""
    inner, states, both = 2 * width, 128, 256

    def single(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def half(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    weights = Mamba2Weights(
        norm_scale=single(width),
        in_proj=half(width, 2, inner),
        BC_proj=half(width, 2, 1, states),
        dt_proj=half(width, heads),
        conv_weight=single(4, inner),
        conv_bias=single(inner),
        BC_conv_weight=single(4, both),
        BC_conv_bias=single(both),
        dt_bias=single(heads),
        A_log=single(heads),
        D=single(heads),
        gated_norm_scale=single(inner),
        out_proj=half(inner, width),
    )
    carried: Any = {"residual": single(rows, width), "window": half(rows, 3, inner), "BC_window": half(rows, 3, both)}
    kept: Any = jax.ShapeDtypeStruct((rows, heads, 64, states), state)
    return Call(Mamba2Carry(**carried, state=kept), weights)


def of_published_size(tiling: Tiling | None, before: Mamba2Carry, weights: Mamba2Weights) -> Mamba2Carry:
    return by_kernels(Call(before, weights), tiling, group_size=weights.gated_norm_scale.shape[0])


@compiled
@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("rows", [1, 16, 128])
@pytest.mark.parametrize("size", SHAPES)
def test_kernels_compile(size: str, rows: int, is_int8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels compile for Hopper, without arrays in local memory."""
    binaries = compiled_by(monkeypatch)
    call = shapes_of_call(rows, *SHAPES[size])
    tiling = default_tiling(rows, width=SHAPES[size][0])
    weights = int8_shapes(call.weights, *MATRICES) if is_int8 else call.weights
    jax.eval_shape(functools.partial(of_published_size, tiling), call.before, weights)
    expected = {"project_in", "advance"} | ({"normalize"} if rows > 1 else set())
    expected |= {"project_out"} if rows <= 16 else {"project_out_in_parts", "add_to_residual"}
    assert binaries.keys() == expected
    check_binaries(binaries)


@compiled
def test_lowers_for_a_gpu_that_is_not_there() -> None:
    pytest.importorskip("triton")
    call = shapes_of_call(1, *SHAPES["130m"])
    program = jax.jit(functools.partial(of_published_size, None))
    with tracing_for_kind("gpu", "NVIDIA H100 80GB HBM3"):
        lowered = program.trace(call.before, call.weights).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("@__gpu$xla.gpu.ptx") == 3


@on_gpu
@pytest.mark.parametrize(("state", "is_int8"), [("float32", False), ("bfloat16", False), ("float32", True)])
@pytest.mark.parametrize("rows", [1, 2, 16, 20, 128])
@pytest.mark.parametrize("size", ["130m", "2.7b"])
def test_values_on_a_gpu(size: str, rows: int, state: str, is_int8: bool) -> None:
    shapes = shapes_of_call(rows, *SHAPES[size], state=state)
    call = Call(*drawn((shapes.before, shapes.weights)))
    call = with_int8(call) if is_int8 else call
    static = STATIC | {"group_size": call.weights.gated_norm_scale.shape[0]}
    outputs = jax.jit(functools.partial(of_published_size, None))(call.before, call.weights)
    check_values(outputs, call, "bfloat16", **static)


@on_gpu
@pytest.mark.parametrize("rows", [1, 5, 16, 20])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_of_odd_sizes_on_a_gpu(dtype: str, rows: int) -> None:
    call = in_dtype(make_call(rows=rows, skips=(H, P)), dtype)
    check_values(by_kernels(call), call, dtype)
