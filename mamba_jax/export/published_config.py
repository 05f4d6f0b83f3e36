"""`config.json` of the published checkpoint layouts, to and from `ModelConfig`."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from mamba_jax.config_base import from_json
from mamba_jax.errors import InputError
from mamba_jax.export.files import read_json, short
from mamba_jax.models.config import ModelConfig
from mamba_jax.models.mixers.mamba1.config import Mamba1Config

Layout = Literal["hf", "original"]

# Value that a key must have, if it is there, for the model to be a Mamba-1 as this library computes it.
_HF_REQUIRED = {"model_type": "mamba", "hidden_act": "silu"}
_ORIGINAL_REQUIRED = {"d_intermediate": 0, "attn_layer_idx": [], "rms_norm": True}
_HF_MIXER_KEYS = {
    "state_size": "state_dim",
    "conv_kernel": "conv_width",
    "expand": "expand",
    "time_step_rank": "dt_rank",
    "time_step_scale": "dt_scale",
    "time_step_min": "dt_min",
    "time_step_max": "dt_max",
    "time_step_floor": "dt_init_floor",
    "time_step_init_scheme": "dt_init",
    "use_bias": "use_bias",
    "use_conv_bias": "use_conv_bias",
}
_MESSAGE = 500
_ORIGINAL_MIXER_KEYS = {
    "d_state": "state_dim",
    "d_conv": "conv_width",
    "expand": "expand",
    "dt_rank": "dt_rank",
    "dt_min": "dt_min",
    "dt_max": "dt_max",
    "dt_init": "dt_init",
    "dt_scale": "dt_scale",
    "dt_init_floor": "dt_init_floor",
    "conv_bias": "use_conv_bias",
    "bias": "use_bias",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedConfig:
    """What a `config.json` says.

    Attributes:
        layout: told by its keys.
        config: of the model.
        extra: keys of the "hf" layout that do not describe the network, such as the ids of special tokens.
    """

    layout: Layout
    config: ModelConfig
    extra: dict[str, Any]


def read(path: Path) -> PublishedConfig:
    """Reads `config.json`.

    Raises:
        InputError: it is of neither layout, lacks a key, has an ill-typed one, or describes a model that is not
            supported; one short line, whatever the file holds.
    """
    content = read_json(path)
    try:
        if "model_type" in content:
            model = _validated(_from_hf(content, path), path)
            _refuse_unsupported(content, {"intermediate_size": model.d_inner}, path)
            extra = {key: value for key, value in content.items() if key not in _HF_KEYS}
            return PublishedConfig(layout="hf", config=model, extra=extra)
        if "d_model" in content:
            model = _validated(_from_original(content, path), path)
            return PublishedConfig(layout="original", config=model, extra={})
    except KeyError as error:
        raise InputError(f"{path} lacks the key {error}") from None
    raise InputError(f"{path} has neither 'model_type' nor 'd_model': not a config of a Mamba checkpoint")


def _validated(fields: dict[str, Any], path: Path) -> ModelConfig:
    """The published files are no more trustworthy than other input, so types are checked as in our own JSON."""
    try:
        return from_json(ModelConfig, json.dumps(fields), origin=str(path))
    except InputError as error:
        text = str(error)
        raise InputError(text if len(text) <= _MESSAGE else text[:_MESSAGE] + " ...") from None
    except RecursionError:
        raise InputError(f"{path}: a value is nested too deeply") from None


def to_json(config: ModelConfig, *, layout: Layout, extra: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` for a model.

    Args:
        config: of the model.
        layout: which keys to write.
        extra: further keys for the "hf" layout; the other has no place for them.

    Raises:
        InputError: a published layout cannot express an ablation that the model uses.
    """
    mixer, default = config.mixer, Mamba1Config()
    for name in ("use_conv", "use_gate", "selective", "discretization"):
        if getattr(mixer, name) != getattr(default, name):
            raise InputError(
                f"the published layouts cannot express model.mixer.{name}={getattr(mixer, name)!r}; "
                f"only models with {getattr(default, name)!r} can be exported"
            )
    return {**extra, **_to_hf(config)} if layout == "hf" else _to_original(config)


