"""Mamba-2 in the published layouts: rows that parameters share, keys, and one line for what a layout cannot express."""

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from mamba_jax.config import Mamba2Config, ModelConfig
from mamba_jax.errors import InputError
from mamba_jax.export import huggingface
from mamba_jax.export import published_config as configs
from mamba_jax.models import parameters
from tests.export.conftest import random_model

SMALL = Mamba2Config(state_dim=3, head_dim=4, num_groups=2, conv_width=3)
EVERYTHING = dataclasses.replace(
    SMALL,
    ssm_dim=8,
    use_bias=True,
    use_conv_bias=False,
    skip="channel",
    norm_before_gate=True,
    learn_initial_state=True,
    dt_lower_limit=0.01,
    dt_upper_limit=0.2,
    conv_init=0.1,
    a_init_range=(1.0, 8.0),
)
OPTIONS = {
    "plain": SMALL,
    "biases": dataclasses.replace(SMALL, use_bias=True, use_conv_bias=False),
    "limits": dataclasses.replace(SMALL, dt_lower_limit=0.01, dt_upper_limit=0.2),
    "only the gate": dataclasses.replace(SMALL, use_norm=False),
    "everything": EVERYTHING,
}


@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, "original") for name in OPTIONS] + [(name, "hf") for name in ("plain", "biases", "limits")],
)
def test_round_trip_is_exact(tmp_path: Path, name: str, layout: str) -> None:
    config, params = random_model(mixer=OPTIONS[name])
    # Numbers that are all different, so that none can stand in another's place.
    params = jax.tree.map(lambda leaf: np.random.default_rng(leaf.size).normal(size=leaf.shape).astype("f4"), params)
    huggingface.save(tmp_path / "model", config, params, layout=layout)
    loaded = huggingface.load(tmp_path / "model")
    assert loaded.layout == layout
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    drawn = ("a_init_range", "conv_init") if layout == "hf" else ()
    expected = dataclasses.replace(config.mixer, **{key: getattr(loaded.config.mixer, key) for key in drawn})
    assert loaded.config.mixer == expected


def test_rows_are_those_of_the_authors(tmp_path: Path) -> None:
    """[gate, value, z, x, B, C, dt] of the input projection, and [x, B, C] of the convolution."""
    config, params = random_model(mixer=EVERYTHING)
    huggingface.save(tmp_path / "model", config, params, layout="original")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    mixer = jax.tree.map(lambda leaf: leaf[1], params["layers"]["mixer"])
    rows = [mixer["mlp_proj"]["kernel"][:, 0], mixer["mlp_proj"]["kernel"][:, 1]]
    rows += [mixer["in_proj"]["kernel"][:, 0], mixer["in_proj"]["kernel"][:, 1]]
    rows += [mixer["BC_proj"]["kernel"][:, index].reshape(8, -1) for index in (0, 1)]
    rows += [mixer["dt_proj"]["kernel"]]
    weight = tensors["backbone.layers.1.mixer.in_proj.weight"]
    np.testing.assert_array_equal(weight, np.concatenate(rows, axis=1).T)
    taps = np.concatenate([mixer["conv1d"]["weight"], mixer["BC_conv1d"]["weight"]], axis=1)
    np.testing.assert_array_equal(tensors["backbone.layers.1.mixer.conv1d.weight"][:, 0], taps.T)
    np.testing.assert_array_equal(tensors["backbone.layers.1.mixer.D"], mixer["D"].ravel())
    assert tensors["backbone.layers.1.mixer.init_states"].shape == (2, 4, 3)
    assert tensors["backbone.layers.1.mixer.norm.weight"].shape == (8,)


def test_a_tensor_that_parameters_share_is_missed_once(tmp_path: Path) -> None:
    config, params = random_model(mixer=SMALL)
    huggingface.save(tmp_path / "model", config, params, layout="hf")
    content = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(content | {"num_hidden_layers": 4}))
    with pytest.raises(InputError) as error:
        huggingface.load(tmp_path / "model")
    assert str(error.value).count("missing backbone.layers.3.mixer.in_proj.weight") == 1


