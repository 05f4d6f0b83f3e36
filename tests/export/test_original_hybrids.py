"""The authors' layout with attention and MLPs, against its definition written out in numpy, and exact round trips."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from mamba_jax.config import Mamba1Config, Mamba2Config, ModelConfig
from mamba_jax.errors import InputError
from mamba_jax.export import huggingface
from mamba_jax.export import published_config as configs
from mamba_jax.models import parameters
from mamba_jax.models.config import Hybrid
from mamba_jax.models.mixers import AttentionConfig, MlpConfig
from mamba_jax.models.mixers.declaration import MixerConfig
from tests.export.conftest import random_model

ATTENTION = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6, rotary_dims=4, rope_theta=100.0, conv_width=3)
MLP = MlpConfig(hidden_dim=128)


def hybrid(mixers: list[MixerConfig], **changes: Any) -> tuple[ModelConfig, Any]:
    """A small model of these blocks with random weights, biases among them."""
    options = {"vocab_size": 31, "d_model": 8, "num_layers": len(mixers), "tie_embeddings": True} | changes
    config, params = random_model(mixer=Hybrid.of_blocks(mixers), **options)
    rng = np.random.default_rng(0)
    # Biases and scales start at 0 and 1, where they could be mixed up.
    return config, jax.tree.map(lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape, leaf.dtype), params)


def rms_norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5) * scale


def attention(w: dict[str, np.ndarray], u: np.ndarray, given: dict[str, Any]) -> np.ndarray:
    """The authors' attention of one sequence (L, D), from the tensors of a layer and `attn_cfg`."""
    length, channels, heads, shared = len(u), given["head_dim"], given["num_heads"], given["num_heads_kv"]
    joined = u @ w["in_proj.weight"].T + w.get("in_proj.bias", 0.0)
    taps = given["d_conv"]
    padded = np.concatenate([np.zeros((taps - 1, joined.shape[1])), joined])
    joined = sum(padded[tap : tap + length] * w["conv1d.weight"][:, 0, tap] for tap in range(taps)) + w["conv1d.bias"]
    q, k, v = np.split(joined, [heads * channels, (heads + shared) * channels], axis=1)
    pairs = given["rotary_emb_dim"] // 2
    angle = np.arange(length)[:, None] * given["rotary_emb_base"] ** (-np.arange(pairs) / pairs)
    cos, sin = np.cos(angle), np.sin(angle)
    y = np.zeros((length, heads, channels))
    for head in range(heads):
        mine = head // (heads // shared)
        one, other, value = (
            x[:, number * channels : (number + 1) * channels].copy() for x, number in ((q, head), (k, mine), (v, mine))
        )
        for x in (one, other):
            first, second = x[:, :pairs].copy(), x[:, pairs : 2 * pairs].copy()
            x[:, :pairs], x[:, pairs : 2 * pairs] = first * cos - second * sin, second * cos + first * sin
        for token in range(length):
            score = other[: token + 1] @ one[token] / np.sqrt(channels)
            weight = np.exp(score - score.max())
            y[token, head] = weight @ value[: token + 1] / weight.sum()
    return y.reshape(length, -1) @ w["out_proj.weight"].T + w.get("out_proj.bias", 0.0)


def mlp(w: dict[str, np.ndarray], u: np.ndarray) -> np.ndarray:
    value, gate = np.split(u @ w["fc1.weight"].T, 2, axis=1)
    return (value * gate / (1 + np.exp(-gate))) @ w["fc2.weight"].T


def forward(folder: Path, ids: np.ndarray) -> np.ndarray:
    """Logits of one sequence in float64, of a folder whose layers are all attention and an MLP."""
    content = json.loads((folder / "config.json").read_text())
    weights = {name: array.astype(np.float64) for name, array in load_file(folder / "model.safetensors").items()}
    assert content["attn_layer_idx"] == list(range(content["n_layer"]))

    def of(prefix: str) -> dict[str, np.ndarray]:
        return {name.removeprefix(prefix): array for name, array in weights.items() if name.startswith(prefix)}

    x = weights["backbone.embedding.weight"][ids]
    for layer in range(content["n_layer"]):
        own = of(f"backbone.layers.{layer}.")
        prefix = f"backbone.layers.{layer}."
        x = x + attention(of(f"{prefix}mixer."), rms_norm(x, own["norm.weight"]), content["attn_cfg"])
        x = x + mlp(of(f"{prefix}mlp."), rms_norm(x, own["norm2.weight"]))
    return rms_norm(x, weights["backbone.norm_f.weight"]) @ weights["lm_head.weight"].T


