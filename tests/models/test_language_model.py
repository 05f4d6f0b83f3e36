"""Behaviour of whole models: causality, state, packing, precision, ablations, sharding, memory."""

import dataclasses
import functools
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax.config import MeshConfig, ModelConfig
from mamba_jax.models import parameters
from mamba_jax.models.state import init_state
from mamba_jax.sharding import batch_sharding, make_mesh, parameter_sharding, put_batch
from tests.programs import text_of

# Two orders of summation of the same float32 model: a few roundings (6e-8) per layer, against logits of order 0.3.
SAME_MODEL = {"rtol": 1e-5, "atol": 1e-6}


def tokens_of(config: ModelConfig, shape: tuple[int, int], seed: int = 1) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), shape, 0, config.vocab_size)


@functools.cache
def build(config: ModelConfig):
    definition = parameters.define(config)
    params = jax.jit(lambda key: parameters.init(config, key))(jax.random.key(0))

    @jax.jit
    def apply(params, tokens, state=None, segment_ids=None):
        return definition.merge(params)(tokens, state, segment_ids=segment_ids)

    return definition, params, apply


def assert_same_state(actual, expected) -> None:
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, **SAME_MODEL)


def loss_and_gradient(definition, tokens, segment_ids=None):
    @jax.jit
    def function(params):
        def loss(params):
            logits = definition.merge(params)(tokens, segment_ids=segment_ids).logits
            picked = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)
            return -jnp.mean(picked)

        return jax.value_and_grad(loss)(params)

    return function


def relative_errors(actual, expected) -> dict[str, float]:
    def error(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)

    flat = jax.tree.leaves_with_path(jax.tree.map(error, actual, expected))
    return {jax.tree_util.keystr(path): float(value) for path, value in flat}


def test_no_position_sees_a_later_token(small_config) -> None:
    """Every position holds its own id, so the gradient of a row of the table is that of a position's input."""
    definition, params, _ = build(small_config(tie_embeddings=False))
    tokens = jnp.arange(12)[None]

    def outputs(table):
        return jnp.sum(definition.merge({**params, "embedding": {"table": table}})(tokens).logits[0], axis=-1)

    jacobian = jax.jit(jax.jacrev(outputs))(params["embedding"]["table"])
    influence = np.abs(np.asarray(jacobian)[:, :12]).max(axis=-1)
    assert (np.triu(influence, k=1) == 0).all()
    assert (np.tril(influence)[np.tril_indices(12)] > 0).all()


@pytest.mark.parametrize("split", [1, 7, 15])
def test_a_state_continues_the_sequence(small_config, split: int) -> None:
    definition, params, apply = build(small_config())
    tokens = tokens_of(definition.config, (2, 16))
    whole = apply(params, tokens)
    head = apply(params, tokens[:, :split])
    tail = apply(params, tokens[:, split:], head.state)
    logits = jnp.concatenate([head.logits, tail.logits], axis=1)
    np.testing.assert_allclose(logits, whole.logits, **SAME_MODEL)
    assert_same_state(tail.state, whole.state)


@pytest.mark.parametrize("selective", [("dt", "B", "C"), ("dt",)], ids=str)
def test_decoding_equals_the_full_forward_pass(small_config, selective) -> None:
    definition, params, apply = build(small_config(mixer={"selective": selective}))
    tokens = tokens_of(definition.config, (32, 9))  # as many rows as inner channels
    state, logits = init_state(definition.config, 32), []
    for position in range(9):
        output = apply(params, tokens[:, position : position + 1], state)
        state = output.state
        logits.append(output.logits)
    expected = apply(params, tokens).logits
    error = jnp.abs(jnp.concatenate(logits, axis=1) - expected).max() / jnp.abs(expected).max()
    assert error < 1e-6


def test_packed_documents_do_not_meet(small_config) -> None:
    definition, params, apply = build(small_config())
    tokens = tokens_of(definition.config, (1, 14))
    cuts = [0, 1, 6, 14]
    segment_ids = jnp.asarray([[0] + [3] * 5 + [1] * 8])
    packed = apply(params, tokens, segment_ids=segment_ids)
    for start, end in itertools.pairwise(cuts):
        alone = apply(params, tokens[:, start:end])
        np.testing.assert_allclose(packed.logits[:, start:end], alone.logits, **SAME_MODEL)
    assert_same_state(packed.state, alone.state)
    changed = apply(params, tokens.at[0, 5].set((tokens[0, 5] + 1) % 29), segment_ids=segment_ids)
    np.testing.assert_array_equal(packed.logits[:, 6:], changed.logits[:, 6:])


