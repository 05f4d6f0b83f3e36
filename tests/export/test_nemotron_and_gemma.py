"""The layouts of Nemotron-H and RecurrentGemma: exact round trips, files of earlier years, one line for what is not."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mamba_jax.config import Hybrid, Mamba1Config, Mamba2Config, ModelConfig
from mamba_jax.errors import InputError
from mamba_jax.export import huggingface
from mamba_jax.export import published_config as configs
from mamba_jax.models import parameters
from mamba_jax.models.mixers.attention.config import AttentionConfig
from mamba_jax.models.mixers.declaration import MixerConfig
from mamba_jax.models.mixers.mlp.config import MlpConfig
from mamba_jax.models.mixers.rg_lru.config import RGLRUConfig
from tests.export.conftest import random_model

GOLDEN = Path("tests/golden")
MAMBA2 = Mamba2Config(state_dim=3, head_dim=5, inner_dim=30, num_groups=2, conv_width=3, dt_lower_limit=0.01)
PLAIN = MlpConfig(hidden_dim=11, activation="relu_squared", gated=False, use_bias=True)
UNPLACED = AttentionConfig(num_heads=3, num_kv_heads=1, head_dim=4, rotary_dims=0)
RECURRENT = RGLRUConfig(lru_width=12, num_heads=2, conv_width=3)
LOCAL = AttentionConfig(num_heads=2, num_kv_heads=1, window=5, rotary_dims=2, use_output_bias=True)
GATED = MlpConfig(hidden_dim=10, activation="gelu_tanh", use_bias=True)
# sqrt(8) = 2.8284 has 2.828125 as its nearest bfloat16.
GEMMA: dict[str, Any] = {"norm_offset": 1.0, "embedding_scale": 2.828125, "logit_cap": 20.0, "norm_eps": 1e-6}


def nemotron(pattern: str = "MFMA", **mixers: MixerConfig) -> dict[str, Any]:
    """Fields of a model; letters stand for other mixers where keywords say so."""
    mixer = Hybrid.of_pattern(pattern, **({"M": MAMBA2, "F": PLAIN, "A": UNPLACED} | mixers))
    return {"mixer": mixer, "num_layers": len(pattern)}


def gemma(pattern: str = "RFRFAF", **mixers: MixerConfig) -> dict[str, Any]:
    """Fields of a model; letters stand for other mixers where keywords say so."""
    mixer = Hybrid.of_pattern(pattern, **({"R": RECURRENT, "A": LOCAL, "F": GATED} | mixers))
    return GEMMA | {"mixer": mixer, "num_layers": len(pattern)}


def content_of(name: str, **changes: Any) -> dict[str, Any]:
    """The `config.json` of a golden model with other values; None takes a key away."""
    content = json.loads((GOLDEN / name / "config.json").read_text()) | changes
    return {key: value for key, value in content.items() if key not in changes or value is not None}


def read(folder: Path, content: dict[str, Any]) -> ModelConfig:
    path = folder / "config.json"
    path.write_text(json.dumps(content))
    return configs.read(path).config


def mixers_of(config: ModelConfig) -> list[MixerConfig]:
    return [stack.mixer for unit in config.units for _ in range(unit[0].repeats) for stack in unit]


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("nemotron_h", nemotron()),
        ("nemotron_h", nemotron("MM") | {"tie_embeddings": True}),
        ("recurrent_gemma", gemma()),
        ("recurrent_gemma", gemma("AFAF") | {"tie_embeddings": True}),
        ("recurrent_gemma", gemma("RF")),
    ],
    ids=["nemotron_h", "nemotron_h, tied, one kind", "recurrent_gemma", "of attention, tied", "without attention"],
)
def test_round_trips_are_exact(tmp_path: Path, family: str, fields: dict[str, Any]) -> None:
    config, params = random_model(**fields)
    huggingface.save(tmp_path / "model", config, params, layout="hf")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == family
    loaded = huggingface.load(tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    for read_mixer, mixer in zip(mixers_of(loaded.config), mixers_of(config), strict=True):
        assert read_mixer.decisive(8) == mixer.decisive(8)
    for name in ("norm_offset", "embedding_scale", "logit_cap", "norm_eps", "tie_embeddings"):
        assert getattr(loaded.config, name) == getattr(config, name), name


def test_nemotron_nano_is_read_as_nvidia_wrote_it(tmp_path: Path) -> None:
    """The keys of its file say by a pattern what the layers are, and 128 heads of 80 are no multiple of 4480."""
    pattern = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"
    content = content_of(
        "nemotron_h_tiny",
        layers_block_type=None,
        hybrid_override_pattern=pattern,
        num_hidden_layers=56,
        hidden_size=4480,
        intermediate_size=15680,
        mamba_num_heads=128,
        mamba_head_dim=80,
        ssm_state_size=128,
        n_groups=8,
        num_attention_heads=40,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=131072,
        time_step_limit=[0.0, float("inf")],
    )
    config = read(tmp_path, content)
    kinds = {"M": "mamba2", "*": "attention", "-": "mlp"}
    assert [mixer.kind for mixer in mixers_of(config)] == [kinds[letter] for letter in pattern]
    mamba2 = config.stacks[0].mixer
    assert isinstance(mamba2, Mamba2Config)
    assert (mamba2.channels(4480), mamba2.heads(4480), mamba2.dt_limit) == (10240, 128, (0.001, float("inf")))
    # As NVIDIA counts them on the model's page: 8.9 billion.
    assert parameters.count(config) == 8_888_227_328


def test_words_of_earlier_files_are_read(tmp_path: Path) -> None:
    words = ["mamba", "mlp", "mamba", "attention"]
    old = read(tmp_path, content_of("nemotron_h_tiny", layers_block_type=words))
    assert old == read(tmp_path, content_of("nemotron_h_tiny"))
    changes = {"rope_parameters": None, "rope_theta": 10000.0, "lru_width": None}
    assert read(tmp_path, content_of("recurrent_gemma_tiny", **changes)) == read(
        tmp_path, content_of("recurrent_gemma_tiny")
    )


@pytest.mark.parametrize(
    ("pattern", "period"),
    [("RFRFAF" * 8 + "RFRF", ["recurrent", "recurrent", "attention"]), ("RF" * 101, ["recurrent"] * 2)],
    ids=["as published", "more layers than a hundred periods"],
)
def test_block_types_repeat_over_the_layers(tmp_path: Path, pattern: str, period: list[str]) -> None:
    config = ModelConfig(vocab_size=8, d_model=8, **gemma(pattern))
    content = configs.to_json(config, layout="hf", extra={})
    assert content["block_types"] == period
    assert mixers_of(read(tmp_path, content)) == mixers_of(
        dataclasses.replace(config, mixer=gemma(pattern, A=dataclasses.replace(LOCAL, head_dim=4))["mixer"])
    )


def _with(mixer: MixerConfig, **changes: Any) -> MixerConfig:
    return dataclasses.replace(mixer, **changes)


@pytest.mark.parametrize(
    ("family", "fields", "reasons"),
    [
        (
            "NemotronH",
            nemotron(M=_with(MAMBA2, skip="channel", use_norm=False), A=_with(UNPLACED, window=4)) | {"logit_cap": 2.0},
            [
                "Model with logit_cap=2.0 has no place",
                "Mamba2 with skip='channel' has no place",
                "Mamba2 with use_norm=False has no place",
                "Attention with window=4 has no place",
            ],
        ),
        ("NemotronH", nemotron(M=_with(MAMBA2, ssm_dim=20)), ["ssm_dim=20"]),
        ("NemotronH", nemotron(M=_with(MAMBA2, norm_group_size=5)), ["norm_group_size=5 has no place, only 15"]),
        ("NemotronH", nemotron(M=_with(MAMBA2, norm_eps=1e-3)), ["norm_eps=0.001 has no place, only 1e-05"]),
        ("NemotronH", nemotron(F=GATED), ["activation='gelu_tanh'", "gated=True"]),
        ("NemotronH", nemotron(M=Mamba1Config()), ["blocks of 'mamba1' have no place"]),
        (
            "NemotronH",
            nemotron("MFNF", N=_with(MAMBA2, state_dim=4)),
            ["linear_attention must be the same in all layers"],
        ),
        (
            "RecurrentGemma",
            gemma(F=PLAIN, A=_with(LOCAL, window=None)) | {"embedding_scale": 2.0, "logit_cap": None},
            [
                "Model with embedding_scale=2.0 has no place, only 2.828125",
                "Model without logit_cap has no place",
                "Mlp with activation='relu_squared' has no place",
                "Mlp with gated=False has no place",
                "Attention without window has no place",
            ],
        ),
        ("RecurrentGemma", gemma("RRFF"), ["block 1 is 'rg_lru', not Mlp"]),
        ("RecurrentGemma", gemma("RFR"), ["the last block, 'rg_lru', has no Mlp after it"]),
        ("RecurrentGemma", gemma(A=_with(LOCAL, head_dim=2)), ["head_dim=2 has no place, only 4"]),
        ("RecurrentGemma", gemma(R=_with(RECURRENT, num_heads=3)), ["num_heads must be the same in all layers"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_file_cannot_say_is_listed(family: str, fields: dict[str, Any], reasons: list[str]) -> None:
    config = ModelConfig(vocab_size=8, d_model=8, **fields)
    with pytest.raises(InputError) as error:
        configs.to_json(config, layout="hf", extra={})
    reason = str(error.value).split(f"{family}ForCausalLM: ")[1]
    assert all(expected in reason for expected in reasons), reason
    assert "\n" not in reason


MOE = ["linear_attention", "moe"]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("nemotron_h_tiny", {"layers_block_type": MOE}, r"mixtures of experts \(moe\), which are not supported"),
        ("nemotron_h_tiny", {"layers_block_type": ["mlp"] * 10**6}, "layers_block_type=1000000 is not a number of lay"),
        ("nemotron_h_tiny", {"layers_block_type": ["rwkv"]}, r"\['rwkv'\], which is not supported, only linear_att"),
        ("nemotron_h_tiny", {"layers_block_type": [[1], {}]}, "which is not supported"),
        ("nemotron_h_tiny", {"layers_block_type": "MM"}, "layers_block_type='MM' is not a list of words"),
        ("nemotron_h_tiny", {"layers_block_type": []}, "layers_block_type=0 is not a number of layers"),
        ("nemotron_h_tiny", {"layers_block_type": None}, "lacks the key 'layers_block_type'"),
        ("nemotron_h_tiny", {"layers_block_type": None, "hybrid_override_pattern": 7}, "=7 is not a text"),
        ("nemotron_h_tiny", {"layers_block_type": None, "hybrid_override_pattern": "MEM*"}, "experts"),
        ("nemotron_h_tiny", {"num_hidden_layers": "4"}, "num_hidden_layers='4' is not a number of layers"),
        ("nemotron_h_tiny", {"num_hidden_layers": 5}, "num_hidden_layers=5, but layers_block_type has 4 layers"),
        ("nemotron_h_tiny", {"mamba_num_heads": "4"}, "mamba_num_heads='4' is not a number of heads"),
        ("nemotron_h_tiny", {"mamba_head_dim": 10**30}, "mamba_head_dim=10+ is not a number of channels"),
        ("nemotron_h_tiny", {"intermediate_size": 0.5}, "intermediate_size=0.5 is not a number of channels"),
        ("nemotron_h_tiny", {"n_groups": 3}, "num_groups=3 does not divide the 4 heads"),
        ("nemotron_h_tiny", {"time_step_min": [0.5] * 10**5}, "dt_min: Input should be a valid number"),
        ("nemotron_h_tiny", {"attention_bias": True}, "attention_bias=True is not supported, only False"),
        ("nemotron_h_tiny", {"mlp_hidden_act": "silu"}, "mlp_hidden_act='silu' is not supported, only 'relu2'"),
        ("nemotron_h_tiny", {"num_nextn_predict_layers": 1}, "num_nextn_predict_layers=1 is not supported"),
        ("recurrent_gemma_tiny", {"num_hidden_layers": [3]}, r"num_hidden_layers=\[3\] is not a number of layers"),
        ("recurrent_gemma_tiny", {"num_hidden_layers": 10**9}, "is not a number of layers from 1 to 1000"),
        ("recurrent_gemma_tiny", {"block_types": ["mamba"] * 10**6}, "is not a list of 'recurrent' and 'attention'"),
        ("recurrent_gemma_tiny", {"block_types": []}, r"num_hidden_layers=3 is more than 100 times block_types=\[\]"),
        ("recurrent_gemma_tiny", {"hidden_activation": "relu"}, "hidden_activation='relu' is not supported"),
        ("recurrent_gemma_tiny", {"head_dim": 16}, "head_dim=16 is not supported, only 8"),
        ("recurrent_gemma_tiny", {"hidden_size": "32"}, "hidden_size='32' is not a number of channels"),
        ("recurrent_gemma_tiny", {"intermediate_size": None}, "lacks the key 'intermediate_size'"),
        ("recurrent_gemma_tiny", {"logits_soft_cap": "x"}, "logit_cap: Input should be a valid number, got 'x'"),
        ("recurrent_gemma_tiny", {"rope_parameters": {"rope_theta": "x"}}, "rope_theta='x' is not a number"),
        ("recurrent_gemma_tiny", {"num_key_value_heads": 3}, "num_kv_heads=3 does not divide num_heads=4"),
        ("recurrent_gemma_tiny", {"lru_width": 30}, "num_heads=4 does not divide the 30 channels"),
    ],
)
def test_what_is_not_supported_or_no_config_is_one_line(
    tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    (tmp_path / "model.safetensors").write_bytes((GOLDEN / name / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(content_of(name, **changes)))
    with pytest.raises(InputError, match=message) as error:
        huggingface.load(tmp_path)
    assert len(str(error.value)) < 700
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)
