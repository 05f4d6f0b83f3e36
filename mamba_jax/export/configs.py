"""`config.json` of the published checkpoint layouts, to and from `ModelConfig`."""

import json
from pathlib import Path
from typing import Any, Literal

from mamba_jax.config import Mamba1Config, ModelConfig
from mamba_jax.errors import InputError

# Value that a key must have, if it is there, for the model to be a Mamba-1 as this library computes it.
_HF_REQUIRED = {"model_type": "mamba", "hidden_act": "silu"}
_ORIGINAL_REQUIRED = {"d_intermediate": 0, "attn_layer_idx": [], "rms_norm": True}
_SSM_KEYS = {
    "d_state": "state_dim",
    "d_conv": "conv_width",
    "expand": "expand",
    "dt_min": "dt_min",
    "dt_max": "dt_max",
    "dt_init": "dt_init",
    "dt_scale": "dt_scale",
    "dt_init_floor": "dt_init_floor",
    "conv_bias": "use_conv_bias",
    "bias": "use_bias",
}


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        InputError: the file is missing or holds something else.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"no file {path}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content


def read(path: Path) -> tuple[ModelConfig, Literal["hf", "original"]]:
    """Reads `config.json` and tells the layout from its keys.

    Raises:
        InputError: it is neither, lacks a key, or describes a model that is not supported.
    """
    content = read_json(path)
    try:
        if "model_type" in content:
            return _from_hf(content, path), "hf"
        if "d_model" in content:
            return _from_original(content, path), "original"
    except KeyError as error:
        raise InputError(f"{path} lacks the key {error}") from None
    raise InputError(f"{path} has neither 'model_type' nor 'd_model': not a config of a Mamba checkpoint")


def to_json(config: ModelConfig, *, layout: Literal["hf", "original"]) -> dict[str, Any]:
    """`config.json` for a model.

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
    return _to_hf(config) if layout == "hf" else _to_original(config)


def _refuse_unsupported(content: dict[str, Any], required: dict[str, Any], path: Path) -> None:
    for key, value in required.items():
        if content.get(key, value) != value:
            raise InputError(f"{path}: {key}={content[key]!r} is not supported, only {value!r}")


def _from_hf(content: dict[str, Any], path: Path) -> ModelConfig:
    _refuse_unsupported(content, _HF_REQUIRED, path)
    width, expand = content["hidden_size"], content.get("expand", 2)
    if content.get("intermediate_size", expand * width) != expand * width:
        raise InputError(f"{path}: intermediate_size={content['intermediate_size']} is not expand * hidden_size")
    rank = content.get("time_step_rank", "auto")
    vocab_size = content["vocab_size"]
    return ModelConfig(
        vocab_size=vocab_size,
        vocab_multiple=8 if vocab_size % 8 == 0 else 1,
        d_model=width,
        num_layers=content["num_hidden_layers"],
        norm_eps=content.get("layer_norm_epsilon", 1e-5),
        tie_embeddings=content.get("tie_word_embeddings", True),
        embedding_std=content.get("initializer_range", 0.1),
        rescale_residual=content.get("rescale_prenorm_residual", False),
        mixer=Mamba1Config(
            state_dim=content["state_size"],
            conv_width=content["conv_kernel"],
            expand=expand,
            dt_rank=None if rank == "auto" else rank,
            dt_min=content.get("time_step_min", 0.001),
            dt_max=content.get("time_step_max", 0.1),
            dt_init=content.get("time_step_init_scheme", "random"),
            dt_scale=content.get("time_step_scale", 1.0),
            dt_init_floor=content.get("time_step_floor", 1e-4),
            use_bias=content.get("use_bias", False),
            use_conv_bias=content.get("use_conv_bias", True),
        ),
    )


def _to_hf(config: ModelConfig) -> dict[str, Any]:
    mixer = config.mixer
    return {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "vocab_size": config.padded_vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_inner,
        "num_hidden_layers": config.num_layers,
        "state_size": mixer.state_dim,
        "conv_kernel": mixer.conv_width,
        "expand": mixer.expand,
        "time_step_rank": config.dt_rank,
        "time_step_scale": mixer.dt_scale,
        "time_step_min": mixer.dt_min,
        "time_step_max": mixer.dt_max,
        "time_step_floor": mixer.dt_init_floor,
        "time_step_init_scheme": mixer.dt_init,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.embedding_std,
        "rescale_prenorm_residual": config.rescale_residual,
        "residual_in_fp32": True,
        "use_bias": mixer.use_bias,
        "use_conv_bias": mixer.use_conv_bias,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
        "dtype": config.param_dtype,
    }


def _from_original(content: dict[str, Any], path: Path) -> ModelConfig:
    _refuse_unsupported(content, _ORIGINAL_REQUIRED, path)
    ssm = dict(content.get("ssm_cfg", {}))
    if ssm.pop("layer", "Mamba1") != "Mamba1":
        raise InputError(f"{path}: ssm_cfg.layer={content['ssm_cfg']['layer']!r} is not supported, only 'Mamba1'")
    rank = ssm.pop("dt_rank", "auto")
    ssm.pop("use_fast_path", None)
    if unknown := sorted(ssm.keys() - _SSM_KEYS.keys()):
        raise InputError(f"{path}: ssm_cfg keys {', '.join(unknown)} are not supported")
    return ModelConfig(
        vocab_size=content["vocab_size"],
        vocab_multiple=content.get("pad_vocab_size_multiple", 8),
        d_model=content["d_model"],
        num_layers=content["n_layer"],
        tie_embeddings=content.get("tie_embeddings", True),
        mixer=Mamba1Config(
            dt_rank=None if rank == "auto" else rank, **{_SSM_KEYS[key]: value for key, value in ssm.items()}
        ),
    )


def _to_original(config: ModelConfig) -> dict[str, Any]:
    if config.norm_eps != 1e-5:
        raise InputError(f"the original layout fixes norm_eps at 1e-05, the model has {config.norm_eps}")
    default = Mamba1Config()
    ssm = {
        key: getattr(config.mixer, name)
        for key, name in _SSM_KEYS.items()
        if getattr(config.mixer, name) != getattr(default, name)
    }
    if config.mixer.dt_rank is not None:
        ssm["dt_rank"] = config.mixer.dt_rank
    return {
        "d_model": config.d_model,
        "d_intermediate": 0,
        "n_layer": config.num_layers,
        "vocab_size": config.vocab_size,
        "ssm_cfg": ssm,
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": config.vocab_multiple,
        "tie_embeddings": config.tie_embeddings,
    }
