"""Low-rank adapters: the same as those of `qwix`, one for each layer, and gone without a trace once they are merged."""

import dataclasses
import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx, traverse_util

from mamba_jax.config import AttentionConfig, Hybrid, LoraConfig, Mamba2Config, MlpConfig, ModelConfig
from mamba_jax.errors import InputError
from mamba_jax.models import parameters
from mamba_jax.models.layers import projection
from mamba_jax.models.mixers import RGLRUConfig, SharedBlockConfig, WithSharedConfig
from mamba_jax.models.mixers.declaration import Setting
from mamba_jax.models.storage.low_rank import adapted, merged, with_new_adapters, without_adapters
from mamba_jax.models.storage.matrix import LowRank
from tests.models.conftest import small_config

LORA = LoraConfig(rank=3, alpha=6.0)
MAMBA1 = small_config(num_layers=3)
SSD = Mamba2Config(state_dim=8, head_dim=8)
SHARED = SharedBlockConfig(name="block", attention=AttentionConfig(num_heads=2), mlp=MlpConfig(hidden_dim=8))
HYBRID = dataclasses.replace(
    MAMBA1,
    num_layers=6,
    tie_embeddings=False,
    mixer=Hybrid.of_pattern(
        "SASFRW",
        S=SSD,
        A=AttentionConfig(num_heads=2),
        F=MlpConfig(hidden_dim=24),
        R=RGLRUConfig(num_heads=2),
        W=WithSharedConfig(inner=SSD, shared=SHARED, adapter_rank=2),
    ),
)


@functools.cache
def build(config: ModelConfig, lora: LoraConfig = LORA) -> tuple[parameters.ModelDefinition, Any, Any]:
    """The adapted model, its parameters without adapters and with new ones."""
    definition = adapted(parameters.define(config), lora)
    params = jax.jit(parameters.init, static_argnums=0)(config, jax.random.key(0))
    return definition, params, with_new_adapters(definition, params, lora, jax.random.key(1))


def adapters_of(params: Any) -> dict[str, LowRank]:
    flat = traverse_util.flatten_dict(params, sep="/")
    return {path: leaf for path, leaf in flat.items() if isinstance(leaf, LowRank)}


def trained(params: Any) -> Any:
    """As after some training: B is no longer zero."""
    keys = iter(jax.random.split(jax.random.key(2), 100))

    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, LowRank):
            return leaf
        return dataclasses.replace(leaf, lora_b=0.1 * jax.random.normal(next(keys), leaf.lora_b.shape))

    return jax.tree.map(moved, params, is_leaf=lambda leaf: isinstance(leaf, LowRank))


def logits(definition: parameters.ModelDefinition, params: Any) -> np.ndarray:
    tokens = np.random.default_rng(0).integers(0, 29, (2, 7)).astype(np.int32)
    return np.asarray(jax.jit(lambda params: definition.merge(params)(tokens).logits)(params))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what the library calls in Flax
def test_a_product_is_that_of_the_library() -> None:
    setting = Setting(d_model=8, param_dtype="float32", compute_dtype="float32", output_scale=1.0)
    layer = projection(setting, (8, 2, 5), (None, None, None), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 3, 8))
    provider = qwix.LoraProvider(module_path=".*", rank=3, alpha=6.0)
    theirs: Any = qwix.apply_lora_to_model(layer, provider, x, rngs=nnx.Rngs(1))
    lora_a = theirs.kernel_lora_a[...]
    lora_b = jax.random.normal(jax.random.key(2), theirs.kernel_lora_b.shape)
    theirs.kernel_lora_b = nnx.LoRAParam(lora_b)
    plain = layer(x)
    layer.kernel.set_value(LowRank(base=layer.kernel[...], lora_a=lora_a, lora_b=lora_b.reshape(3, 2, 5), scale=2.0))
    # Sums of 8 and of 3 products in another order: a few roundings of values of order 1.
    np.testing.assert_allclose(layer(x), theirs(x), rtol=1e-5, atol=2e-6)
    assert np.abs(layer(x) - plain).max() > 0.1


