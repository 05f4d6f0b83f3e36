"""The recurrent block of Griffin against others' results in float64, its extremes, and what its config refuses."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from mamba_jax.config import ModelConfig, RGLRUConfig
from mamba_jax.errors import InputError
from mamba_jax.models.mixers.rg_lru.mixer import RGLRU
from mamba_jax.models.mixers.rg_lru.recurrence import RealGatedLRU, RecurrenceOutput
from mamba_jax.models.mixers.rg_lru.state import NO_TOKEN, RGLRUState
from mamba_jax.models.state import finite_rows, init_state
from mamba_jax.sharding import Axis

GOLDEN = Path(__file__).parents[1] / "golden" / "layers"
WIDTH = 16
SMALL = RGLRUConfig(num_heads=2, conv_width=3)
Golden = dict[str, np.ndarray]


def make(config: RGLRUConfig = SMALL, *, seed: int = 0) -> RGLRU:
    """A block whose parameters are all random, biases too."""
    mixer, rng = RGLRU(config, d_model=WIDTH, rngs=nnx.Rngs(seed)), np.random.default_rng(seed)
    graph, params = nnx.split(mixer)
    moved = jax.tree.map(lambda leaf: leaf + jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype), params)
    return nnx.merge(graph, moved)


def unit(channels: int, heads: int) -> RealGatedLRU:
    return RealGatedLRU(channels, heads=heads, decay_range=(0.9, 0.999), param_dtype="float32", rngs=nnx.Rngs(0))


def with_params(module: Any, params: dict[str, Any], dtype: Any) -> tuple[Any, Any]:
    """The module's graph, and the parameters as it takes them."""
    graph, state = nnx.split(module)
    nnx.replace_by_pure_dict(state, jax.tree.map(lambda value: jnp.asarray(value, dtype), params))
    return graph, state


def unit_params(golden: Golden, kind: str) -> dict[str, Any]:
    """Parameters of the unit, or their gradients, from a golden file."""
    gates = [f"{kind}.a_gate", f"{kind}.input_gate"]
    return {
        "Lambda": golden[f"{kind}.a_param"],
        "gates": {
            "kernel": np.stack([golden[f"{name}_w"] for name in gates], axis=2),
            "bias": np.stack([golden[f"{name}_b"] for name in gates], axis=1),
        },
    }


def documents(golden: Golden) -> jax.Array:
    """Ids of documents from positions in them."""
    return jnp.asarray(np.cumsum(golden["in.segment_pos"] == 0, axis=1), jnp.int32)


