"""Sequences split over devices against one device: values, every gradient, what is exchanged, memory."""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax.config import MeshConfig, ModelConfig
from mamba_jax.models import ops, sequence_parallel
from mamba_jax.models.loss import next_token_loss
from mamba_jax.models.parameters import define, init
from mamba_jax.models.state import init_state
from mamba_jax.pods.hlo import compiled_instructions
from mamba_jax.sharding import make_mesh, parameter_sharding, put_batch
from pallas_kernels import causal_conv1d, selective_scan, ssd
from pallas_kernels.ssd.arg_specs import SSDSpec

# Eight devices have 6 tokens each. Documents start at an edge, one token before and after one; a document of one token
# ends at an edge and is followed by the id before it; documents span several devices.
LENGTHS_OF_DOCUMENTS = ((6, 1, 20, 21), (5, 8, 23, 12), (11, 1, 36), (48,))
IDS = ((0, 1, 0, 1), (3, 4, 5, 0), (0, 1, 0), (7,))
BATCH, LENGTH, CHANNELS, STATES, WIDTH = 4, 48, 2, 3, 4
SPLIT_CONV = functools.partial(ops.causal_conv1d, past=WIDTH - 1)


def make_arrays(dtype: str) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """Arguments of the convolution, those of the scan but its input, and cotangents of all outputs."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), dtype)

    sequence, matrix, state = (BATCH, LENGTH, CHANNELS), (BATCH, LENGTH, STATES), (BATCH, CHANNELS, STATES)
    window = (BATCH, WIDTH - 1, CHANNELS)
    conv = {"x": normal(*sequence), "weight": normal(WIDTH, CHANNELS), "bias": normal(CHANNELS)}
    conv["initial_window"] = normal(*window)
    scan = {"dt": normal(*sequence) - 3, "A": -jnp.exp(normal(CHANNELS, STATES)), "B": normal(*matrix)}
    scan |= {"C": normal(*matrix), "D": normal(CHANNELS), "z": normal(*sequence), "dt_bias": normal(CHANNELS) - 1}
    scan["initial_state"] = normal(*state)
    return conv, scan, (normal(*sequence), normal(*window), normal(*state))


def document_ids() -> jax.Array:
    rows = [np.repeat(ids, lengths) for ids, lengths in zip(IDS, LENGTHS_OF_DOCUMENTS, strict=True)]
    return jnp.asarray(np.stack(rows), jnp.int32)


def run_layer(mesh: jax.sharding.Mesh | None, segment_ids: jax.Array | None, dtype: str, options: dict[str, Any]):
    """Outputs and every gradient of the convolution followed by the scan; without a mesh by the operations alone."""
    conv_arrays, scan_arrays, cotangents = make_arrays(dtype)

    conv, scan = (causal_conv1d, selective_scan) if mesh is None else (SPLIT_CONV, ops.selective_scan)

    def layer(conv_arrays: Any, scan_arrays: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        convolved = conv(**conv_arrays, segment_ids=segment_ids, activation="silu", **options)
        scanned = scan(x=convolved.y, **scan_arrays, segment_ids=segment_ids, dt_softplus=True, **options)
        return scanned.y, convolved.final_window, scanned.final_state

    @jax.jit
    def run(*arrays: Any) -> Any:
        outputs, vjp = jax.vjp(layer, *arrays)
        return outputs, vjp(cotangents)

    if mesh is None:
        return run(conv_arrays, scan_arrays)
    with jax.set_mesh(mesh):
        return run(conv_arrays, scan_arrays)


def assert_equal_up_to_rounding(actual: Any, expected: Any, unit: float) -> None:
    """Every array within the rounding of its longest sum: over all tokens of the batch, channels and states."""
    terms = BATCH * LENGTH + CHANNELS + STATES
    # Eight roundings a term, as in tests/kernels/op_contract.py, of random sign.
    bound = 8 * unit * math.sqrt(terms)
    for (path, value), reference in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        scale = np.max(np.abs(reference))
        np.testing.assert_allclose(value, reference, rtol=0, atol=bound * scale, err_msg=jax.tree_util.keystr(path))


@functools.cache
def on_one_device(documents: str, dtype: str, implementation: str) -> Any:
    segment_ids = document_ids() if documents == "packed" else None
    return run_layer(None, segment_ids, dtype, {"implementation": implementation})


@pytest.mark.parametrize(
    ("devices", "documents"), [(1, "packed"), (2, "packed"), (3, "one"), (4, "packed"), (8, "packed"), (8, "one")]
)
def test_layer_equals_one_device_in_float64(devices: int, documents: str) -> None:
    segment_ids = document_ids() if documents == "packed" else None
    mesh = make_mesh(MeshConfig(data=1, sequence=devices), jax.devices()[:devices])
    with jax.enable_x64(True):
        expected = on_one_device(documents, "float64", "reference")
        actual = run_layer(mesh, segment_ids, "float64", {"implementation": "reference"})
        assert all(leaf.dtype == np.float64 for leaf in jax.tree.leaves(actual))
    assert_equal_up_to_rounding(actual, expected, 2.0**-53)


@pytest.mark.parametrize(
    "mesh", [MeshConfig(sequence=8, data=1), MeshConfig(data=1, fsdp=2, sequence=2, tensor=2)], ids=["8", "2x2x2"]
)
def test_layer_equals_one_device_in_float32(mesh: MeshConfig) -> None:
    """The backend with the hand-written gradient, under every axis."""
    expected = on_one_device("packed", "float32", "xla")
    actual = run_layer(make_mesh(mesh), document_ids(), "float32", {"implementation": "xla"})
    assert_equal_up_to_rounding(actual, expected, 2.0**-24)


@functools.cache
def heads_on_one_device() -> Any:
    return run_heads(ssd)


def run_heads(function: Callable[..., Any]) -> Any:
    """Outputs and every gradient of state-space duality over packed documents."""
    spec = SSDSpec(name="heads", length=LENGTH, batch=BATCH, heads=4, width=2, states=3)
    drawn = spec.arguments()
    arrays = {name: jnp.asarray(array, jnp.float32) for name, array in (drawn.wide | drawn.narrow).items()}

    @jax.jit
    def run(arrays: dict[str, jax.Array]) -> Any:
        def op(arrays: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            output = function(**arrays, segment_ids=document_ids(), **drawn.static, implementation="xla")
            return output.y, output.final_state

        outputs, vjp = jax.vjp(op, arrays)
        return outputs, vjp(jax.tree.map(jnp.cos, outputs))

    return run(arrays)


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(sequence=8, data=1),
        MeshConfig(data=1, fsdp=2, sequence=2, tensor=2),
        MeshConfig(data=1, sequence=2, tensor=4),
    ],
    ids=["8", "2x2x2", "heads cut groups"],
)
def test_heads_equal_one_device(mesh: MeshConfig) -> None:
    expected = heads_on_one_device()
    with jax.set_mesh(make_mesh(mesh)):
        actual = run_heads(ops.ssd)
    assert_equal_up_to_rounding(actual, expected, 2.0**-24)


@pytest.mark.slow
def test_forward_mode_equals_one_device() -> None:
    _, scan_arrays, cotangents = make_arrays("float32")
    arrays = {"x": cotangents[0], **scan_arrays}
    tangents = jax.tree.map(jnp.sin, arrays)
    ids = document_ids()

    @functools.partial(jax.jit, static_argnums=0)
    def run(function: Callable[..., Any]) -> Any:
        def scan(arrays: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            output = function(**arrays, segment_ids=ids, dt_softplus=True)
            return output.y, output.final_state

        return jax.jvp(scan, (arrays,), (tangents,))

    expected = run(functools.partial(selective_scan, implementation="reference"))
    with jax.set_mesh(make_mesh(MeshConfig(data=1, sequence=4), jax.devices()[:4])):
        actual = run(ops.selective_scan)
    assert_equal_up_to_rounding(actual, expected, 2.0**-24)


@pytest.mark.parametrize("documents", ["one", "packed"])
def test_a_document_sees_nothing_of_another(documents: str) -> None:
    """What is not a number stays in its document and the device that holds it, for windows and states are not added."""
    segment_ids = jnp.asarray(np.repeat([[0, 1]], [18, 30], axis=1), jnp.int32) if documents == "packed" else None
    conv_arrays, scan_arrays, _ = make_arrays("float32")
    conv_arrays, scan_arrays = jax.tree.map(
        lambda array: array[:1] if array.ndim == 3 else array, (conv_arrays, scan_arrays)
    )
    conv_arrays["x"] = conv_arrays["x"].at[:, 17].set(jnp.nan)
    with jax.set_mesh(make_mesh(MeshConfig(data=1, sequence=8))):
        x = jax.jit(lambda: SPLIT_CONV(**conv_arrays, segment_ids=segment_ids, activation="silu").y)()
        arrays: dict[str, Any] = {"x": x, **scan_arrays, "segment_ids": segment_ids, "dt_softplus": True}
        scanned = jax.jit(lambda: ops.selective_scan(**arrays))()
    y, state = scanned.y, scanned.final_state
    assert np.all(np.isfinite(y[:, :17]))
    assert np.all(np.isnan(y[:, 17]))
    assert np.all(np.isfinite(y[:, 18:])) == np.all(np.isfinite(state)) == (documents == "packed")


def make_batch(config: ModelConfig, batch: int, length: int) -> tuple[np.ndarray, ...]:
    """Tokens, targets, mask and ids of two rows of documents whose edges are not those of the devices."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, config.vocab_size, (batch, length + 1)).astype(np.int32)
    ids = np.stack([np.arange(length) // (13 + row) for row in range(batch)]).astype(np.int32)
    return tokens[:, :-1], tokens[:, 1:], rng.random((batch, length)) < 0.8, ids


def loss_program(config: ModelConfig, mesh: MeshConfig, batch: Any) -> tuple[Any, tuple[Any, Any]]:
    """Loss and gradient of a model as a program for the mesh, and its arguments."""
    devices = make_mesh(mesh, jax.devices()[: math.prod(vars(mesh).values())])
    definition = define(config)
    params = init(config, jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    axes = tree.flatten_up_to(definition.axes)
    shardings = tree.unflatten(
        parameter_sharding(devices, leaf.shape, leaf_axes, name="parameter")
        for leaf, leaf_axes in zip(leaves, axes, strict=True)
    )

    @functools.partial(jax.jit, out_shardings=(None, shardings))
    @jax.value_and_grad
    def loss(params: Any, batch: Any) -> jax.Array:
        tokens, targets, mask, ids = batch
        model = definition.merge(params)
        hidden = model.hidden(tokens, None, segment_ids=ids).hidden
        normalizer = jnp.float32(tokens.size)
        head = model.head
        return next_token_loss(hidden, head, targets, mask, normalizer=normalizer, z_loss=1e-3, chunk=8).loss

    arguments = jax.device_put(params, shardings), put_batch(devices, batch)
    with jax.set_mesh(devices):
        return loss.lower(*arguments).compile(), arguments


@functools.cache
def model_on_one_device(config: ModelConfig) -> Any:
    program, arguments = loss_program(config, MeshConfig(data=1), make_batch(config, 2, 64))
    return program(*arguments)


# tests/training/test_step.py holds training on these meshes to as much in every run of the tests.
@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(data=2, sequence=4), MeshConfig(data=1, fsdp=2, sequence=2, tensor=2)],
    ids=["data 2 sequence 4", "fsdp 2 sequence 2 tensor 2"],
)
def test_loss_and_gradient_of_a_model(small_config: Callable[..., ModelConfig], mesh: MeshConfig) -> None:
    config = small_config()
    loss, gradient = model_on_one_device(config)
    program, arguments = loss_program(config, mesh, make_batch(config, 2, 64))
    split_loss, split_gradient = program(*arguments)
    # As in tests/training/test_step.py: sums over 2 x 64 positions and a recurrence of 64 steps in another order.
    bound = (2 * 64 + 64) * 2.0**-24
    np.testing.assert_allclose(split_loss, loss, rtol=bound)
    for (path, value), reference in zip(
        jax.tree_util.tree_leaves_with_path(split_gradient), jax.tree.leaves(gradient), strict=True
    ):
        error = np.linalg.norm(np.asarray(value, np.float64) - np.asarray(reference, np.float64))
        assert error <= bound * np.linalg.norm(reference), jax.tree_util.keystr(path)


def collectives(program: Any) -> list[tuple[str, str, int]]:
    """Kind, shapes and number of the exchanges of a program."""
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    found = []
    for line, times in compiled_instructions(program.as_text()):
        if match := re.search(rf" = (.*?) ({kinds})(?:-start)?\(", line):
            found.append((match[2], match[1], times))
    return found


def test_states_are_exchanged_in_log_rounds(small_config: Callable[..., ModelConfig]) -> None:
    config = small_config()
    batch, length, devices = 2, 88, 8
    *arrays, _ = make_batch(config, batch, length)
    program, _ = loss_program(config, MeshConfig(data=1, sequence=devices), (*arrays, None))
    mixer: Any = config.mixer
    inner, states, width = mixer.channels(config.d_model), mixer.state_dim, mixer.conv_width
    state, window = f"f32[{batch},{inner},{states}]", f"f32[{batch},{width - 1},{inner}]"
    counts = dict.fromkeys((state, window, f"f32[{batch},{inner}]"), 0)
    for kind, shapes, times in collectives(program):
        if kind == "collective-permute":
            counts[re.sub(r"\{.*", "", shapes)] += times
        # The state after the last token is not asked for, so it is not sent either.
        assert state not in shapes or kind == "collective-permute", shapes
    layers, directions, rounds = config.num_layers, 2, int(math.log2(devices))
    assert counts[state] == layers * directions * rounds
    assert counts[window] == layers * directions
    # The last round needs no s: nothing comes before the first document but the initial state, which is zero.
    assert counts[f"f32[{batch},{inner}]"] == layers * directions * (rounds - 1)
    # Only the tokens themselves exist at their whole length on a device, to look them up in its part of the table.
    of_length = r"\w+\[(?:\d+,)*{}(?:,\d+)*\]"
    assert set(re.findall(of_length.format(length), program.as_text())) <= {f"s32[{batch},{length},1]"}
    assert f"f32[{batch},{length // devices},{inner}]" in re.findall(
        of_length.format(length // devices), program.as_text()
    )


@pytest.mark.slow
def test_memory_is_that_of_a_part(small_config: Callable[..., ModelConfig]) -> None:
    config = small_config(remat="block")
    length, devices = 4096, 8
    batch = make_batch(config, 1, length)

    def temporaries(mesh: MeshConfig) -> int:
        return loss_program(config, mesh, batch)[0].memory_analysis().temp_size_in_bytes

    whole, part = temporaries(MeshConfig(data=1)), temporaries(MeshConfig(data=1, sequence=devices))
    # The sums for the state at the edge work on step sizes, inputs and the gate, or what they are for, in float32.
    mixer: Any = config.mixer
    edge = 3 * length // devices * mixer.channels(config.d_model) * 4
    # What does not depend on the length is a few times the parameters.
    fixed = 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(init(config, jax.random.key(0))))
    assert part < whole / devices + edge + fixed
    assert part < whole / 5


@pytest.mark.parametrize("length", [1, 6, 8, 16], ids=["token", "uneven", "short parts", "even"])
def test_any_length_continues_a_state(small_config: Callable[..., ModelConfig], length: int) -> None:
    """Four devices; of the lengths only 16 has parts as long as the convolution's reach."""
    config = small_config()
    params = init(config, jax.random.key(0))
    definition = define(config)
    tokens = np.random.default_rng(2).integers(0, config.vocab_size, (2, length)).astype(np.int32)
    start = jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.5), init_state(config, 2))
    run = jax.jit(lambda params: definition.merge(params)(jnp.asarray(tokens), start))
    expected = run(params)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, sequence=4))):
        assert sequence_parallel.is_split(length, past=3) == (length == 16)
        actual = run(params)
    # 16 dependent steps and sums over 32 channels, through two layers.
    bound = 2 * (16 + 32) * 2.0**-24
    for value, reference in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(value, reference, rtol=0, atol=bound * np.max(np.abs(reference)))
