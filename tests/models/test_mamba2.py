"""The Mamba-2 mixer against its equations, token by token in NumPy, and what its config refuses."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mamba_jax.config import Mamba2Config, MeshConfig, ModelConfig
from mamba_jax.errors import InputError
from mamba_jax.models import ops
from mamba_jax.models.mixers.mamba2.mixer import Mamba2
from mamba_jax.models.parameters import define, init
from mamba_jax.models.state import finite_rows, init_state
from mamba_jax.sharding import RULES, Axis, make_mesh
from tests.programs import text_of

WIDTH = 16
SMALL = Mamba2Config(state_dim=3, head_dim=4, num_groups=2, conv_width=3)
CONFIGS = {
    "plain": SMALL,
    "norm before the gate": dataclasses.replace(SMALL, norm_before_gate=True, norm_group_size=8, norm_eps=0.1),
    "only the gate": dataclasses.replace(SMALL, use_norm=False, use_bias=True, use_conv_bias=False),
    "everything": dataclasses.replace(
        SMALL,
        inner_dim=28,
        ssm_dim=16,
        use_bias=True,
        skip="channel",
        learn_initial_state=True,
        dt_lower_limit=0.02,
        dt_upper_limit=0.05,
    ),
}


def make(config: Mamba2Config, seed: int = 0) -> Mamba2:
    """A mixer whose parameters are all random, biases and the learned state too."""
    mixer = Mamba2(config, d_model=WIDTH, rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)
    graph, params = nnx.split(mixer)
    moved = jax.tree.map(lambda leaf: leaf + jnp.asarray(0.1 * rng.normal(size=leaf.shape), leaf.dtype), params)
    return nnx.merge(graph, moved)


def silu(v: np.ndarray) -> np.ndarray:
    return v / (1 + np.exp(-v))


def by_equations(mixer: Mamba2, u: np.ndarray) -> np.ndarray:
    """Of one row, (L, D), in float64."""
    c = mixer.config
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(nnx.state(mixer)))

    def project(name: str, x: np.ndarray) -> np.ndarray:
        return np.tensordot(x, p[name]["kernel"], axes=1) + p[name].get("bias", 0)

    def convolve(name: str, x: np.ndarray) -> np.ndarray:
        taps = p[name]["weight"]
        padded = np.concatenate([np.zeros((len(taps) - 1, x.shape[1])), x])
        return silu(sum(padded[k : k + len(x)] * taps[k] for k in range(len(taps))) + p[name].get("bias", 0))

    length = len(u)
    z, x = np.moveaxis(project("in_proj", u), 1, 0)
    x = convolve("conv1d", x)
    B, C = np.moveaxis(
        convolve("BC_conv1d", project("BC_proj", u).reshape(length, -1)).reshape(length, 2, c.num_groups, -1), 1, 0
    )
    dt = np.clip(np.log1p(np.exp(project("dt_proj", u) + p["dt_bias"])), *c.dt_limit)
    heads = dt.shape[1]
    D = np.broadcast_to(p["D"].reshape(heads, -1), (heads, c.head_dim))
    y = np.zeros((length, heads, c.head_dim))
    for head in range(heads):
        group = head // (heads // c.num_groups)
        state = p["initial_state"][head] if c.learn_initial_state else np.zeros((c.head_dim, c.state_dim))
        for t in range(length):
            v = x[t].reshape(heads, -1)[head]
            state = np.exp(-dt[t, head] * np.exp(p["A_log"][head])) * state + dt[t, head] * np.outer(v, B[t, group])
            y[t, head] = state @ C[t, group] + D[head] * v
    y = y.reshape(length, -1)

    def norm(v: np.ndarray) -> np.ndarray:
        grouped = v.reshape(length, -1, c.norm_group_size or v.shape[1] // c.num_groups)
        scale = 1 / np.sqrt(np.mean(grouped**2, axis=-1, keepdims=True) + c.norm_eps)
        return (grouped * scale).reshape(v.shape) * p["norm"]["scale"]

    if not c.use_norm:
        y = y * silu(z)
    elif c.norm_before_gate:
        y = norm(y) * silu(z)
    else:
        y = norm(y * silu(z))
    if "mlp_proj" in p:
        gate, value = np.moveaxis(project("mlp_proj", u), 1, 0)
        y = np.concatenate([silu(gate) * value, y], axis=1)
    return project("out_proj", y)


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_its_equations(name: str) -> None:
    mixer = make(CONFIGS[name])
    u = np.random.default_rng(1).normal(size=(2, 11, WIDTH)).astype(np.float32)
    y = jax.jit(lambda u: mixer(u))(u)
    expected = np.stack([by_equations(mixer, row) for row in u])
    # Some ten float32 roundings of 6e-8 one after the other, of sums over up to 32 channels and 11 tokens.
    np.testing.assert_allclose(y, expected, rtol=0, atol=10 * 6e-8 * np.sqrt(43) * np.max(np.abs(expected)))


@pytest.mark.parametrize("name", ["plain", "everything"])
def test_parts_and_tokens_equal_the_whole(name: str) -> None:
    mixer = make(CONFIGS[name])
    u = np.random.default_rng(1).normal(size=(2, 11, WIDTH)).astype(np.float32)
    run = jax.jit(mixer.advance)
    whole = run(u)
    output = run(u[:, :6])
    parts = [output.y]
    for index in range(6, 11):
        output = run(u[:, index : index + 1], output.state)
        parts.append(output.y)
    atol = 10 * 6e-8 * np.sqrt(43) * np.max(np.abs(whole.y))
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole.y, rtol=0, atol=atol)
    for one, other in zip(jax.tree.leaves(output.state), jax.tree.leaves(whole.state), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=10 * 6e-8 * np.sqrt(43) * np.max(np.abs(other)))


def test_a_stream_starts_from_the_learned_state() -> None:
    """Also where rows of the state start anew, and the state that stands for it is not taken for a damaged one."""
    config = ModelConfig(
        vocab_size=29, d_model=WIDTH, num_layers=2, mixer=CONFIGS["everything"], compute_dtype="float32", remat="none"
    )
    definition = define(config)
    params = init(config, jax.random.key(0))
    params["layers"]["mixer"]["initial_state"] += 1.0
    tokens = np.random.default_rng(0).integers(0, 29, (2, 7)).astype(np.int32)
    run = jax.jit(lambda params, tokens, state: definition.merge(params)(tokens, state).logits)
    plain = run(params, tokens, None)
    fresh = init_state(config, 2)
    np.testing.assert_array_equal(run(params, tokens, finite_rows(config, fresh)), plain)
    gradient = jax.grad(lambda params: jnp.sum(run(params, tokens, fresh)))(params)
    assert np.all(gradient["layers"]["mixer"]["initial_state"] != 0)


def test_a_packed_document_starts_from_the_learned_state() -> None:
    mixer = make(CONFIGS["everything"])
    u = np.random.default_rng(1).normal(size=(2, 11, WIDTH)).astype(np.float32)
    ids = np.tile(np.repeat([3, 1, 2], [4, 2, 5]), (2, 1)).astype(np.int32)
    run = jax.jit(mixer.advance)
    packed = run(u, None, ids)
    parts = [run(u[:, start:stop]) for start, stop in ((0, 4), (4, 6), (6, 11))]
    alone = np.concatenate([part.y for part in parts], axis=1)
    np.testing.assert_allclose(packed.y, alone, rtol=0, atol=10 * 6e-8 * np.sqrt(43) * np.max(np.abs(alone)))
    np.testing.assert_allclose(packed.state.ssm, parts[-1].state.ssm, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_heads_over_devices(groups: int) -> None:
    """Whether or not groups divide over the devices that heads are split over."""
    config = dataclasses.replace(SMALL, num_groups=groups, state_dim=4)
    mixer = make(config)
    u = np.random.default_rng(1).normal(size=(2, 8, WIDTH)).astype(np.float32)

    def loss(params: Any, u: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(nnx.merge(graph, params)(u)))

    graph, params = nnx.split(mixer)
    expected = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, u)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, tensor=4))):
        found = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, u)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("groups", [2, 3])
def test_groups_that_do_not_divide_over_devices_follow_their_heads(groups: int) -> None:
    """Two groups that devices share, and three that they cut: a device computes its heads alone."""
    rng = np.random.default_rng(0)
    sizes = {"x": "BLHP", "dt": "BLH", "A": "H", "B": "BLGN", "C": "BLGN"}
    lengths = {"B": 1, "L": 3, "H": 12, "P": 5, "G": groups, "N": 2}
    arrays = {
        name: jnp.asarray(rng.uniform(0.1, 1, [lengths[letter] for letter in letters]), jnp.float32)
        for name, letters in sizes.items()
    }
    arrays["A"] = -arrays["A"]

    def run(arrays: dict[str, jax.Array]) -> Any:
        y, vjp = jax.vjp(lambda arrays: ops.ssd(**arrays).y, arrays)
        return y, vjp(jnp.sin(y))[0]

    expected = jax.jit(run)(arrays)
    mesh = make_mesh(MeshConfig(data=1, tensor=4), jax.devices()[:4])
    with jax.set_mesh(mesh):
        placed = {
            name: jax.device_put(
                arrays[name], NamedSharding(mesh, RULES.spec([ops.AXES.get(letter) for letter in letters]))
            )
            for name, letters in sizes.items()
        }
        program = jax.jit(run).lower(placed).compile()
    # x is nowhere whole.
    assert "[1,3,3,5]" in text_of(program)
    assert "[1,3,12,5]" not in text_of(program)
    found = program(placed)
    # Sums of at most 12 heads, 3 tokens and 2 states, in another order.
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=72 * 2.0**-24), found, expected)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_explicit_axes_that_would_cut_heads_and_groups() -> None:
    """Two heads, and two groups of the norm, under an axis of four devices that channels are split over."""
    mixer = make(dataclasses.replace(SMALL, head_dim=16))
    u = jnp.asarray(np.random.default_rng(1).normal(size=(2, 8, WIDTH)), jnp.float32)
    expected = jax.jit(mixer)(u)
    mesh = jax.make_mesh((2, 4), ("rows", "lanes"), axis_types=(AxisType.Explicit,) * 2)
    graph, params = nnx.split(mixer)

    def put(variable: nnx.Variable) -> nnx.Variable:
        spec = PartitionSpec(*("lanes" if axis == Axis.INNER else None for axis in variable.axes))
        return variable.replace(jax.device_put(variable[...], NamedSharding(mesh, spec)))

    with jax.set_mesh(mesh):
        split = jax.tree.map(put, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
        found = jax.jit(lambda params, u: nnx.merge(graph, params)(u))(split, jax.device_put(u, PartitionSpec("rows")))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 5}, r"head_dim=5 does not divide the 32 channels: change it, or d_model and expand"),
        ({"num_groups": 3}, "num_groups=3 does not divide the 8 heads"),
        ({"norm_group_size": 5}, "norm_group_size=5 does not divide the 32 channels"),
        ({"inner_dim": 30}, r"head_dim=4 does not divide the 30 channels: change it, or inner_dim"),
        ({"inner_dim": 8, "ssm_dim": 16}, "ssm_dim=16 is more than inner_dim = 8: make it less"),
        ({"ssm_dim": 64}, r"ssm_dim=64 is more than expand \* d_model = 32"),
        ({"state_dim": 0}, "state_dim must be positive, got 0"),
        ({"dt_max": 1e-4}, r"dt_max \(0.0001\) must not be below dt_min \(0.001\)"),
        ({"dt_lower_limit": -1.0}, "nor this below 0"),
        ({"a_init_range": (0.0, 1.0)}, "a_init_range must be positive and in order"),
        ({"skip": "row"}, "skip: Input should be 'head' or 'channel'"),
    ],
)
@pytest.mark.usefixtures("only_our_checks")
def test_what_does_not_fit_is_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        Mamba2(dataclasses.replace(SMALL, **changes), d_model=WIDTH, rngs=nnx.Rngs(0))
    assert "\n" not in str(error.value)