def assert_close(actual: Any, expected: Any, bound: float) -> None:
    for (path, value), reference in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        assert np.shape(value) == np.shape(reference)
        scale = np.max(np.abs(reference))
        np.testing.assert_allclose(value, reference, rtol=0, atol=bound * scale, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("name", ["rg_lru_segments", "rg_lru_state"])
def test_the_unit_is_that_of_the_authors_in_float64(name: str) -> None:
    golden = load_file(GOLDEN / f"{name}.safetensors")
    with jax.enable_x64(True):
        params = unit_params(golden, "in")
        graph, params = with_params(unit(len(params["Lambda"]), len(params["gates"]["bias"])), params, jnp.float64)
        before = golden.get("in.initial_state", np.full(golden["out.final_state"].shape, NO_TOKEN))

        def run(params: Any, x: jax.Array, before: jax.Array) -> tuple[jax.Array, RecurrenceOutput]:
            output = nnx.merge(graph, params)(x, before, documents(golden), implementation="reference")
            loss = jnp.vdot(output.hidden, golden["proj.y"]) + jnp.vdot(output.final, golden["proj.final_state"])
            return loss, output

        gradient = jax.jit(jax.grad(run, argnums=(0, 1, 2), has_aux=True))
        (dparams, dx, dbefore), output = gradient(params, jnp.asarray(golden["in.x"]), jnp.asarray(before))
        # Both sides are sums in float64 over at most 42 tokens and 4 inputs, each term of a few roundings of 1.1e-16.
        bound = 10 * 46 * 2.0**-53
        assert_close((output.hidden, output.final), (golden["out.y"], golden["out.final_state"]), bound)
        assert_close(dx, golden["grad.x"], bound)
        assert_close(nnx.to_pure_dict(dparams), unit_params(golden, "grad"), bound)
        assert_close(dbefore, golden.get("grad.initial_state", np.zeros(before.shape)), bound)


def block_params(golden: Golden, kind: str) -> dict[str, Any]:
    """Parameters of the block, or their gradients, from a golden file."""

    def stacked(suffix: str) -> np.ndarray:
        return np.stack([golden[f"{kind}.linear_{branch}_{suffix}"] for branch in "yx"])

    return {
        "in_proj": {"kernel": stacked("w").transpose(2, 0, 1), "bias": stacked("b")},
        "conv1d": {"weight": golden[f"{kind}.conv_w"], "bias": golden[f"{kind}.conv_b"]},
        "rg_lru": unit_params(golden, kind),
        "out_proj": {"kernel": golden[f"{kind}.linear_out_w"].T, "bias": golden[f"{kind}.linear_out_b"]},
    }


def test_the_block_is_that_of_the_authors() -> None:
    golden = load_file(GOLDEN / "griffin_recurrent_block.safetensors")
    config = RGLRUConfig(lru_width=12, num_heads=4)
    graph, params = with_params(RGLRU(config, d_model=10, rngs=nnx.Rngs(0)), block_params(golden, "in"), jnp.float32)

    def run(params: Any, u: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = nnx.merge(graph, params)(u, None, documents(golden))
        return jnp.vdot(y, jnp.asarray(golden["proj.y"], jnp.float32)), y

    gradient = jax.jit(jax.grad(run, argnums=(0, 1), has_aux=True))
    (dparams, du), y = gradient(params, jnp.asarray(golden["in.x"], jnp.float32))
    # One after the other: projection (10 terms), convolution (4), gates (3), recurrence (21 tokens), projection (12),
    # and in gradients a sum over 42 tokens: some 100 roundings of 2^-24, of random sign, of sums that may be several
    # times their result.
    bound = 5 * 100**0.5 * 2.0**-24
    assert_close((y, du), (golden["out.y"], golden["grad.x"]), bound)
    assert_close(nnx.to_pure_dict(dparams), block_params(golden, "grad"), bound)


def by_equations(params: Any, x: jax.Array) -> RecurrenceOutput:
    """Of one document in every row, as the equations stand, without care for small numbers."""
    gates = params["gates"]
    groups = x.reshape(*x.shape[:2], len(gates["kernel"]), -1)
    pre = jnp.einsum("blhp,hpgq->gblhq", groups, gates["kernel"]) + jnp.swapaxes(gates["bias"], 0, 1)[:, None, None]
    r, i = jax.nn.sigmoid(pre.reshape(2, *x.shape))
    log_a = -8 * r * jax.nn.softplus(params["Lambda"])[None, None]
    factor = jnp.sqrt(-jnp.expm1(2 * log_a)).at[:, 0].set(1)

    def step(h: jax.Array, token: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        h = token[0] * h + token[1]
        return h, h

    tokens = (jnp.exp(log_a), factor * i * x)
    final, hidden = jax.lax.scan(step, jnp.zeros_like(x[:, 0]), jax.tree.map(lambda v: jnp.swapaxes(v, 0, 1), tokens))
    return RecurrenceOutput(hidden=jnp.swapaxes(hidden, 0, 1), final=final)


def with_gradients(run: Any) -> Any:
    """A compiled function to the gradients, by parameters and input, of a loss that reads all outputs, and to these."""

    def loss(params: Any, x: jax.Array) -> tuple[jax.Array, RecurrenceOutput]:
        output = run(params, x)
        return jnp.sum(jnp.sin(3 * output.hidden)) + jnp.sum(jnp.cos(output.final)), output

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))


LENGTH, CHANNELS = 64, 8
GRAPH, STATE = nnx.split(unit(CHANNELS, 2))
OURS, EXPECTED = with_gradients(lambda params, x: nnx.merge(GRAPH, params)(x)), with_gradients(by_equations)


def extreme(gate: float, rates: Any) -> tuple[Any, jax.Array]:
    """Parameters of the unit whose recurrence gate is near sigmoid(gate), with these Lambda; and an input."""
    params = nnx.to_pure_dict(STATE)
    params["gates"]["bias"] = params["gates"]["bias"].at[:, 0].set(gate)
    params["Lambda"] = jnp.broadcast_to(jnp.asarray(rates, jnp.float32), CHANNELS)
    return params, jnp.asarray(np.random.default_rng(0).normal(size=(2, LENGTH, CHANNELS)), jnp.float32)


def ours(params: Any, x: jax.Array) -> tuple[Any, RecurrenceOutput]:
    """Gradients by parameters and input, and outputs."""
    (dparams, dx), output = OURS(with_params(unit(CHANNELS, 2), params, jnp.float32)[1], x)
    return (nnx.to_pure_dict(dparams), dx), output


@pytest.mark.parametrize(
    ("gate", "rate"),
    [(0.0, -4.0), (-9.0, -4.0), (-20.0, -4.0), (-35.0, -4.0), (0.0, -16.0), (-20.0, -16.0), (0.0, 1.0), (0.0, 10.0)],
    ids=["usual", "r 1e-4", "r 1e-9", "r 1e-15", "slow", "slow and r 1e-9", "fast", "forgets all"],
)
def test_float32_is_as_near_as_its_roundings(gate: float, rate: float) -> None:
    """Decays from 1 - 1e-17 to exp(-40): neither the quotient by r nor 1 - a^2 loses digits, in any gradient."""
    params, x = extreme(gate, rate + 0.1 * np.random.default_rng(1).normal(size=CHANNELS))
    gradients, output = ours(params, x)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), (params, x))
        expected_gradients, expected = EXPECTED(*wide)
    # A state is a sum over tokens of products of decays, each rounded some four times by 2^-24, of random sign; a
    # gradient is such a sum of such sums, and its terms may be several times the result.
    bound = 4 * (4 * LENGTH) ** 0.5 * 2.0**-24
    assert_close((output.hidden, output.final), (expected.hidden, expected.final), bound)
    assert_close(gradients, expected_gradients, bound)