def test_packed_documents_do_not_train_each_other(small_config) -> None:
    definition, params, _ = build(small_config(tie_embeddings=False))
    tokens = jnp.arange(14)[None]
    weights = jax.random.normal(jax.random.key(3), (1, 14, definition.config.padded_vocab_size))

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def gradient(params, start, end, segment_ids=None):
        """Of a document's own outputs; without `segment_ids`, the document is all that the model gets."""

        def loss(params):
            inputs = tokens[:, start:end] if segment_ids is None else tokens
            logits = definition.merge(params)(inputs, segment_ids=segment_ids).logits
            logits = logits if segment_ids is None else logits[:, start:end]
            return jnp.sum(logits * weights[:, start:end])

        return jax.grad(loss)(params)

    packed = gradient(params, 6, 14, jnp.asarray([[0] * 6 + [1] * 8]))
    # Roundings of 6e-8, over sums of as many as eight tokens in two layers.
    assert max(relative_errors(packed, gradient(params, 6, 14)).values()) < 2e-6
    np.testing.assert_array_equal(packed["embedding"]["table"][:6], 0)


@pytest.mark.parametrize(
    "changes",
    [{"remat": "block"}, {"remat": "dots"}, {"remat": "cheap"}, {"unroll": True}, {"remat": "cheap", "unroll": True}],
)
def test_rematerialisation_and_unrolling_change_nothing(small_config, changes: dict[str, Any]) -> None:
    config = small_config()
    tokens = tokens_of(config, (2, 12))
    definition, params, _ = build(config)
    loss, gradient = loss_and_gradient(definition, tokens)(params)
    other = parameters.define(dataclasses.replace(config, **changes))
    other_loss, other_gradient = loss_and_gradient(other, tokens)(params)
    assert float(loss).hex() == float(other_loss).hex()
    # The same operations, fused differently by the compiler.
    assert max(relative_errors(other_gradient, gradient).values()) < 1e-6


def test_what_is_cheap_is_all_that_is_computed_again(small_config) -> None:
    config = small_config(remat="cheap")
    definition, params, _ = build(config)
    program = str(jax.make_jaxpr(loss_and_gradient(definition, tokens_of(config, (2, 12))))(params))
    kept = parameters.define(dataclasses.replace(config, remat="none"))
    without = str(jax.make_jaxpr(loss_and_gradient(kept, tokens_of(config, (2, 12))))(params))
    block = parameters.define(dataclasses.replace(config, remat="block"))
    all_again = str(jax.make_jaxpr(loss_and_gradient(block, tokens_of(config, (2, 12))))(params))
    # Of a Mamba-1 block's four products only the small one to dt is repeated.
    assert program.count("dot_general") == without.count("dot_general") + 1
    assert all_again.count("dot_general") > program.count("dot_general")


def test_bfloat16_compute_keeps_float32_where_it_matters(small_config) -> None:
    config = small_config()
    _, params, apply = build(config)
    _, _, apply_bf16 = build(dataclasses.replace(config, compute_dtype="bfloat16"))
    tokens = tokens_of(config, (2, 12))
    exact, rounded = apply(params, tokens), apply_bf16(params, tokens)
    assert rounded.logits.dtype == jnp.float32
    assert rounded.state["layers"].ssm.dtype == jnp.float32
    assert rounded.state["layers"].conv_window.dtype == jnp.bfloat16
    # A bfloat16 rounding is 2^-9 = 0.2 %; about twenty of them follow one another in two layers.
    error = jnp.abs(rounded.logits - exact.logits).max() / jnp.abs(exact.logits).max()
    assert 0 < error < 20 * 2**-9
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


ABLATIONS = [
    {"mixer": {"use_conv": False}},
    {"mixer": {"use_gate": False}},
    {"mixer": {"use_conv": False, "use_gate": False, "selective": ()}},
    {"mixer": {"selective": ("dt",)}},
    {"mixer": {"selective": ("B", "C")}},
    {"mixer": {"selective": ("C", "dt")}},
    {"mixer": {"discretization": "zoh"}},
    {"mixer": {"a_init": "random", "use_bias": True, "use_conv_bias": False}},
    {"mixer": {"state_dim": 1, "expand": 1, "conv_width": 2, "dt_rank": 3, "dt_init": "constant"}},
    {"tie_embeddings": False, "num_layers": 1},
]


