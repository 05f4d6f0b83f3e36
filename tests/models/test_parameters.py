"""Parameter counts, names, metadata and initial distributions."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from mamba_jax.config import Mamba2Config, ModelConfig
from mamba_jax.models import parameters
from mamba_jax.sharding import Axis


@pytest.mark.parametrize(
    ("layers", "width", "expected"),
    [
        (24, 768, 129_135_360),
        (48, 1024, 371_516_416),
        (48, 1536, 793_204_224),
        (48, 2048, 1_372_178_432),
        (64, 2560, 2_768_345_600),
    ],
)
def test_published_sizes_have_the_published_parameter_counts(layers: int, width: int, expected: int) -> None:
    assert parameters.count(ModelConfig(vocab_size=50277, d_model=width, num_layers=layers)) == expected


def test_every_parameter_has_axes_and_a_decay_role(small_config) -> None:
    definition = parameters.define(small_config(tie_embeddings=False, mixer={"use_bias": True}))
    shapes: dict[str, Any] = traverse_util.flatten_dict(definition.params, sep="/")
    axes: dict[str, Any] = traverse_util.flatten_dict(definition.axes, sep="/")
    decay = traverse_util.flatten_dict(definition.decay, sep="/")
    assert shapes.keys() == axes.keys() == decay.keys()
    for name, leaf in shapes.items():
        assert len(axes[name]) == len(leaf.shape), name
        assert (axes[name][0] == Axis.LAYERS) == name.startswith("layers/"), name
        is_matrix = name.endswith(("kernel", "conv1d/weight", "table"))
        assert decay[name] == is_matrix, name


def test_init_matches_the_definition_and_depends_on_the_key(small_config) -> None:
    config = small_config()
    first, second = (jax.jit(lambda key: parameters.init(config, key))(jax.random.key(seed)) for seed in (0, 1))
    definition = parameters.define(config)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), first) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), definition.params
    )
    kernel = first["layers"]["mixer"]["in_proj"]["kernel"]
    assert not np.array_equal(kernel, second["layers"]["mixer"]["in_proj"]["kernel"])
    assert not np.array_equal(kernel[0], kernel[1]), "layers must not share their initial values"


def test_initial_distributions(small_config) -> None:
    config = small_config(d_model=128, num_layers=4, vocab_size=1000)
    params = parameters.init(config, jax.random.key(0))
    mixer = params["layers"]["mixer"]
    dt = np.asarray(jax.nn.softplus(mixer["dt_proj"]["bias"]))
    # softplus inverts the initialiser to float32 rounding of a value that is at least 1e-3.
    assert dt.min() >= 1e-3 * (1 - 1e-5)
    assert dt.max() <= 0.1 * (1 + 1e-5)
    # 1024 draws: the mean of log dt has a standard error of log(100) / sqrt(12 * 1024) = 0.042.
    assert abs(np.log(dt).mean() - np.log(1e-2)) < 4 * 0.042
    np.testing.assert_allclose(-np.exp(mixer["A_log"][0, 0]), -np.arange(1, 5), rtol=1e-6)
    np.testing.assert_array_equal(mixer["D"], 1)
    for name, fan_in, scale in (("in_proj", 128, 1.0), ("x_proj", 256, 1.0), ("out_proj", 256, 0.5)):
        largest = np.abs(mixer[name]["kernel"]).max()
        bound = scale / np.sqrt(fan_in)
        assert 0.99 * bound < largest <= bound, name
    assert np.abs(mixer["dt_proj"]["kernel"]).max() <= 8**-0.5
    assert np.abs(mixer["conv1d"]["weight"]).max() <= 0.5
    # 128,000 draws: the standard deviation is within 4 / sqrt(2 * 128000) = 0.8 % of its value.
    assert abs(np.asarray(params["embedding"]["table"]).std() / 0.02 - 1) < 0.008


@pytest.mark.parametrize(("kind", "expected"), [("constant", -0.5), ("random", None)])
def test_other_initial_decays(small_config, kind: str, expected: float | None) -> None:
    params = parameters.init(small_config(mixer={"a_init": kind}), jax.random.key(0))
    A = -np.exp(np.asarray(params["layers"]["mixer"]["A_log"]))
    assert (A < 0).all()
    if expected is not None:
        np.testing.assert_allclose(A, expected, rtol=1e-6)
    else:
        assert A.std() > 0.1


def test_merge_puts_every_value_in_its_place(small_config) -> None:
    definition = parameters.define(small_config())
    leaves, tree = jax.tree.flatten(definition.params)
    numbered = jax.tree.unflatten(tree, [jnp.full(leaf.shape, i, leaf.dtype) for i, leaf in enumerate(leaves)])
    model: Any = definition.merge(numbered)
    order = {path: i for i, path in enumerate(traverse_util.flatten_dict(definition.params, sep="/"))}
    assert model.norm_f.scale[...][0] == order["norm_f/scale"]
    assert model.layers.mixer.out_proj.kernel[...][0, 0, 0] == order["layers/mixer/out_proj/kernel"]


def test_matrices_lie_by_columns_for_kernels_that_read_them_so(small_config) -> None:
    mixer = Mamba2Config(state_dim=4, head_dim=8, step_implementation="triton")
    definition = parameters.define(dataclasses.replace(small_config(), mixer=mixer))
    drawn = jax.tree.map(lambda leaf: jnp.arange(leaf.size).reshape(leaf.shape).astype(leaf.dtype), definition.params)
    params: Any = definition.unstacked(drawn)
    place = jax.tree.leaves(drawn)[0].sharding
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), params)
    told: Any = definition.unstacked(shapes)
    names = {"in_proj": (1, 2, 0), "BC_proj": (1, 2, 3, 0), "dt_proj": (1, 0), "out_proj": (1, 0)}
    for name, order in names.items():
        leaf = params["layers"]["mixer"][name]["kernel"]
        for index, array in enumerate(leaf.arrays):
            shape = told["layers"]["mixer"][name]["kernel"].arrays[index]
            assert array.format.layout.major_to_minor == shape.format.layout.major_to_minor == order
            np.testing.assert_array_equal(array, drawn["layers"]["mixer"][name]["kernel"][index])
    assert params["layers"]["mixer"]["conv1d"]["weight"].arrays[0].format.layout.major_to_minor == (0, 1)