@pytest.mark.parametrize(("gate", "rate"), [(-200.0, -4.0), (0.0, -200.0), (-200.0, -200.0), (200.0, 200.0)])
def test_closed_gates_and_endless_memory(gate: float, rate: float) -> None:
    """Where a is 1, or 0, in float32, nothing is infinite: a state is kept, or is the last input."""
    params, x = extreme(gate, rate)
    gradients, output = ours(params, x)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradients))
    if rate > 0:
        i = jax.nn.sigmoid(nnx.merge(*with_params(unit(CHANNELS, 2), params, jnp.float32)).gates(x)[:, :, 1])
        np.testing.assert_allclose(output.hidden, i * x, rtol=1e-6)
    else:
        # An input enters with at most the root of twice the least step, 1e-18, and its rate, 8 softplus(-4) = 0.15.
        kept = np.broadcast_to(output.hidden[:, :1], output.hidden.shape)
        np.testing.assert_allclose(output.hidden, kept, rtol=0, atol=LENGTH * 0.3**0.5 * 1e-9 * np.max(np.abs(x)))


def test_parts_and_tokens_equal_the_whole() -> None:
    mixer = make()
    u = np.random.default_rng(1).normal(size=(2, 11, WIDTH)).astype(np.float32)
    run = jax.jit(mixer.advance)
    whole = run(u)
    output = run(u[:, :6])
    parts = [output.y]
    for index in range(6, 11):
        output = run(u[:, index : index + 1], output.state)
        parts.append(output.y)
    # As for the golden block, with fewer tokens.
    bound = 5 * 100**0.5 * 2.0**-24
    assert_close(np.concatenate(parts, axis=1), np.asarray(whole.y), bound)
    assert_close(output.state, whole.state, bound)
    assert whole.state.hidden.dtype == jnp.float32


