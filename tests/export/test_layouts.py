"""Hybrids in the layouts of `transformers`: exact round trips, and one line for what does not map, either way."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mamba_jax.config import Mamba1Config, Mamba2Config, ModelConfig
from mamba_jax.errors import InputError
from mamba_jax.export import huggingface
from mamba_jax.export import published_config as configs
from mamba_jax.models.config import Hybrid
from mamba_jax.models.mixers import AttentionConfig, MlpConfig, MoeConfig
from mamba_jax.models.mixers.declaration import MixerConfig
from tests.export.conftest import random_model

GOLDEN = Path("tests/golden")
ROTARY = AttentionConfig(
    num_heads=2, num_kv_heads=1, head_dim=6, rotary_dims=2, use_qkv_bias=True, use_output_bias=True
)
PLAIN = AttentionConfig(num_heads=2, rotary_dims=0)
MAMBA1 = Mamba1Config(state_dim=3, dt_rank=2, use_bias=True, selection_norm_eps=1e-5, selection_norm_weights=True)
MAMBA2 = Mamba2Config(state_dim=4, head_dim=4, num_groups=2, use_bias=True, dt_lower_limit=0.01, dt_upper_limit=0.5)
MLP = MlpConfig(hidden_dim=12)
EXPERTS = MoeConfig(hidden_dim=12, num_experts=3, balance_weight=0.25)
Layers = list[MixerConfig]

MODELS: dict[str, tuple[str, Layers]] = {
    "llama": ("llama", [AttentionConfig(num_heads=2, head_dim=6, rope_theta=5e5), MLP] * 2),
    "bamba": ("bamba", [MAMBA2, MLP, MAMBA2, MLP, ROTARY, MLP]),
    "bamba with whole heads rotated": ("bamba", [dataclasses.replace(ROTARY, rotary_dims=6), MLP, MAMBA2, MLP]),
    "bamba without Mamba": ("bamba", [ROTARY, MLP] * 2),
    "jamba": ("jamba", [MAMBA1, EXPERTS, PLAIN, MLP, MAMBA1, EXPERTS, PLAIN, MLP, MAMBA1, EXPERTS]),
    "jamba without experts": ("jamba", [MAMBA1, MLP, PLAIN, MLP]),
    "jamba without Mamba": ("jamba", [dataclasses.replace(PLAIN, head_dim=3), EXPERTS] * 2),
}


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_exact(tmp_path: Path, name: str) -> None:
    family, mixers = MODELS[name]
    config, params = random_model(mixer=Hybrid.of_blocks(mixers), num_layers=len(mixers))
    huggingface.save(tmp_path / "model", config, params, layout="hf")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == family
    loaded = huggingface.load(tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    for ours, theirs in zip(config.stacks, loaded.config.stacks, strict=True):
        assert ours.mixer.decisive(8) == theirs.mixer.decisive(8)
        assert ours.repeats == theirs.repeats
    huggingface.save(tmp_path / "again", loaded.config, loaded.params, layout="hf", extra=loaded.extra)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "model" / file).read_bytes()


WRITING: list[tuple[Layers, dict[str, Any], str]] = [
    ([MAMBA2, MLP, MAMBA2], {}, "BambaForCausalLM: the last block, 'mamba2', has no Mlp after it"),
    ([MAMBA1, MAMBA1], {}, "JambaForCausalLM: block 1 is 'mamba1', not Mlp or Moe"),
    (
        [MAMBA2, MLP],
        {"logit_cap": 30.0, "norm_offset": 1.0},
        "BambaForCausalLM: Model with norm_offset=1.0 has no place, only 0.0; Model with logit_cap=30.0 has no place",
    ),
    (
        [dataclasses.replace(MAMBA2, norm_before_gate=True, norm_eps=1e-3), MLP],
        {},
        "Mamba2 with norm_before_gate=True has no place, only False; Mamba2 with norm_eps=0.001 has no place",
    ),
    ([dataclasses.replace(MAMBA2, norm_group_size=4), MLP], {}, "norm_group_size=4 has no place, only 8"),
    ([ROTARY, MLP, dataclasses.replace(ROTARY, num_kv_heads=2), MLP], {}, "Attention must be the same in all layers"),
    ([dataclasses.replace(ROTARY, window=4), MLP], {}, "Attention with window=4 has no place, only None"),
    ([dataclasses.replace(ROTARY, use_output_bias=False), MLP], {}, "use_output_bias=False has no place, only True"),
    ([MAMBA2, MLP, MAMBA2, MlpConfig(hidden_dim=16)], {}, "the MLP must be the same in all layers"),
    (
        [Mamba1Config(), MLP],
        {},
        "Mamba1 with selection_norm_eps=None has no place, only 1e-05; Mamba1 with selection_norm_weights=False",
    ),
    (
        [MAMBA1, MLP, MAMBA1, MoeConfig(hidden_dim=16)],
        {},
        "JambaForCausalLM: hidden_dim must be the same in all layers",
    ),
    ([MAMBA1, MoeConfig(num_experts=1, experts_per_token=1)], {}, "Moe with num_experts=1 has no place, only more"),
    ([MAMBA1, MoeConfig(normalize_weights=True)], {}, "Moe with normalize_weights=True has no place, only False"),
    (
        [MAMBA1, MLP, PLAIN, MLP, PLAIN, MLP, MAMBA1, MLP],
        {},
        "JambaForCausalLM: layers 1, 2 are attention, which are not at equal distances from the first",
    ),
    ([MAMBA1, MLP], {}, "JambaForCausalLM: no layer is attention, without which `transformers` cannot generate"),
    ([MAMBA2, MLP], {}, "BambaForCausalLM: no layer is attention, without which `transformers` cannot generate"),
    ([PLAIN, EXPERTS, MAMBA1, EXPERTS, MAMBA1, MLP], {}, "layers 0, 1 have experts, which are not at equal distances"),
]


@pytest.mark.parametrize(("mixers", "changes", "message"), WRITING, ids=[message[:70] for *_, message in WRITING])
def test_a_model_that_does_not_map_gets_one_line(mixers: Layers, changes: dict[str, Any], message: str) -> None:
    config = ModelConfig(vocab_size=31, d_model=8, num_layers=len(mixers), mixer=Hybrid.of_blocks(mixers), **changes)
    with pytest.raises(InputError) as error:
        configs.to_json(config, layout="hf", extra={})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
READING: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"rope_parameters": YARN}, "rope_type='yarn' is not supported, only 'default'"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear' is not supported"),
    ("llama", {"rope_parameters": 10**400}, "is not an object"),
    ("llama", {"rope_parameters": {"rope_theta": "1e4"}}, "rope_theta='1e4' is not a number from 0 to 1e+30"),
    ("llama", {"rope_parameters": {"rope_theta": 10**400}}, "is not a number from 0 to 1e+30"),
    ("llama", {"sliding_window": 64}, "sliding_window=64 is not supported, only None"),
    ("llama", {"num_attention_heads": "4", "head_dim": None}, "num_attention_heads='4' is not a number of heads"),
    ("llama", {"intermediate_size": None}, "intermediate_size=None is not a number of channels"),
    ("bamba", {"rope_parameters": YARN}, "rope_type='yarn' is not supported, only 'default'"),
    ("bamba", {"partial_rotary_factor": 0.25}, "partial_rotary_factor=0.25 is not supported, only 0.5"),
    ("bamba", {"attn_rotary_emb": 8}, "attn_rotary_emb=8 is not supported, only 4"),
    ("bamba", {"attn_layer_indices": [3]}, "attn_layer_indices=[3] is not a list of layers from 0 to 2"),
    ("bamba", {"attn_layer_indices": [[1]]}, "attn_layer_indices=[[1]] is not a list of layers"),
    ("bamba", {"attn_layer_indices": None}, "no layer is attention, without which `transformers` cannot generate"),
    ("bamba", {"mamba_n_heads": 8}, "mamba_n_heads=8 is not supported, only 4"),
    ("bamba", {"time_step_limit": 3}, "time_step_limit=3 is not a list of two numbers"),
    ("bamba", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu'"),
    ("bamba", {"sliding_window": 64}, "sliding_window=64 is not supported, only None"),
    ("bamba", {"num_hidden_layers": 10**400}, "is not a number of layers from 1 to 1000"),
    ("jamba", {"num_hidden_layers": [3]}, "num_hidden_layers=[3] is not a number of layers from 1 to 1000"),
    ("jamba", {"num_experts": "4"}, "num_experts='4' is not a number of experts"),
    ("jamba", {"num_experts": 10**400}, "is not a number of experts from 1"),
    ("jamba", {"num_experts_per_tok": 5}, "MoeConfig.experts_per_token=5 is more than num_experts=4"),
    ("jamba", {"attn_layer_period": 0}, "attn_layer_period=0 is not a number of layers from 1"),
    ("jamba", {"attn_layer_offset": 3}, "attn_layer_offset=3 is not a number of layers from 0 to 2"),
    ("jamba", {"attn_layer_period": 9, "attn_layer_offset": 8}, "no layer is attention"),
    ("jamba", {"expert_layer_period": 2.0}, "expert_layer_period=2.0 is not a number of layers"),
    ("jamba", {"mamba_dt_rank": None}, "mamba_dt_rank=None is not a number of channels"),
    ("jamba", {"sliding_window": 64}, "sliding_window=64 is not supported, only None"),
]


@pytest.mark.parametrize(
    ("family", "change", "message"), READING, ids=[f"{family} {message[:60]}" for family, _, message in READING]
)
def test_a_file_that_does_not_map_gets_one_line(
    tmp_path: Path, family: str, change: dict[str, Any], message: str
) -> None:
    content = json.loads((GOLDEN / f"{family}_tiny" / "config.json").read_text())
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content | change))
    with pytest.raises(InputError) as error:
        configs.read(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_every_share_of_a_head_can_be_rotated(tmp_path: Path) -> None:
    """The file has a fraction, and its product with the channels of a head is rounded down."""
    path = tmp_path / "config.json"
    for channels, rotated in ((98, 2), (49, 14), (49, 48), (6, 0), (6, 6), (110, 58)):
        attention = AttentionConfig(num_heads=1, head_dim=channels, rotary_dims=rotated)
        mixers: Layers = [MAMBA2, MLP, attention, MLP]
        config = ModelConfig(vocab_size=31, d_model=8, num_layers=4, mixer=Hybrid.of_blocks(mixers))
        path.write_text(json.dumps(configs.to_json(config, layout="hf", extra={})))
        read = [stack.mixer for stack in configs.read(path).config.stacks]
        assert [mixer.rotary_dims for mixer in read if isinstance(mixer, AttentionConfig)] == [rotated]
