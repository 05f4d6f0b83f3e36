"""The mixer as a layer of someone else's model: what it takes, and every kind of mesh around it."""

import dataclasses
import functools
import inspect
import textwrap
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mamba_jax.config import Mamba1Config
from mamba_jax.errors import InputError
from mamba_jax.models.block import Block
from mamba_jax.models.language_model import LanguageModel
from mamba_jax.models.mixers.mamba1.mixer import Mamba1
from mamba_jax.models.mixers.mixer import BlockInput
from mamba_jax.sharding import Axis

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
X = jax.random.normal(jax.random.key(1), (4, 8, 16))
IDS = jnp.asarray(np.repeat([[0, 1]], [3, 5], axis=1).repeat(4, axis=0), jnp.int32)
# The same float32 sums in another order, over 4 x 8 tokens and 32 channels, of values of order one.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
needs_eight_devices = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")


@functools.cache
def make_mixer() -> Mamba1:
    return Mamba1(Mamba1Config(state_dim=4), d_model=16, rngs=nnx.Rngs(0))


def output_and_gradients(params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    graph = nnx.graphdef(make_mixer())

    def loss(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = nnx.merge(graph, params)(x, None, IDS)
        return jnp.sum(y**2), y

    gradients, y = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)
    return y, gradients


@functools.cache
def alone() -> tuple[jax.Array, Any]:
    return output_and_gradients(nnx.state(make_mixer()), X)


def assert_close(actual: Any, expected: Any) -> None:
    for (path, value), reference in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(value, reference, **CLOSE, err_msg=jax.tree_util.keystr(path))


def test_the_example_runs() -> None:
    _, _, rest = (inspect.getdoc(Mamba1) or "").partition("Example:\n")
    example, _, _ = rest.partition("\n\nSource:")
    names: dict[str, Any] = {"nnx": nnx, "Mamba1": Mamba1, "tokens": jnp.zeros((2, 5), jnp.int32)}
    exec(textwrap.dedent(example), names)
    assert names["logits"].shape == (2, 5, 256)
    assert np.all(np.isfinite(names["logits"]))


def place(params: Any, mesh: jax.sharding.Mesh, mesh_axes: dict[Axis, str]) -> Any:
    """The parameters with some of their logical axes split over axes of a mesh."""

    def put(variable: nnx.Variable) -> nnx.Variable:
        spec = PartitionSpec(*(mesh_axes.get(axis) for axis in variable.axes))
        return variable.replace(jax.device_put(variable[...], NamedSharding(mesh, spec)))

    return jax.tree.map(put, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


@needs_eight_devices
@pytest.mark.parametrize(
    ("names", "kinds", "split", "mesh_axes"),
    [
        pytest.param(("batch", "model"), (AUTO, AUTO), ("batch",), {}, id="other names"),
        pytest.param(("data", "pipe"), (AUTO, AUTO), ("data",), {}, id="one of our names", marks=pytest.mark.slow),
        pytest.param(
            ("data", "model"), (AUTO, EXPLICIT), (), {}, id="ours automatic, theirs explicit", marks=pytest.mark.slow
        ),
        pytest.param(("batch", "time"), (EXPLICIT, EXPLICIT), ("batch", "time"), {}, id="explicit batch and length"),
        pytest.param(
            ("rows", "lanes"),
            (EXPLICIT, EXPLICIT),
            ("rows",),
            {Axis.INNER: "lanes", Axis.EMBED: "rows"},
            id="explicit batch, channels and width",
        ),
    ],
)
def test_under_any_mesh(names: tuple[str, ...], kinds: tuple, split: tuple[str, ...], mesh_axes: dict) -> None:
    mesh = jax.make_mesh((2, 4), names, axis_types=kinds)
    expected = alone()
    with jax.set_mesh(mesh):
        params = place(nnx.state(make_mixer()), mesh, mesh_axes) if mesh_axes else nnx.state(make_mixer())
        x = jax.device_put(X, PartitionSpec(*split)) if split else X
        found = output_and_gradients(params, x)
    assert_close(found, expected)


@needs_eight_devices
def test_moves_between_meshes() -> None:
    """`nnx.jit` leaves the parameters on the mesh it ran under; another mesh takes them from there."""
    mixer = nnx.clone(make_mixer())
    for kind in (AUTO, EXPLICIT, AUTO):
        with jax.set_mesh(jax.make_mesh((8,), ("batch",), axis_types=(kind,))):
            y = nnx.jit(lambda mixer, x: mixer(x, None, IDS))(mixer, X)
    assert_close(y, alone()[0])


@needs_eight_devices
def test_inside_shard_map() -> None:
    mesh = jax.make_mesh((4, 2), ("rows", "copies"), axis_types=(AUTO, AUTO))
    graph, params = nnx.split(make_mixer())

    def run(params: Any, x: jax.Array, ids: jax.Array) -> jax.Array:
        return nnx.merge(graph, params)(x, None, ids)

    rows = PartitionSpec("rows")
    mapped = jax.shard_map(run, mesh=mesh, in_specs=(PartitionSpec(), rows, rows), out_specs=rows)
    gradient = jax.jit(jax.grad(lambda params, x: jnp.sum(mapped(params, x, IDS) ** 2), argnums=(0, 1)))
    assert_close(gradient(params, X), alone()[1])


@pytest.mark.slow
@needs_eight_devices
def test_whole_models_under_explicit_axes(small_config) -> None:
    config = small_config(num_layers=1)
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    block = Block(config.mixer, config, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(3), (4, 8), 0, config.vocab_size)

    @nnx.jit
    def run(model: LanguageModel, block: Block, tokens: jax.Array, x: jax.Array) -> Any:
        gradient = nnx.grad(lambda model: jnp.mean(model(tokens).logits ** 2))(model)
        return gradient, block(BlockInput(residual=x, embedded=x, segment_ids=None, shared={})).residual

    expected = run(model, block, tokens, X)
    with jax.set_mesh(jax.make_mesh((2, 4), ("rows", "lanes"), axis_types=(EXPLICIT, EXPLICIT))):
        rows = PartitionSpec("rows")
        found = run(nnx.clone(model), nnx.clone(block), jax.device_put(tokens, rows), jax.device_put(X, rows))
    assert_close(found, expected)


def test_a_state_continues_the_sequence() -> None:
    mixer = make_mixer()

    @jax.jit
    def run(x: jax.Array) -> jax.Array:
        head = mixer.advance(x[:, :5])
        rest = mixer.advance(x[:, 5:7], head.state)
        last = mixer.advance(x[:, 7:], rest.state)
        return jnp.concatenate([head.y, rest.y, last.y], axis=1)

    assert_close(run(X), jax.jit(mixer)(X))


@pytest.mark.parametrize("dtype", ["float32", jnp.bfloat16])
def test_dtypes(dtype: Any) -> None:
    mixer = Mamba1(d_model=16, compute_dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    output = jax.eval_shape(mixer.advance, X)
    assert output.y.dtype == output.state.conv_window.dtype == jnp.dtype(dtype)
    assert output.state.ssm.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(mixer))} == {jnp.dtype(dtype)}
    assert output.y.shape == jax.eval_shape(mixer, np.asarray(X)).shape == X.shape


def test_a_language_models_config_says_everything(small_config) -> None:
    config = small_config(rescale_residual=False)
    given = Mamba1(config, rngs=nnx.Rngs(params=1))
    spelt = Mamba1(config.mixer, d_model=config.d_model, rngs=nnx.Rngs(params=1))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(given), nnx.state(spelt))
    scaled = Mamba1(dataclasses.replace(config, rescale_residual=True), rngs=nnx.Rngs(params=1))
    # Values up to 1 / sqrt(32), each way rounded twice.
    rescaled = given.out_proj.kernel[...] / 2**0.5
    np.testing.assert_allclose(scaled.out_proj.kernel[...], rescaled, rtol=0, atol=4 * 2**-24 / 32**0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda config: Mamba1(rngs=nnx.Rngs(0)), "d_model=None: give the width of its input"),
        (lambda config: Mamba1(d_model=0, rngs=nnx.Rngs(0)), "d_model=0: give the width of its input"),
        (lambda config: Mamba1(config, d_model=8, rngs=nnx.Rngs(0)), "d_model=8 besides a ModelConfig"),
        (lambda config: Mamba1(d_model=8, compute_dtype="int8", rngs=nnx.Rngs(0)), "compute_dtype=int8: choose one of"),
        (lambda config: make_mixer()(X[0]), r"shape \(8, 16\), expected non-empty \(B, L, 16\)"),
        (lambda config: make_mixer()(X[:, :, :8]), r"shape \(4, 8, 8\), expected non-empty \(B, L, 16\)"),
        (lambda config: make_mixer()(X[:, :0]), r"shape \(4, 0, 16\), expected non-empty"),
        (lambda config: make_mixer()(X.astype(int)), "dtype int32, expected a floating one"),
    ],
)
@pytest.mark.usefixtures("only_our_checks")
def test_what_it_cannot_take_is_refused_in_one_line(small_config, call, message: str) -> None:
    with pytest.raises(InputError, match=f"Mamba1: .*{message}") as caught:
        call(small_config())
    assert "\n" not in str(caught.value)