@pytest.mark.parametrize("length", [1, 5])
def test_a_fresh_state_is_no_state(length: int) -> None:
    """In values and in gradients; also where another row continues a text."""
    mixer = make()
    u = jnp.asarray(np.random.default_rng(1).normal(size=(2, length, WIDTH)), jnp.float32)
    declared = RGLRU.declare_state(SMALL, mixer.setting, batch_size=2, max_length=None)
    fresh = jax.tree.map(lambda array: jnp.full(array.shape, array.initial, array.dtype), declared)
    graph, params = nnx.split(mixer)

    @jax.jit
    def run(params: Any, u: jax.Array, state: Any) -> Any:
        output, vjp = jax.vjp(
            lambda *arguments: nnx.merge(graph, arguments[0]).advance(*arguments[1:]), params, u, state
        )
        return output, vjp(jax.tree.map(jnp.cos, output))

    plain, (dparams, du, _) = run(params, u, None)
    output, (*gradients, dstate) = run(params, u, fresh)
    # As for the golden block, with fewer tokens.
    bound = 5 * 100**0.5 * 2.0**-24
    assert_close((output, gradients), (plain, [dparams, du]), bound)
    assert not dstate.hidden.any()
    rows = jnp.asarray([[False], [True]])
    mixed = RGLRUState(
        conv_window=jnp.where(rows[:, None], 0, plain.state.conv_window),
        hidden=jnp.where(rows, NO_TOKEN, plain.state.hidden),
    )
    after, _ = run(params, u, mixed)
    np.testing.assert_allclose(after.y[1], plain.y[1], rtol=0, atol=bound * np.max(np.abs(plain.y)))
    assert np.max(np.abs(after.y[0] - plain.y[0])) > 1e-2


