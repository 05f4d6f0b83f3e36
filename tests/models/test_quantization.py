"""Weights in int8: how far they are from those they stand for, and that a model computes with them what it should."""

import dataclasses
import functools
import importlib.util
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import traverse_util

from mamba_jax.config import (
    AttentionConfig,
    Hybrid,
    Mamba1Config,
    Mamba2Config,
    MeshConfig,
    MlpConfig,
    ModelConfig,
    MoeConfig,
)
from mamba_jax.errors import InputError
from mamba_jax.models import parameters
from mamba_jax.models.loss import next_token_loss
from mamba_jax.models.state import init_state
from mamba_jax.models.storage.int8 import quantize
from mamba_jax.models.storage.matrix import LowRank, Quantized, columns_of, product_with
from mamba_jax.models.storage.per_layer import unstacked
from mamba_jax.sharding import make_mesh, parameter_sharding, put_batch
from pallas_kernels.common.ahead_of_time import compile_for, tpu_devices
from tests.models.conftest import small_config
from tests.programs import temporary_bytes

# The most that rounding adds to half a scale: of the scale, and of a quotient of 128, half an epsilon each.
ROUNDING = 128 * 2 * 2.0**-24
# Two orders of the same products in float32: a few roundings (6e-8) per layer, of logits of order 0.3.
SAME_MODEL = {"rtol": 1e-5, "atol": 1e-6}

STACKED = small_config()
PATTERN = Hybrid.of_pattern(
    "MSAFE",
    M=Mamba1Config(state_dim=4),
    S=Mamba2Config(state_dim=8, head_dim=8),
    A=AttentionConfig(num_heads=2),
    F=MlpConfig(hidden_dim=24),
    E=MoeConfig(num_experts=2, experts_per_token=1, hidden_dim=8),
)
EVERY_MIXER = dataclasses.replace(STACKED, mixer=PATTERN, num_layers=5, tie_embeddings=False)


def flat(params: Any) -> dict[str, Any]:
    return traverse_util.flatten_dict(params, sep="/")


@functools.cache
def build(config: ModelConfig) -> tuple[parameters.ModelDefinition, Any, Any]:
    """A model, its parameters with a token of zeros, and these in int8."""
    definition = parameters.define(config)

    @jax.jit
    def make(key: jax.Array) -> tuple[Any, Any]:
        params = parameters.init(config, key)
        params["embedding"]["table"] = params["embedding"]["table"].at[3].set(0)
        return params, quantize(definition, params)

    params, in_int8 = make(jax.random.key(0))
    return definition, params, in_int8


def dequantized(params: Any) -> Any:
    """The weights that integers and scales stand for, in float32."""

    def is_int8(leaf: Any) -> bool:
        return isinstance(leaf, qwix.QArray)

    return jax.tree.map(lambda leaf: qwix.dequantize(leaf) if is_int8(leaf) else leaf, params, is_leaf=is_int8)


def apply(config: ModelConfig, params: Any, tokens: jax.Array) -> jax.Array:
    return jax.jit(lambda params: parameters.define(config).merge(params)(tokens).logits)(params)


def tokens_of(config: ModelConfig) -> jax.Array:
    return jax.random.randint(jax.random.key(1), (2, 9), 0, config.vocab_size)


@pytest.mark.parametrize(
    "config", [STACKED, pytest.param(EVERY_MIXER, marks=pytest.mark.slow)], ids=["stacked", "every mixer"]
)
def test_every_weight_is_within_half_a_step(config: ModelConfig) -> None:
    definition, params, in_int8 = build(config)
    dims = flat(definition.summed)
    rounded = {name: leaf for name, leaf in flat(in_int8).items() if isinstance(leaf, Quantized)}
    assert rounded.keys() == {name for name, dim in dims.items() if dim is not None}
    for name, weights in flat(params).items():
        if name not in rounded:
            np.testing.assert_array_equal(flat(in_int8)[name], weights)
            continue
        found = rounded[name]
        largest = jnp.max(jnp.abs(weights), axis=dims[name], keepdims=True)
        expected = np.where(largest > 0, largest / 127.5, 1)
        np.testing.assert_allclose(found.scale, expected, rtol=2.0**-23, atol=0, err_msg=name)
        error = np.abs(np.asarray(weights, np.float64) - np.asarray(found.qvalue, np.float64) * found.scale)
        assert np.all(error <= (0.5 + ROUNDING) * np.asarray(found.scale)), name
        # The largest of a channel takes an end of the range.
        assert np.all((np.abs(np.asarray(found.qvalue, int)).max(dims[name], keepdims=True) >= 127) | (largest == 0))