def _refuse_unsupported(content: dict[str, Any], required: dict[str, Any], path: Path) -> None:
    for key, value in required.items():
        if content.get(key, value) != value:
            raise InputError(f"{path}: {key}={short(content[key])} is not supported, only {short(value)}")


def _from_hf(content: dict[str, Any], path: Path) -> dict[str, Any]:
    _refuse_unsupported(content, _HF_REQUIRED, path)
    mixer = {ours: content[key] for key, ours in _HF_MIXER_KEYS.items() if key in content}
    if mixer.get("dt_rank") == "auto":
        del mixer["dt_rank"]
    vocab_size = content["vocab_size"]
    return {
        "vocab_size": vocab_size,
        "vocab_multiple": 1,
        "d_model": content["hidden_size"],
        "num_layers": content["num_hidden_layers"],
        "norm_eps": content.get("layer_norm_epsilon", 1e-5),
        "tie_embeddings": content.get("tie_word_embeddings", True),
        "embedding_std": content.get("initializer_range", 0.1),
        "rescale_residual": content.get("rescale_prenorm_residual", False),
        "mixer": mixer,
    }


def _to_hf(config: ModelConfig) -> dict[str, Any]:
    mixer = {key: getattr(config.mixer, name) for key, name in _HF_MIXER_KEYS.items()}
    return {
        "architectures": ["MambaForCausalLM"],
        **_HF_REQUIRED,
        **mixer,
        "time_step_rank": config.dt_rank,
        "vocab_size": config.padded_vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_inner,
        "num_hidden_layers": config.num_layers,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.embedding_std,
        # `from_pretrained` scales what it has loaded if this is true; these weights are finished.
        "rescale_prenorm_residual": False,
        "residual_in_fp32": True,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
        "dtype": config.param_dtype,
    }


def _from_original(content: dict[str, Any], path: Path) -> dict[str, Any]:
    _refuse_unsupported(content, _ORIGINAL_REQUIRED, path)
    ssm = content.get("ssm_cfg", {})
    if not isinstance(ssm, dict):
        raise InputError(f"{path}: ssm_cfg={short(ssm)} is not a JSON object")
    if ssm.get("layer", "Mamba1") != "Mamba1":
        raise InputError(f"{path}: ssm_cfg.layer={short(ssm['layer'])} is not supported, only 'Mamba1'")
    if unknown := sorted(ssm.keys() - _ORIGINAL_MIXER_KEYS.keys() - {"layer", "use_fast_path"}):
        raise InputError(f"{path}: ssm_cfg keys {', '.join(unknown)[:100]} are not supported")
    mixer = {ours: ssm[key] for key, ours in _ORIGINAL_MIXER_KEYS.items() if key in ssm}
    if mixer.get("dt_rank") == "auto":
        del mixer["dt_rank"]
    return {
        "vocab_size": content["vocab_size"],
        "vocab_multiple": content.get("pad_vocab_size_multiple", 8),
        "d_model": content["d_model"],
        "num_layers": content["n_layer"],
        "norm_eps": content.get("norm_epsilon", 1e-5),
        "tie_embeddings": content.get("tie_embeddings", True),
        "mixer": mixer,
    }


def _to_original(config: ModelConfig) -> dict[str, Any]:
    if config.norm_eps != 1e-5:
        raise InputError(f"the original layout fixes norm_eps at 1e-05, the model has {config.norm_eps}")
    default = Mamba1Config()
    values = {key: (getattr(config.mixer, name), getattr(default, name)) for key, name in _ORIGINAL_MIXER_KEYS.items()}
    return {
        "d_model": config.d_model,
        "d_intermediate": 0,
        "n_layer": config.num_layers,
        "vocab_size": config.vocab_size,
        "ssm_cfg": {key: value for key, (value, unset) in values.items() if value != unset},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": config.vocab_multiple,
        "tie_embeddings": config.tie_embeddings,
    }


# Keys of which others need not be told; the rest of a file goes along as it is.
_HF_KEYS = {*_to_hf(ModelConfig(vocab_size=1, d_model=1, num_layers=1)), "torch_dtype"}