def test_a_fresh_state_is_not_taken_for_a_damaged_one() -> None:
    config = ModelConfig(vocab_size=29, d_model=WIDTH, num_layers=2, mixer=SMALL)
    fresh = init_state(config, 2, max_length=None)
    damaged = jax.tree.map(lambda leaf: jnp.ones_like(leaf).at[:, 1].set(jnp.nan), fresh)
    found = finite_rows(config, damaged)["layers"]
    assert np.all(found.hidden[:, 0] == 1)
    assert np.all(found.hidden[:, 1] == NO_TOKEN)
    jax.tree.map(np.testing.assert_array_equal, finite_rows(config, fresh), fresh)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize(
    ("names", "mesh_axes", "split"),
    [
        (("rows", "lanes"), {Axis.INNER: "lanes", Axis.EMBED: "rows"}, ("rows",)),
        (("rows", "time"), {}, ("rows", "time")),
    ],
    ids=["channels, cutting heads", "length"],
)
def test_explicit_axes(names: tuple[str, ...], mesh_axes: dict[Axis, str], split: tuple[str, ...]) -> None:
    mixer = make()
    u = jnp.asarray(np.random.default_rng(1).normal(size=(2, 8, WIDTH)), jnp.float32)
    ids = jnp.asarray(np.repeat([[0, 1]], [3, 5], axis=1).repeat(2, axis=0), jnp.int32)
    graph, params = nnx.split(mixer)

    def loss(params: Any, u: jax.Array, ids: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(nnx.merge(graph, params)(u, None, ids)))

    gradient = jax.grad(loss, argnums=(0, 1))
    expected = jax.jit(gradient)(params, u, ids)
    mesh = jax.make_mesh((2, 4), names, axis_types=(AxisType.Explicit,) * 2)

    def put(variable: nnx.Variable) -> nnx.Variable:
        spec = PartitionSpec(*(mesh_axes.get(axis) for axis in variable.axes))
        return variable.replace(jax.device_put(variable[...], NamedSharding(mesh, spec)))

    with jax.set_mesh(mesh):
        placed = jax.tree.map(put, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
        there = [jax.device_put(array, PartitionSpec(*split)) for array in (u, ids)]
        found = jax.jit(gradient)(placed, *there)
    # The same float32 sums in another order.
    assert_close(found, expected, 1e-5)


def test_initial_values() -> None:
    """The decay at an open gate is uniform in the range, whatever its distance from 1."""
    config = RGLRUConfig(lru_width=4096, num_heads=16, decay_range=(0.5, 0.9999))
    params = nnx.to_pure_dict(nnx.state(RGLRU(config, d_model=8, output_scale=0.5, rngs=nnx.Rngs(0))))
    decays = np.exp(-8 * np.log1p(np.exp(np.asarray(params["rg_lru"]["Lambda"], np.float64))))
    # Float32 of Lambda moves the root of a decay, and so it, by some roundings.
    assert 0.5 * (1 - 1e-5) < decays.min() < 0.501
    assert 0.9998 < decays.max() < 0.9999 * (1 + 1e-5)
    quartiles = np.quantile(decays, [0.25, 0.5, 0.75])
    # Five standard errors of the median of 4096 uniform numbers.
    np.testing.assert_allclose(quartiles, 0.5 + 0.4999 * np.array([0.25, 0.5, 0.75]), atol=5 * 0.25 / 64)
    for weights, variance in (
        (params["rg_lru"]["gates"]["kernel"], 1 / 256),
        (params["in_proj"]["kernel"], 1 / 8),
        (params["conv1d"]["weight"], 0.01 / 4),
        (params["out_proj"]["kernel"], 0.25 / 4096),
    ):
        np.testing.assert_allclose(np.var(weights), variance, rtol=5 * (2 / weights.size) ** 0.5)
    for bias in (params["in_proj"]["bias"], params["conv1d"]["bias"], params["rg_lru"]["gates"]["bias"]):
        assert not bias.any()


def test_dtypes() -> None:
    """The gates and the recurrence are float32 in a model that computes in bfloat16."""
    mixer = RGLRU(SMALL, d_model=WIDTH, compute_dtype="bfloat16", param_dtype="bfloat16", rngs=nnx.Rngs(0))
    output = jax.eval_shape(mixer.advance, jnp.zeros((2, 5, WIDTH)))
    assert output.y.dtype == output.state.conv_window.dtype == jnp.bfloat16
    assert output.state.hidden.dtype == jnp.float32
    gates = jax.eval_shape(mixer.rg_lru.gates, jnp.zeros((2, 5, WIDTH), jnp.bfloat16))
    assert gates.dtype == jnp.float32


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 5}, r"num_heads=5 does not divide the 16 channels: change it, or d_model$"),
        ({"num_heads": 5, "lru_width": 24}, r"num_heads=5 does not divide the 24 channels: change it, or lru_width$"),
        ({"num_heads": 0}, "num_heads must be positive, got 0"),
        ({"lru_width": 0}, "lru_width must be positive, got 0"),
        ({"conv_width": 0}, "conv_width must be positive, got 0"),
        ({"decay_range": (0.9, 1.0)}, r"decay_range must be in order between 0 and 1, got \(0.9, 1.0\)"),
        ({"decay_range": (0.99, 0.9)}, "decay_range must be in order between 0 and 1"),
    ],
)
def test_what_does_not_fit_is_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        RGLRU(RGLRUConfig(**fields), d_model=WIDTH, rngs=nnx.Rngs(0))
    assert "\n" not in str(error.value)