def test_which_matrices_are_in_int8() -> None:
    """Those that projections, the embedding and the head read; what has another shape or use is left as it is."""
    _, _, in_int8 = build(EVERY_MIXER)
    rounded = {name for name, leaf in flat(in_int8).items() if isinstance(leaf, Quantized)}
    of_mixers = {
        "layers_0": ("in_proj", "x_proj", "dt_proj", "out_proj"),
        "layers_1": ("in_proj", "BC_proj", "dt_proj", "out_proj"),
        "layers_2": ("q_proj", "k_proj", "v_proj", "out_proj"),
        "layers_3": ("up_proj", "down_proj"),
    }
    expected = {f"{stack}/mixer/{name}/kernel" for stack, names in of_mixers.items() for name in names}
    assert rounded == expected | {"embedding/table", "lm_head/table"}


@pytest.mark.parametrize(
    "config", [STACKED, pytest.param(EVERY_MIXER, marks=pytest.mark.slow)], ids=["stacked", "every mixer"]
)
def test_a_model_computes_with_the_weights_that_are_meant(config: ModelConfig) -> None:
    """The logits are those of the weights that integers and scales stand for, at once and one token at a time."""
    definition, params, in_int8 = build(config)
    tokens = tokens_of(config)
    logits = apply(config, in_int8, tokens)
    np.testing.assert_allclose(logits, apply(config, dequantized(in_int8), tokens), **SAME_MODEL)
    assert jnp.max(jnp.abs(logits - apply(config, params, tokens))) > 1e-3

    @jax.jit
    def decode(params: Any) -> jax.Array:
        def step(state: Any, token_B: jax.Array) -> tuple[Any, jax.Array]:
            output = definition.merge(params)(token_B[:, None], state)
            return output.state, output.logits[:, 0]

        state = init_state(config, 2, max_length=tokens.shape[1])
        return jax.lax.scan(step, {name: unstacked(part) for name, part in state.items()}, tokens.T)[1]

    found = decode(definition.unstacked(in_int8))
    np.testing.assert_allclose(found.swapaxes(0, 1), logits, **SAME_MODEL)


def test_ids_outside_the_table_are_loud() -> None:
    _, _, in_int8 = build(STACKED)
    tokens = jnp.asarray([[1, -1], [1, STACKED.padded_vocab_size]])
    is_finite = jnp.isfinite(apply(STACKED, in_int8, tokens)).all(axis=-1)
    np.testing.assert_array_equal(is_finite, [[True, False]] * 2)


@pytest.mark.parametrize("config", [STACKED, EVERY_MIXER], ids=["tied", "a head of its own"])
def test_loss_of_a_head_in_int8(config: ModelConfig) -> None:
    definition, _, in_int8 = build(config)
    hidden = jax.random.normal(jax.random.key(2), (2, 9, config.d_model))
    targets = tokens_of(config)

    def loss(params: Any) -> jax.Array:
        how = {"normalizer": jnp.float32(18), "z_loss": 0.0, "chunk": 4}
        return next_token_loss(hidden, definition.merge(params).head, targets, targets >= 0, **how).loss

    # A mean of logarithms of about log 32 each.
    np.testing.assert_allclose(jax.jit(loss)(in_int8), jax.jit(loss)(dequantized(in_int8)), rtol=2e-6)


def test_integers_are_multiplied_exactly_in_bfloat16() -> None:
    """Factors in bfloat16, sums and scales in float32: one rounding of the result, which is all there is."""
    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.standard_normal((256, 2, 8)), jnp.float32)
    kernel = qwix.quantize(weights, jnp.int8, channelwise_axes=(1, 2))
    x = jnp.asarray(rng.standard_normal((1, 3, 256)), jnp.bfloat16)
    found = product_with(x, kernel, dtype="bfloat16")
    assert found.dtype == jnp.bfloat16
    integers, scale = np.asarray(kernel.qvalue, np.float64), np.asarray(kernel.scale, np.float64)
    products = np.asarray(x, np.float64)[..., None, None] * (integers * scale)
    exact, magnitude = products.sum(axis=2), np.abs(products).sum(axis=2)
    # Half an epsilon of bfloat16 (2^-7) of the result, and 8 roundings of float32 in each order of 256 sums.
    assert np.all(np.abs(np.asarray(found, np.float64) - exact) <= 2.0**-8 * np.abs(exact) + 8 * 2.0**-24 * magnitude)


