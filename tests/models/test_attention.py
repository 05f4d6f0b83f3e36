"""The attention mixer against others' results, its cache, and what its config refuses."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from mamba_jax.config import AttentionConfig, MeshConfig, ModelConfig
from mamba_jax.errors import InputError
from mamba_jax.generation.decoder import Decoder
from mamba_jax.generation.generate import generate
from mamba_jax.generation.sampling import Sampling, SamplingConfig
from mamba_jax.models.mixers.attention.attend import Attended, AttendOptions, attend
from mamba_jax.models.mixers.attention.backends import xla
from mamba_jax.models.mixers.attention.backends.tokamax import key_range
from mamba_jax.models.mixers.attention.mixer import Attention
from mamba_jax.models.mixers.attention.rotary import positions_in_documents, rotate
from mamba_jax.models.parameters import define, init
from mamba_jax.sharding import make_mesh, parameter_sharding
from pallas_kernels.common.ahead_of_time import compile_for, tpu_devices, tracing_for_kind
from tests.runs import corpus, make_config

__all__ = ["corpus", "make_config"]
GOLDEN = Path(__file__).parents[1] / "golden" / "layers"
WIDTH = 16
SMALL = AttentionConfig(num_heads=4, num_kv_heads=2, window=5, rotary_dims=2)
XLA = AttendOptions(scale=0.3, implementation="xla")
# Some ten float32 roundings, one after the other, of sums over up to 24 channels and 27 tokens.
BOUND = 10 * 2.0**-24 * np.sqrt(24 + 27)


def golden(name: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Inputs, gradients and result of a file, inputs in float32."""
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    parts = {
        part: {k.removeprefix(part): v for k, v in tensors.items() if k.startswith(part)} for part in ("in.", "grad.")
    }
    inputs = {k: v.astype(np.float32) if v.dtype == np.float64 else v for k, v in parts["in."].items()}
    return inputs, parts["grad."], {"y": tensors["out.y"], "proj": tensors["proj.y"].astype(np.float32)}


def assert_near(actual: Any, expected: Any, name: str = "") -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=BOUND * np.max(np.abs(expected)), err_msg=name)


@pytest.mark.parametrize(
    ("name", "dims", "theta", "window"),
    [("attention_rope_gqa", 8, 10_000.0, None), ("attention_window_segments_partial_rope", 4, 500.0, 5)],
)
def test_values_and_gradients_of_others(name: str, dims: int, theta: float, window: int | None) -> None:
    given, gradients, result = golden(name)
    ids = given.get("segment_ids")
    positions = positions_in_documents(given["q"].shape[1], None if ids is None else jnp.asarray(ids))
    np.testing.assert_array_equal(np.broadcast_to(positions, given["positions"].shape), given["positions"])

    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        q, k = (rotate(x, positions, dims=dims, theta=theta) for x in (q, k))
        return attend(
            q,
            k,
            v,
            None if ids is None else positions,
            options=AttendOptions(window=window, scale=8**-0.5, implementation="xla"),
        )

    y, vjp = jax.vjp(jax.jit(run), *(jnp.asarray(given[name]) for name in "qkv"))
    assert_near(y, result["y"])
    for name, value in zip("qkv", vjp(jnp.asarray(result["proj"])), strict=True):
        assert_near(value, gradients[name], name)


def test_layer_of_others() -> None:
    given, gradients, result = golden("attention_layer")
    heads, kv_heads, channels = 4, 2, 6
    config = AttentionConfig(num_heads=heads, num_kv_heads=kv_heads, head_dim=channels, window=7)
    graph, state = nnx.split(Attention(config, d_model=12, rngs=nnx.Rngs(0)))

    def kernels(tensors: dict[str, Any]) -> dict[str, Any]:
        """Weights in torch's layout (out, in) as those of the mixer."""
        split = {name: tensors[name].T.reshape(12, -1, channels) for name in ("q_proj", "k_proj", "v_proj")}
        return {name: {"kernel": kernel} for name, kernel in {**split, "out_proj": tensors["o_proj"].T}.items()}

    def run(params: dict[str, Any], x: jax.Array) -> jax.Array:
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)(x)

    y, vjp = jax.vjp(jax.jit(run), jax.tree.map(jnp.asarray, kernels(given)), jnp.asarray(given["x"]))
    assert_near(y, result["y"])
    by_params, by_x = vjp(jnp.asarray(result["proj"]))
    assert_near(by_x, gradients["x"])
    jax.tree.map(assert_near, by_params, kernels(gradients))