@pytest.mark.parametrize("limit", [[0.0, {"__float__": "Infinity"}], [0.0, float("inf")], None])
def test_ways_to_write_no_limit(tmp_path: Path, limit: Any) -> None:
    content = configs.to_json(
        ModelConfig(vocab_size=8, d_model=64, num_layers=1, mixer=Mamba2Config()), layout="hf", extra={}
    )
    del content["time_step_limit"]
    (tmp_path / "config.json").write_text(json.dumps(content | ({"time_step_limit": limit} if limit else {})))
    mixer = configs.read(tmp_path / "config.json").config.mixer
    assert isinstance(mixer, Mamba2Config)
    assert mixer.dt_limit == (0.0, float("inf"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu'"),
        ({"num_heads": 3}, "num_heads=3 is not supported, only 2"),
        ({"head_dim": 48}, "head_dim=48 does not divide the 128 channels"),
        ({"n_groups": 8}, "num_groups=8 does not divide the 2 heads"),
        ({"time_step_limit": 0.1}, "time_step_limit=0.1 is not a list of two numbers"),
        ({"time_step_limit": [0.1, 0.01]}, r"dt_upper_limit \(0.01\) must not be below dt_lower_limit \(0.1\)"),
        ({"time_step_limit": ["a", 1]}, "dt_lower_limit: Input should be a valid number"),
        ({"rms_norm": False}, "rms_norm=False is not supported"),
    ],
)
def test_bad_keys_of_the_hf_layout_are_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    content = configs.to_json(
        ModelConfig(vocab_size=8, d_model=64, num_layers=1, mixer=Mamba2Config()), layout="hf", extra={}
    )
    (tmp_path / "config.json").write_text(json.dumps(content | changes))
    with pytest.raises(InputError, match=message) as error:
        configs.read(tmp_path / "config.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ssm_cfg": {"layer": "Mamba2", "nheads": 4}}, "ssm_cfg keys nheads are not supported"),
        ({"ssm_cfg": {"layer": "Mamba2", "dt_rank": 4}}, "ssm_cfg keys dt_rank are not supported"),
        ({"ssm_cfg": {"layer": "Mamba4"}}, "ssm_cfg.layer='Mamba4' is not supported"),
        ({"attn_layer_idx": [9]}, r"attn_layer_idx=\[9\] is not a list of layers from 0 to 0"),
    ],
)
def test_bad_keys_of_the_original_layout_are_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    config = ModelConfig(vocab_size=8, d_model=64, num_layers=1, mixer=Mamba2Config())
    content = configs.to_json(config, layout="original", extra={})
    (tmp_path / "config.json").write_text(json.dumps(content | changes))
    with pytest.raises(InputError, match=message) as error:
        configs.read(tmp_path / "config.json")
    assert "\n" not in str(error.value)


def test_the_hf_layout_gates_first_whatever_the_file_says(tmp_path: Path) -> None:
    """Codestral-Mamba's file has the key, and `transformers` 5.24 computes the same with it and without."""
    content = configs.to_json(
        ModelConfig(vocab_size=8, d_model=64, num_layers=1, mixer=Mamba2Config()), layout="hf", extra={}
    )
    (tmp_path / "config.json").write_text(json.dumps(content | {"norm_before_gate": True}))
    mixer = configs.read(tmp_path / "config.json").config.mixer
    assert isinstance(mixer, Mamba2Config)
    assert not mixer.norm_before_gate


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ("hf", {"skip": "channel"}),
        ("hf", {"ssm_dim": 8}),
        ("hf", {"use_norm": False}),
        ("hf", {"norm_before_gate": True}),
        ("hf", {"learn_initial_state": True}),
        ("hf", {"norm_eps": 1e-6}),
        ("original", {"norm_eps": 1e-6}),
        ("original", {"norm_group_size": 4}),
        ("original", {"inner_dim": 12, "num_groups": 1}),
        ("hf", {"inner_dim": 12, "num_groups": 1}),
    ],
)
def test_models_the_layouts_cannot_express_are_refused(tmp_path: Path, layout: str, changes: dict[str, Any]) -> None:
    config, params = random_model(mixer=dataclasses.replace(SMALL, **changes))
    with pytest.raises(InputError, match=next(iter(changes))) as error:
        huggingface.save(tmp_path / "model", config, params, layout=layout)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("layout", ["hf", "original"])
def test_inner_channels_that_are_a_multiple_of_the_width_are_written_as_that(layout: str) -> None:
    model = ModelConfig(vocab_size=8, d_model=8, num_layers=1, mixer=dataclasses.replace(SMALL, expand=3, ssm_dim=None))
    same = dataclasses.replace(model, mixer=dataclasses.replace(SMALL, inner_dim=24, ssm_dim=None))
    assert configs.to_json(same, layout=layout, extra={}) == configs.to_json(model, layout=layout, extra={})
    mixers: list[Any] = [config.mixer for config in (same, model)]
    assert mixers[0].decisive(8) == mixers[1].decisive(8)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("mamba2_130m", 128_989_632),
        ("mamba2_370m", 368_346_624),
        ("mamba2_780m", 780_161_280),
        ("mamba2_1_3b", 1_343_757_312),
        ("mamba2_2_7b", 2_702_599_680),
    ],
)
def test_published_sizes(name: str, count: int) -> None:
    """Parameters as the published models have them, and as the config's page says."""
    module = importlib.import_module(f"configs.{name}")
    config = module.get_config()
    assert config.name == name
    assert parameters.count(config.model) == count
    assert f"{count:,} parameters, {config.train.num_steps:,} steps" in (module.__doc__ or "")
    content = configs.to_json(config.model, layout="original", extra={})
    assert content["ssm_cfg"] == {"layer": "Mamba2"}
    assert (content["vocab_size"], content["pad_vocab_size_multiple"]) == (50277, 16)