def test_products_with_parts_of_a_matrix_are_parts_of_the_product() -> None:
    rng = np.random.default_rng(0)
    weights, lora_a, lora_b, x = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((16, 2, 8), (16, 4), (4, 2, 8), (1, 3, 16))
    )
    integers = qwix.quantize(weights, jnp.int8, channelwise_axes=(1, 2))
    adapted = LowRank(base=integers, lora_a=lora_a, lora_b=lora_b, scale=0.5)
    for kernel in (weights, integers, adapted):
        whole = product_with(x, kernel, dtype="float32")
        for index in range(2):
            part = product_with(x, columns_of(kernel, index), dtype="float32")
            np.testing.assert_allclose(part, whole[:, :, index], rtol=1e-5, atol=1e-5)


def test_parameters_over_devices() -> None:
    """Integers are split as the weights were that they were made of."""
    definition, params, in_int8 = build(STACKED)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shardings = jax.tree.map(
        lambda leaf, axes: parameter_sharding(mesh, leaf.shape, axes, name=""), definition.params, definition.axes
    )
    with jax.set_mesh(mesh):
        split = jax.jit(functools.partial(quantize, definition))(jax.device_put(params, shardings))
        tokens = put_batch(mesh, np.tile(tokens_of(STACKED), (2, 1)))
        logits = jax.jit(lambda params, tokens: definition.merge(params)(tokens).logits)(split, tokens)
    kernel = split["layers"]["mixer"]["in_proj"]["kernel"].qvalue
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    jax.tree.map(np.testing.assert_array_equal, split, in_int8)
    np.testing.assert_allclose(logits[:2], apply(STACKED, in_int8, tokens_of(STACKED)), **SAME_MODEL)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed")
def test_a_loop_over_tokens_reads_bytes() -> None:
    """No compiler moves the conversion of the weights out of the loop, which would keep them in bfloat16 again."""
    size = 1024

    def decode(x: jax.Array, kernels: tuple[Any, ...]) -> jax.Array:
        def step(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            for kernel in kernels:
                x = jax.nn.silu(product_with(x, kernel, dtype="bfloat16"))
            return x, None

        return jax.lax.scan(step, x, None, length=16)[0]

    matrix = jax.eval_shape(
        functools.partial(qwix.quantize, qtype=jnp.int8, channelwise_axes=(1,)), jnp.zeros((size, size))
    )
    x = jax.ShapeDtypeStruct((1, size), jnp.bfloat16)
    compiled = compile_for(tpu_devices("v5e:1x1")[0], decode, x, (matrix,) * 4)
    assert temporary_bytes(compiled) < 2 * size * size


@pytest.mark.parametrize("mixer", [Mamba1Config(state_dim=4), Mamba2Config(state_dim=8, head_dim=8)])
def test_one_operation_a_token_reads_integers(mixer: Any) -> None:
    """A block that is one operation gives what its layers give one by one, on the same integers and scales."""
    configs = [
        dataclasses.replace(STACKED, mixer=dataclasses.replace(mixer, step_implementation=name))
        for name in ("layers", "xla")
    ]
    _, _, in_int8 = build(configs[0])
    logits = []
    for config in configs:
        model = parameters.define(config).merge(in_int8)
        state, given = init_state(config, 2), tokens_of(config)[:, :3]
        for token in range(given.shape[1]):
            output = model(given[:, token : token + 1], state=state)
            state = output.state
            logits.append(output.logits)
    assert jnp.abs(logits[2]).max() > 0.01
    np.testing.assert_allclose(logits[3:], logits[:3], **SAME_MODEL)


def test_integers_lie_by_columns_for_kernels_that_read_them_so() -> None:
    config = dataclasses.replace(STACKED, mixer=Mamba1Config(state_dim=4, step_implementation="triton"))
    definition, _, in_int8 = build(config)
    kernel = definition.unstacked(in_int8)["layers"]["mixer"]["in_proj"]["kernel"]
    for index, array in enumerate(kernel.qvalue.arrays):
        assert array.dtype == jnp.int8
        assert array.format.layout.major_to_minor == (1, 2, 0)
        np.testing.assert_array_equal(array, in_int8["layers"]["mixer"]["in_proj"]["kernel"].qvalue[index])


def test_outside_of_a_program() -> None:
    """Array by array; what is not in int8 is not copied."""
    definition, params, in_int8 = build(STACKED)
    found = quantize(definition, params)
    assert found["layers"]["norm"]["scale"] is params["layers"]["norm"]["scale"]
    jax.tree.map(np.testing.assert_array_equal, found, in_int8)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    definition, params, in_int8 = build(STACKED)
    with pytest.raises(InputError, match="in int8 already"):
        quantize(definition, in_int8)
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(InputError, match=r"pip install 'mamba-jax\[int8\]'") as error:
        quantize(definition, params)
    assert "\n" not in str(error.value)