def test_every_projection_of_every_block_has_an_adapter_unless_targets_say_otherwise() -> None:
    names = {path.removesuffix("/kernel") for path in adapters_of(build(MAMBA1)[2])}
    assert names == {f"layers/mixer/{name}" for name in ("in_proj", "x_proj", "dt_proj", "out_proj")}
    names = {path.partition("/")[2].removesuffix("/kernel") for path in adapters_of(build(HYBRID)[2])}
    assert names == {
        *(f"mixer/{name}" for name in ("in_proj", "BC_proj", "dt_proj", "out_proj")),  # Mamba-2
        *(f"mixer/{name}_proj" for name in "qkv"),
        *("mixer/up_proj", "mixer/down_proj"),
        *(f"mixer/inner/{name}" for name in ("in_proj", "BC_proj", "dt_proj", "out_proj")),
        *("mixer/linear", "mixer/adapter_down", "mixer/adapter_up"),
        *(f"attention/{name}_proj" for name in ("q", "k", "v", "out")),
        *("mlp/up_proj", "mlp/down_proj"),
    }
    some = adapters_of(build(MAMBA1, dataclasses.replace(LORA, targets=("out_proj", "x_p")))[2])
    assert some.keys() == {"layers/mixer/out_proj/kernel", "layers/mixer/x_proj/kernel"}


def test_a_new_adapter_is_drawn_for_each_layer_and_changes_nothing() -> None:
    definition, params, fresh = build(MAMBA1)
    for path, leaf in adapters_of(fresh).items():
        base: Any = traverse_util.flatten_dict(params, sep="/")[path]
        assert leaf.lora_a.shape == (3, base.shape[1], 3), path
        assert leaf.lora_b.shape == (3, 3, *base.shape[2:]), path
        assert not leaf.lora_b.any()
        assert leaf.scale == 2.0
        bound = (6 / base.shape[1]) ** 0.5
        values = np.abs(np.asarray(leaf.lora_a))
        # The largest of n uniform values is below 0.7 of the bound with probability 0.7^n, 3e-7 for the fewest, 3 x 14.
        assert values.max() <= bound
        if base.shape[1] > 2:
            assert values.reshape(3, -1).max(axis=1).min() > 0.7 * bound, path
        assert not np.array_equal(leaf.lora_a[0], leaf.lora_a[1])
    np.testing.assert_array_equal(logits(definition, fresh), logits(parameters.define(MAMBA1), params))
    jax.tree.map(np.testing.assert_array_equal, merged(fresh), params)
    jax.tree.map(np.testing.assert_array_equal, without_adapters(trained(fresh)), params)
    assert parameters.size(parameters.chosen(definition.trained, fresh)) == sum(
        leaf.lora_a.size + leaf.lora_b.size for leaf in adapters_of(fresh).values()
    )


@pytest.mark.parametrize("config", [MAMBA1, HYBRID], ids=["mamba1", "hybrid"])
def test_merged_is_the_same_model(config: ModelConfig) -> None:
    definition, params, fresh = build(config)
    adapters = trained(fresh)
    plain = parameters.define(config)
    found = logits(plain, merged(adapters))
    # Other orders of the same products in float32: a few roundings (6e-8) a layer, of logits of order 1.
    np.testing.assert_allclose(logits(definition, adapters), found, rtol=1e-5, atol=3e-6)
    assert np.abs(found - logits(plain, params)).max() > 1e-2


def test_a_target_that_is_in_no_projection_is_refused() -> None:
    with pytest.raises(InputError) as error:
        adapted(parameters.define(MAMBA1), LoraConfig(rank=1, targets=("in_proj", "q_proj")))
    names = ", ".join(f"layers/mixer/{name}" for name in ("dt_proj", "in_proj", "out_proj", "x_proj"))
    assert str(error.value) == f"lora.targets: 'q_proj' is found in no projection of this model, which has {names}"
    with pytest.raises(InputError, match=r"^LoraConfig.targets: '\[' is not a regular expression \(.*\)$"):
        LoraConfig(rank=1, targets=("[",))


def test_without_the_library_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    definition, params, _ = build(MAMBA1)
    monkeypatch.setitem(sys.modules, "qwix", None)
    message = r"^low-rank adapters need the package qwix: pip install 'mamba-jax\[lora\]'$"
    with pytest.raises(InputError, match=message):
        with_new_adapters(definition, params, LORA, jax.random.key(0))


def test_products_stay_in_the_compute_dtype() -> None:
    config = dataclasses.replace(MAMBA1, compute_dtype="bfloat16")
    definition, _, fresh = build(config)
    text = (
        jax.jit(lambda params, ids: definition.merge(params).hidden(ids).hidden)
        .lower(fresh, jnp.zeros((1, 4), jnp.int32))
        .as_text()
    )
    products = [line for line in text.splitlines() if "dot_general" in line and "x3xbf16" in line]
    assert products
    assert not any("x3xf32" in line and "dot_general" in line for line in text.splitlines())