@pytest.mark.parametrize("changes", ABLATIONS, ids=str)
def test_every_option_trains_all_its_parameters_and_decodes(small_config, changes) -> None:
    definition, params, _ = build(small_config(**changes))
    tokens = tokens_of(definition.config, (2, 10))

    @jax.jit
    def run(params):
        def loss(params):
            output = definition.merge(params)(tokens)
            picked = jnp.take_along_axis(jax.nn.log_softmax(output.logits[:, :-1]), tokens[:, 1:, None], axis=-1)
            return -jnp.mean(picked), output.logits

        gradient, whole = jax.grad(loss, has_aux=True)(params)
        head = definition.merge(params)(tokens[:, :9])
        return gradient, whole, definition.merge(params)(tokens[:, 9:], head.state).logits

    gradient, whole, last = run(params)
    for path, leaf in jax.tree.leaves_with_path(gradient):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 0, path
    np.testing.assert_allclose(last, whole[:, 9:], **SAME_MODEL)


def test_ids_outside_the_table_are_loud(small_config) -> None:
    definition, params, apply = build(small_config())
    assert definition.config.padded_vocab_size == 32
    logits = apply(params, jnp.asarray([[1, 32], [1, -1]])).logits
    assert np.isfinite(logits[:, 0]).all()
    assert np.isnan(logits[:, 1]).all()


def test_eight_devices_agree_with_one(small_config) -> None:
    config = small_config()
    definition, params, _ = build(config)
    tokens = tokens_of(config, (8, 12))
    loss, gradient = loss_and_gradient(definition, tokens)(params)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shardings = jax.tree.map(
        lambda leaf, axes: parameter_sharding(mesh, leaf.shape, axes, name=""), definition.params, definition.axes
    )
    with jax.set_mesh(mesh):
        split = jax.device_put(params, shardings)
        function = loss_and_gradient(definition, put_batch(mesh, np.asarray(tokens)))
        split_loss, split_gradient = function(split)
    kernel = split["layers"]["mixer"]["in_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    # Partial sums over devices are added in another order: roundings of 6e-8 over a few hundred terms.
    np.testing.assert_allclose(split_loss, loss, rtol=1e-6)
    assert max(relative_errors(split_gradient, gradient).values()) < 5e-6


def test_no_device_gathers_the_sequences_of_another(small_config) -> None:
    """Rows and channels are scanned where they are: nothing with a length dimension is gathered over the batch."""
    definition = parameters.define(small_config(tie_embeddings=False))
    mesh = make_mesh(MeshConfig(data=4, tensor=2))
    params = jax.tree.map(
        lambda leaf, axes: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=parameter_sharding(mesh, leaf.shape, axes, name="")
        ),
        definition.params,
        definition.axes,
    )
    tokens = jax.ShapeDtypeStruct((8, 37), jnp.int32, sharding=batch_sharding(mesh))

    def loss(params, tokens):
        return jnp.sum(jnp.square(definition.merge(params).hidden(tokens).hidden))

    with jax.set_mesh(mesh):
        text = text_of(jax.jit(jax.grad(loss)).lower(params, tokens).compile())
    gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", text)
    assert not [shape for shape in gathered if "37" in shape.split(",")], gathered
    assert "all-reduce" in text


def test_gradient_never_holds_all_states(small_config) -> None:
    """(batch 3, length 512, inner 38, state 7) has the unmistakable size 3 * 512 * 38 * 7."""
    config = small_config(d_model=19, mixer={"state_dim": 7})
    definition = parameters.define(config)
    tokens = jax.ShapeDtypeStruct((3, 512), jnp.int32)

    def loss(params, tokens):
        return jnp.sum(definition.merge(params)(tokens).logits)

    compiled = jax.jit(jax.grad(loss)).lower(definition.params, tokens).compile()
    sizes = [
        np.prod([int(dim) for dim in shape.split(",")]) for shape in re.findall(r"f32\[([\d,]+)\]", text_of(compiled))
    ]
    assert max(sizes) < 3 * 512 * 38 * 7 / 2


def test_program_size_does_not_grow_with_depth(small_config) -> None:
    lengths = []
    for layers in (2, 12):
        definition = parameters.define(small_config(num_layers=layers))
        tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
        lowered = jax.jit(lambda params, tokens, d=definition: d.merge(params)(tokens)).lower(definition.params, tokens)
        lengths.append(len(lowered.as_text().splitlines()))
    assert lengths[0] == lengths[1]