def make(config: AttentionConfig) -> Attention:
    return Attention(config, d_model=WIDTH, rngs=nnx.Rngs(0))


def inputs(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def test_another_document_moves_nothing_by_a_bit() -> None:
    """Nor do tokens that the window has passed, in one or several chunks of queries."""
    q, k, v, dy = (jnp.asarray(inputs(2, 40, heads, 8)) for heads in (4, 2, 2, 4))
    ids = jnp.asarray(np.repeat([[0, 1]], [17, 23], axis=1).repeat(2, axis=0), jnp.int32)
    positions = positions_in_documents(40, ids)

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        y, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, positions, options=XLA), q, k, v)
        return [part[:, 17:] for part in (y, *vjp(dy))]

    moved = [x.at[:, :17].add(1.0) for x in (q, k, v)]
    jax.tree.map(np.testing.assert_array_equal, run(q, k, v), run(*moved))


@pytest.mark.parametrize("window", [None, 7])
def test_chunks_of_queries_equal_all_at_once(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    q, k, v = (jnp.asarray(inputs(2, 40, heads, 8)) for heads in (4, 2, 2))
    ids = jnp.asarray(np.repeat([[0, 1]], [17, 23], axis=1).repeat(2, axis=0), jnp.int32)
    positions = positions_in_documents(40, ids)

    def output_and_gradients() -> Any:
        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
            y = attend(q, k, v, positions, options=dataclasses.replace(XLA, window=window))
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    whole = output_and_gradients()
    monkeypatch.setattr(xla, "_MOST_SCORES", 2 * 4 * 40 * 12)
    jax.tree.map(assert_near, output_and_gradients(), whole)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_heads_of_keys_that_do_not_divide_are_on_every_device() -> None:
    mixer = make(SMALL)
    graph, params = nnx.split(mixer)
    u = inputs(2, 8, WIDTH)

    def loss(params: Any, u: jax.Array) -> jax.Array:
        head = nnx.merge(graph, params).advance(u[:, :6])
        rest = nnx.merge(graph, params).advance(u[:, 6:], head.state)
        return jnp.sum(jnp.sin(jnp.concatenate([head.y, rest.y], axis=1)))

    expected = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, u)
    mesh = make_mesh(MeshConfig(data=1, sequence=2, tensor=4))
    kernel = mixer.k_proj.kernel
    assert parameter_sharding(mesh, kernel.shape, kernel.axes, name="k").spec[1] is None
    with jax.set_mesh(mesh):
        found = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, u)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        # The same sums of up to 24 float32 products in another order, and their sines.
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_the_ring_holds_a_window_of_a_document_however_long() -> None:
    """Rows that start a document at different tokens, one and several tokens at a time."""
    mixer = make(dataclasses.replace(SMALL, conv_width=3))
    u = inputs(2, 23, WIDTH)
    ids = np.zeros((2, 23), np.int32)
    ids[1, 9:] = 1
    run = jax.jit(mixer.advance)
    whole = run(u, None, ids)
    output, ys = run(u[:, :3], None, ids[:, :3]), []
    state = mixer.grow_state(SMALL, jax.tree.map(lambda leaf: leaf[None], output.state), 23)
    state = jax.tree.map(lambda leaf: leaf[0], state)
    assert state.keys.shape == (2, 5, 2, 4)
    for start, stop in ((3, 5), (5, 6), (6, 7), (7, 12), (12, 13), (13, 22), (22, 23)):
        output = run(u[:, start:stop], state, ids[:, start:stop])
        ys, state = [*ys, output.y], output.state
    assert_near(np.concatenate(ys, axis=1), whole.y[:, 3:])
    assert_near(state.keys, whole.state.keys)
    np.testing.assert_array_equal(state.position, [23, 14])


def test_a_ring_that_is_too_small_gives_nan() -> None:
    mixer = make(AttentionConfig(num_heads=4))
    u = inputs(2, 9, WIDTH)
    head = mixer.advance(u[:, :4])
    assert np.all(np.isnan(mixer.advance(u[:, 4:5], head.state).y))
    more = mixer.advance(u[:, 4:8], head.state)
    assert_near(more.y, mixer.advance(u).y[:, 4:8])
    assert np.all(np.isnan(mixer.advance(u[:, 8:], more.state).y))
    # A document that starts later fits.
    again = mixer.advance(u[:, :4], more.state, np.asarray([[0, 1, 1, 1]] * 2, np.int32))
    assert np.array_equal(np.isnan(again.y[0, :, 0]), [True, False, False, False])
    assert_near(again.y[:, 1:], mixer.advance(u[:, 1:4]).y)


