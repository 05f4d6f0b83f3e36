"""Layers that act on every token alone, against other implementations in float64."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from mamba_jax.config import MlpConfig
from mamba_jax.errors import InputError
from mamba_jax.models.mixers.mlp.mixer import Mlp

GOLDEN = Path(__file__).parents[1] / "golden" / "layers"
# Rounded to float32 are inputs, weights, every product and every partial sum of two sums over up to 24 terms, the
# activation between them (a few units) and, in gradients, a third sum: some 100 roundings that each are at most 2^-24
# of the largest value of their array, which the factor 2 stands for, since sums may exceed their result.
ROUNDING = 2 * 100 * 2.0**-24


def with_params(mixer: Any, params: dict[str, Any]) -> tuple[Any, Callable[[Any, Any], Any]]:
    """The parameters in float32 as the mixer holds them, and a function (parameters, u) -> output of `advance`."""
    graph, state = nnx.split(mixer)
    nnx.replace_by_pure_dict(state, jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), params))

    def run(params: Any, u: Any) -> Any:
        return nnx.merge(graph, params).advance(u)

    return state, run


def assert_close(actual: Any, expected: np.ndarray, bound: float = ROUNDING) -> None:
    assert np.shape(actual) == expected.shape
    assert np.max(np.abs(np.asarray(actual, np.float64) - expected)) < bound * np.max(np.abs(expected))


def test_the_gated_layer_is_that_of_transformers() -> None:
    golden = load_file(GOLDEN / "swiglu_mlp.safetensors")
    up = np.stack([golden["in.gate_proj"].T, golden["in.up_proj"].T], axis=1)
    params = {"up_proj": {"kernel": up}, "down_proj": {"kernel": golden["in.down_proj"].T}}
    state, run = with_params(Mlp(MlpConfig(hidden_dim=20), d_model=12, rngs=nnx.Rngs(0)), params)
    u, projection = (jnp.asarray(golden[name], jnp.float32) for name in ("in.x", "proj.y"))

    def loss(params: Any, u: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = run(params, u).y
        return jnp.vdot(y, projection), y

    (gradient, du), y = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(state, u)
    assert_close(y, golden["out.y"])
    assert_close(du, golden["grad.x"])
    gradient = nnx.to_pure_dict(gradient)
    dup = np.stack([golden["grad.gate_proj"].T, golden["grad.up_proj"].T], axis=1)
    assert_close(gradient["up_proj"]["kernel"], dup)
    assert_close(gradient["down_proj"]["kernel"], golden["grad.down_proj"].T)


ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu_squared": lambda x: np.maximum(x, 0) ** 2,
}


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_biases(activation: Any, gated: bool) -> None:
    config = MlpConfig(activation=activation, gated=gated, use_bias=True, hidden_dim=9)
    rng = np.random.default_rng(0)
    shapes = {"up_proj": ((7, config.halves, 9), (config.halves, 9)), "down_proj": ((9, 7), (7,))}
    params: dict[str, Any] = {
        name: {"kernel": rng.normal(size=kernel), "bias": rng.normal(size=bias)}
        for name, (kernel, bias) in shapes.items()
    }
    u = rng.normal(size=(2, 3, 7))
    up, down = params["up_proj"], params["down_proj"]
    projected = np.einsum("bld,dpe->blpe", u, up["kernel"]) + up["bias"]
    inner = ACTIVATIONS[activation](projected[:, :, 0]) * (projected[:, :, 1] if gated else 1)
    mixer = Mlp(config, d_model=7, rngs=nnx.Rngs(0))
    state, run = with_params(mixer, params)
    output = run(state, jnp.asarray(u, jnp.float32))
    assert_close(output.y, inner @ down["kernel"] + down["bias"])
    assert output.state == ()


@pytest.mark.parametrize(
    ("fields", "channels"),
    [({}, 2048), ({"gated": False}, 3072), ({"hidden_dim": 7}, 7), ({"hidden_multiple": 1000}, 3000)],
)
def test_width(fields: dict[str, Any], channels: int) -> None:
    config = MlpConfig(**fields)
    assert config.channels(768) == channels
    assert MlpConfig(**fields | {"hidden_dim": channels}).decisive(768) == config.decisive(768)


@pytest.mark.parametrize("fields", [{"hidden_dim": 0}, {"hidden_multiple": 0}])
def test_sizes_must_be_positive(fields: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"MlpConfig.{next(iter(fields))} must be positive, got 0"):
        MlpConfig(**fields)


@pytest.mark.usefixtures("only_our_checks")
def test_an_activation_that_is_not_known_is_refused() -> None:
    wrong: Any = "tanh"
    with pytest.raises(InputError, match=r"MlpConfig.activation: Input should be 'silu', .* got 'tanh'"):
        MlpConfig(activation=wrong)


def test_output_is_in_the_compute_dtype() -> None:
    mixer = Mlp(d_model=16, compute_dtype="bfloat16", rngs=nnx.Rngs(0))
    assert jax.eval_shape(mixer, jnp.zeros((1, 2, 16))).dtype == jnp.bfloat16