@pytest.mark.parametrize("has_bias", [False, True])
def test_attention_and_mlp_are_those_of_the_layout(tmp_path: Path, has_bias: bool) -> None:
    mixer = dataclasses.replace(ATTENTION, use_qkv_bias=has_bias, use_output_bias=has_bias)
    config, params = hybrid([mixer, MLP] * 2)
    huggingface.save(tmp_path / "model", config, params, layout="original")
    ids = np.random.default_rng(1).integers(0, 31, 9)
    loaded = huggingface.load(tmp_path / "model")
    definition = parameters.define(loaded.config)
    logits = jax.jit(lambda params: definition.merge(params)(jnp.asarray(ids)[None]).logits[0])(loaded.params)
    expected = forward(tmp_path / "model", ids)
    # Four blocks of some twenty float32 roundings of 6e-8 each.
    np.testing.assert_allclose(logits, expected, rtol=0, atol=5e-6 * np.abs(expected).max())


MAMBA1 = Mamba1Config(state_dim=3, dt_rank=2, use_bias=True)
MAMBA2 = Mamba2Config(state_dim=4, head_dim=4, num_groups=2, ssm_dim=8, skip="channel")
PLAIN = AttentionConfig(num_heads=2, rotary_dims=0)
MODELS: dict[str, list[MixerConfig]] = {
    "attention among Mamba-2": [MAMBA2, MAMBA2, ATTENTION, MAMBA2],
    "attention among Mamba-1, with MLPs": [MAMBA1, MLP, PLAIN, MLP, MAMBA1, MLP],
    "Mamba-2 and MLPs": [MAMBA2, MLP, MAMBA2, MLP],
    "attention alone": [PLAIN, PLAIN],
}


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_exact(tmp_path: Path, name: str) -> None:
    config, params = hybrid(MODELS[name], tie_embeddings=False)
    huggingface.save(tmp_path / "model", config, params, layout="original")
    loaded = huggingface.load(tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    for ours, theirs in zip(config.stacks, loaded.config.stacks, strict=True):
        assert ours.mixer.decisive(8) == theirs.mixer.decisive(8)
    huggingface.save(tmp_path / "again", loaded.config, loaded.params, layout="original")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "model" / file).read_bytes()