def test_generation_has_room_for_what_is_asked_for() -> None:
    config = ModelConfig(
        vocab_size=29,
        d_model=WIDTH,
        num_layers=2,
        mixer=AttentionConfig(num_heads=4, num_kv_heads=1),
        embedding_std=1.0,
        compute_dtype="float32",
    )
    definition = define(config)
    params = jax.jit(init, static_argnums=0)(config, jax.random.key(0))
    prompts = np.random.default_rng(0).integers(0, 29, (3, 7)).astype(np.int32)
    lengths = np.asarray([2, 7, 4])
    greedy = SamplingConfig(temperature=0.0)
    options: dict[str, Any] = {"num_tokens": 5, "key": jax.random.key(0), "sampling": greedy}
    together = generate(definition, params, jnp.asarray(prompts), lengths=lengths, **options)
    forward = jax.jit(lambda tokens: definition.merge(params)(tokens).logits)
    for row, length in enumerate(lengths):
        tokens = [*prompts[row, :length], *np.asarray(together[row])]
        logits = forward(np.pad(np.asarray([tokens], np.int32), ((0, 0), (0, 12 - len(tokens)))))
        np.testing.assert_array_equal(np.argmax(logits[0, length - 1 : length + 4, :29], axis=1), together[row])
    decoder = Decoder(definition, params, max_length=12)
    read = decoder.prefill(prompts, lengths)
    token = decoder.draw(read.logits, Sampling.of([greedy] * 3), jax.random.key(0))
    state = read.state
    for index in range(4):
        np.testing.assert_array_equal(token, together[:, index])
        step = decoder.step(state, token, Sampling.of([greedy] * 3), jax.random.key(0))
        token, state = step.tokens, step.state
    np.testing.assert_array_equal(token, together[:, 4])
    with pytest.raises(InputError, match="the prompts have 13 tokens, but the decoder's max_length is 12: raise it"):
        decoder.prefill(np.zeros((1, 13), np.int32))
    with pytest.raises(InputError, match="window is None, so a state has to hold every token of a document"):
        Decoder(definition, params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_heads": 3, "num_kv_heads": None},
            r"num_heads=3 does not divide d_model=16: change one of them, or give",
        ),
        ({"num_kv_heads": 3}, "num_kv_heads=3 does not divide num_heads=4: change one of them"),
        ({"num_heads": 0}, "num_heads must be positive, got 0"),
        ({"window": 0}, "window=0: give at least 1, which is the token alone, or None"),
        ({"rotary_dims": 3}, "rotary_dims=3: channels are rotated in pairs, give an even number or 0"),
        ({"rotary_dims": 6}, "rotary_dims=6 is more than the 4 channels of a head: make it less"),
        ({"rotary_dims": None, "head_dim": 5}, "a head of 5 channels has no whole number of pairs"),
        ({"attention_implementation": "flash"}, "attention_implementation: Input should be 'cudnn', 'tokamax'"),
    ],
)
@pytest.mark.usefixtures("only_our_checks")
def test_what_does_not_fit_is_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        make(dataclasses.replace(SMALL, **changes))
    assert "\n" not in str(error.value)


def test_streams_need_a_window(make_config: Any) -> None:
    with pytest.raises(InputError, match="give max_length, the most tokens of one, or a window") as error:
        make_config(mixer=AttentionConfig(num_heads=4), order="streams")
    assert "\n" not in str(error.value)