def test_the_published_hybrid(tmp_path: Path) -> None:
    """The keys of mamba2attn-2.7b."""
    attn_cfg = {"causal": True, "d_conv": 4, "head_dim": 128, "num_heads": 30, "out_proj_bias": False}
    attn_cfg |= {"qkv_proj_bias": False, "rotary_emb_dim": 64}
    content = {"d_model": 2560, "d_intermediate": 0, "n_layer": 64, "vocab_size": 50277, "ssm_cfg": {"layer": "Mamba2"}}
    content |= {"attn_layer_idx": [9, 18, 27, 36, 45, 56], "attn_cfg": attn_cfg, "rms_norm": True}
    content |= {"residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 16, "tie_embeddings": True}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    read = configs.read(path)
    blocks = [stack.mixer for unit in read.config.units for _ in range(unit[0].repeats) for stack in unit]
    with_attention = [number for number, mixer in enumerate(blocks) if isinstance(mixer, AttentionConfig)]
    assert with_attention == content["attn_layer_idx"]
    tensors = [tensor for given in read.format.tensors(read.config).values() for tensor in given]
    shapes = {name: tensor.shape for tensor in tensors for name in tensor.names()}
    assert shapes["backbone.layers.9.mixer.in_proj.weight"] == (11520, 2560)
    assert shapes["backbone.layers.9.mixer.conv1d.weight"] == (11520, 1, 4)
    assert shapes["backbone.layers.56.mixer.conv1d.bias"] == (11520,)
    assert shapes["backbone.layers.45.mixer.out_proj.weight"] == (2560, 3840)
    assert shapes["backbone.layers.10.mixer.in_proj.weight"] == (2 * 5120 + 2 * 128 + 80, 2560)
    assert read.config.padded_vocab_size == 50288
    assert configs.to_json(read.config, layout="original", extra={}) == content


READING = [
    ({"attn_layer_idx": [4]}, "attn_layer_idx=[4] is not a list of layers from 0 to 3"),
    ({"attn_layer_idx": {"0": 1}}, "attn_layer_idx={'0': 1} is not a list"),
    ({"attn_layer_idx": [True]}, "attn_layer_idx=[True] is not a list"),
    ({"n_layer": 10**9}, "n_layer=1000000000 is not a number of layers from 1 to 1000"),
    ({"n_layer": "4"}, "n_layer='4' is not a number of layers"),
    ({"d_intermediate": 2.5}, "d_intermediate=2.5 is not a number of channels from 0"),
    ({"attn_cfg": []}, "attn_cfg=[] is not a JSON object"),
    ({"attn_cfg": {"causal": True}}, "attn_cfg lacks the key 'num_heads'"),
    ({"attn_cfg": {"num_heads": 2}}, "causal=False is not supported, only True"),
    ({"attn_cfg": {"causal": True, "num_heads": 2, "mlp_dim": 64}}, "mlp_dim=64 is not supported"),
    ({"attn_cfg": {"causal": True, "num_heads": 2, "rotary_emb_interleaved": True}}, "rotary_emb_interleaved=True"),
    ({"attn_cfg": {"causal": True, "num_heads": 2, "window": 5}}, "attn_cfg keys window are not supported"),
    ({"attn_cfg": {"causal": True, "num_heads": "2"}}, "num_heads: Input should be a valid integer, got '2'"),
    ({"ssm_cfg": {"layer": "Mamba3"}}, "ssm_cfg.layer='Mamba3' is not supported"),
    ({"ssm_cfg": {"layer": "Mamba2", "d_conf": 4}}, "ssm_cfg keys d_conf are not supported"),
    ({"rms_norm": False}, "rms_norm=False is not supported"),
]


@pytest.mark.parametrize(("change", "message"), READING, ids=lambda value: str(value)[:60])
def test_a_file_that_does_not_map_gets_one_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    config, _ = hybrid(MODELS["attention among Mamba-2"])
    content = configs.to_json(config, layout="original", extra={})
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content | change))
    with pytest.raises(InputError) as error:
        configs.read(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


WRITING: list[tuple[list[MixerConfig], str]] = [
    ([MAMBA2, MAMBA1], "the Mamba mixer must be the same in all layers"),
    ([MAMBA1, PLAIN, ATTENTION], "attention must be the same in all layers"),
    ([MAMBA1, MLP, PLAIN], "the last block, 'attention', has no Mlp after it"),
    ([MLP, PLAIN], "block 0 is 'mlp', not Mamba1 or Mamba2 or Attention"),
    ([PLAIN, MlpConfig(hidden_dim=100)], "Mlp with hidden_dim=100 has no place, only multiples of 128"),
    (
        [PLAIN, MlpConfig(activation="gelu", use_bias=True)],
        "Mlp with activation='gelu' has no place, only 'silu'; Mlp with use_bias=True has no place, only False",
    ),
    ([MAMBA1, dataclasses.replace(PLAIN, window=5)], "Attention with window=5 has no place, only None"),
    ([MAMBA1, dataclasses.replace(ATTENTION, use_conv_bias=False)], "use_conv_bias=False has no place, only True"),
    ([Mamba1Config(selection_norm_eps=1e-6), PLAIN], "model.mixer.selection_norm_eps=1e-06"),
]


@pytest.mark.parametrize(("mixers", "message"), WRITING, ids=lambda value: str(value)[:60])
def test_a_model_that_does_not_map_gets_one_line(mixers: list[MixerConfig], message: str) -> None:
    config = ModelConfig(vocab_size=31, d_model=8, num_layers=len(mixers), mixer=Hybrid.of_blocks(mixers))
    with pytest.raises(InputError) as error:
        configs.to_json(config, layout="original", extra={})
    assert message in str(error.value)
    assert "\n" not in str(error.value)