def packed(length: int, *, kv_heads: int = 2, channels: int = 64) -> tuple[list[jax.Array], jax.Array]:
    """Queries, keys and values of two rows, and positions of their tokens in documents."""
    arrays = [jnp.asarray(inputs(2, length, heads, channels)) for heads in (4, kv_heads, kv_heads)]
    ids = np.stack([np.arange(length) > length // 3, np.arange(length) > length - 9]).astype(np.int32)
    return arrays, positions_in_documents(length, jnp.asarray(ids))


@pytest.mark.parametrize(("window", "is_packed"), [(100, True), pytest.param(None, False, marks=pytest.mark.slow)])
def test_splash_interpreted(window: int | None, is_packed: bool) -> None:
    arrays, positions = packed(256)

    def run(implementation: str) -> Any:
        options = AttendOptions(scale=0.1, window=window, implementation=implementation)

        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
            y = attend(q, k, v, positions if is_packed else None, options=options)
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)

    # Sums over up to 256 tokens and 64 channels, in blocks.
    for found, expected in zip(jax.tree.leaves(run("splash")), jax.tree.leaves(run("xla")), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=10 * 2.0**-24 * 18 * np.max(np.abs(expected)))


def test_splash_compiles_for_a_tpu() -> None:
    device = tpu_devices("v5e:2x2")[0]
    options = AttendOptions(scale=0.125, window=300)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array) -> jax.Array:
        return jnp.sum(attend(q, k, v, positions, options=options).astype(jnp.float32))

    arrays, positions = packed(1024)
    halves = [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in arrays]
    # As in a run: the kernel's products of bfloat16 have no higher precision.
    with jax.default_matmul_precision("default"):
        text = compile_for(device, jax.grad(loss, argnums=(0, 1, 2)), *halves, positions).as_text()
    assert text is not None
    assert "attention.splash" in text
    assert "attention.xla" not in text


def test_key_ranges_are_what_a_query_sees() -> None:
    """Those that tokamax is given, for a part of a row after others, against the mask of XLA's implementation."""
    _, positions = packed(40)
    arguments = Attended(
        q=jnp.zeros((2, 15, 4, 8)),
        k=jnp.zeros((2, 40, 2, 8)),
        v=jnp.zeros((2, 40, 2, 8)),
        positions=positions[:, 25:],
        first=25,
        window=7,
        scale=1.0,
    )
    bounds = key_range(arguments)
    index = np.arange(40)[None, None]
    inside = (index >= np.asarray(bounds["k_start"])[..., None]) & (index < np.asarray(bounds["k_end"])[..., None])
    start = np.arange(40) - np.asarray(positions)
    age = np.arange(25, 40)[:, None] - np.arange(40)
    np.testing.assert_array_equal(inside, (start[:, 25:, None] == start[:, None]) & (age >= 0) & (age < 7))


@pytest.mark.parametrize(
    ("name", "platform", "message"),
    [
        ("cudnn", "cpu", "'cudnn' runs on GPUs only, not on cpu"),
        ("cudnn", "gpu", "'cudnn' takes one document a row"),
        ("tokamax", "cpu", "'tokamax' runs on GPUs only"),
        ("tokamax", "gpu", "'tokamax' takes bfloat16 and float16, got float32"),
        ("splash", "gpu", "'splash' runs on TPUs only"),
        ("splash", "cpu", "'splash' takes multiples of 128 tokens, got 40"),
    ],
)
def test_a_named_backend_runs_or_says_why_not(name: str, platform: str, message: str) -> None:
    arrays, positions = packed(40)
    options = AttendOptions(scale=0.1, implementation=name)
    with tracing_for_kind(platform, "any"), pytest.raises(NotImplementedError, match=message):
        attend(arrays[0], arrays[1], arrays[2], positions, options=options)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("name", ["cudnn", "tokamax"])
def test_backends_of_a_gpu(name: str) -> None:
    """Values and gradients, and for packed documents that none moves by a bit when another does."""
    arrays, positions = packed(512)
    halves = [x.astype(jnp.bfloat16) for x in arrays]
    given = None if name == "cudnn" else positions

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation: str, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
        options = AttendOptions(scale=0.125, window=200, implementation=implementation)
        y, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, given, options=options), q, k, v)
        return y, *vjp(jnp.cos(y.astype(jnp.float32)).astype(y.dtype))

    found = run(name, *halves)
    for one, other in zip(found, run("xla", *(x.astype(jnp.float32) for x in halves)), strict=True):
        # Probabilities and results are rounded to 8 bits; gradients are sums of a few such products.
        np.testing.assert_allclose(
            one.astype(jnp.float32), other, rtol=0, atol=2.0**-6 * float(jnp.max(jnp.abs(other)))
        )
    if given is not None:
        start = 512 // 3 + 1
        moved = run(name, *(x.at[0, :start].add(1.0) for x in halves))
        for one, other in zip(found, moved, strict=True):
            np.testing.assert_array_equal(one[0, start:].astype(jnp.float32), other[0, start:].astype(jnp.float32))
            np.testing.assert_array_equal(one[1].astype(jnp.float32), other[1].astype(jnp.float32))
