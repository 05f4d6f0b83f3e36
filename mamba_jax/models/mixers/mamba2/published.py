"""How Mamba-2 models are published: by the authors ("original"), and as `Mamba2ForCausalLM` of `transformers` ("hf").

The layouts differ as those of Mamba-1 do. Both store one input projection, with rows for [gate and value of the SwiGLU,
z, x, B, C, dt], and one convolution of [x, B, C]: a parameter of ours is some of their rows.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mamba_jax.errors import InputError, short
from mamba_jax.models import published
from mamba_jax.models.config import ModelConfig
from mamba_jax.models.mixers.mamba2.config import Mamba2Config
from mamba_jax.models.published import Tensor, refuse_unsupported

# Value that a key must have, if it is there, for the model to be a Mamba-2 as this library computes it.
_HF_REQUIRED = {"model_type": "mamba2", "hidden_act": "silu"}
_HF_ALSO_REQUIRED = {"rms_norm": True}
_HF_MIXER_KEYS = {
    "state_size": "state_dim",
    "head_dim": "head_dim",
    "n_groups": "num_groups",
    "conv_kernel": "conv_width",
    "expand": "expand",
    "time_step_min": "dt_min",
    "time_step_max": "dt_max",
    "time_step_floor": "dt_init_floor",
    "use_bias": "use_bias",
    "use_conv_bias": "use_conv_bias",
}
_ORIGINAL_MIXER_KEYS = {
    "d_state": "state_dim",
    "d_conv": "conv_width",
    "conv_init": "conv_init",
    "expand": "expand",
    "headdim": "head_dim",
    "d_ssm": "ssm_dim",
    "ngroups": "num_groups",
    "A_init_range": "a_init_range",
    "rmsnorm": "use_norm",
    "norm_before_gate": "norm_before_gate",
    "dt_min": "dt_min",
    "dt_max": "dt_max",
    "dt_init_floor": "dt_init_floor",
    "bias": "use_bias",
    "conv_bias": "use_conv_bias",
    "learnable_init_states": "learn_initial_state",
}
# They choose how the authors' program computes, and not what.
_ORIGINAL_IGNORED = {"layer", "chunk_size", "use_mem_eff_path", "sequence_parallel"}


def _mixer(config: ModelConfig, fixed: tuple[str, ...] = ()) -> Mamba2Config:
    """The mixer, if a layout can express it that fixes some fields at their defaults."""
    mixer, default = config.mixer, Mamba2Config()
    assert isinstance(mixer, Mamba2Config)
    for name in fixed:
        if getattr(mixer, name) != getattr(default, name):
            raise InputError(
                f"this layout cannot express model.mixer.{name}={getattr(mixer, name)!r}; only models with "
                f"{getattr(default, name)!r} can be exported"
            )
    group_size = mixer.channels(config.d_model) // mixer.num_groups
    if mixer.group_size(config.d_model) != group_size:
        raise InputError(
            f"the published layouts cannot express model.mixer.norm_group_size={mixer.norm_group_size}; only models "
            f"with {group_size}, the channels of a group, can be exported"
        )
    expand, rest = divmod(mixer.inner_channels(config.d_model), config.d_model)
    if rest:
        raise InputError(
            f"the published layouts cannot express model.mixer.inner_dim={mixer.inner_dim}; only models with a "
            f"multiple of d_model={config.d_model} can be exported"
        )
    return dataclasses.replace(mixer, expand=expand, inner_dim=None)


def limits_from(content: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Our two limits of the step size; `transformers` writes infinity as an object, others as a number.

    Args:
        content: of the file.
        key: of a list of both; without it there is no field.

    Raises:
        InputError: it is no such list.
    """
    if key not in content:
        return {}
    limits = content[key]
    if not isinstance(limits, list) or len(limits) != 2:
        raise InputError(f"{key}={short(limits)} is not a list of two numbers")
    low, high = limits
    is_unlimited = high in (math.inf, {"__float__": "Infinity"})
    return {"dt_lower_limit": low, "dt_upper_limit": None if is_unlimited else high}


def _from_hf(content: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `ModelConfig` from Hugging Face's config.json; refuses what this library would compute otherwise."""
    refuse_unsupported(content, _HF_REQUIRED | _HF_ALSO_REQUIRED)
    fields = published.from_hf(content, tied=False)
    own = {ours: content[key] for key, ours in _HF_MIXER_KEYS.items() if key in content}
    # A file that does not say it means 8 groups, as `transformers` does, and ours is 1.
    mixer = {"kind": "mamba2", "num_groups": 8, **own, **limits_from(content, "time_step_limit")}
    # Files may have a key `norm_before_gate`; `transformers` does not read it, and always gates first.
    norm = {"norm_eps": fields["norm_eps"], "norm_before_gate": False}
    return fields | {"mixer": mixer | norm}


def limits_to_hf(mixer: Mamba2Config) -> list[Any]:
    """The limits of the step size as `transformers` writes them."""
    high = mixer.dt_upper_limit
    return [mixer.dt_lower_limit, {"__float__": "Infinity"} if high is None else high]


def _check_hf(content: Mapping[str, Any], config: ModelConfig) -> None:
    refuse_unsupported(content, {"num_heads": _mixer(config).heads(config.d_model)})


def _to_hf(config: ModelConfig) -> dict[str, Any]:
    """The content of Hugging Face's config.json; refuses a model that `Mamba2ForCausalLM` cannot compute."""
    mixer = _mixer(config, ("ssm_dim", "skip", "use_norm", "norm_before_gate", "learn_initial_state"))
    if mixer.norm_eps != config.norm_eps:
        raise InputError(
            f"the layout 'hf' has one epsilon for all norms, the model has norm_eps={config.norm_eps} and "
            f"mixer.norm_eps={mixer.norm_eps}: make them equal"
        )
    return {
        "architectures": ["Mamba2ForCausalLM"],
        **_HF_REQUIRED,
        **{key: getattr(mixer, name) for key, name in _HF_MIXER_KEYS.items()},
        "time_step_limit": limits_to_hf(mixer),
        "num_heads": mixer.heads(config.d_model),
        **published.to_hf(config),
    }


def _from_original(content: Mapping[str, Any]) -> dict[str, Any]:
    fields, ssm = published.from_original(
        content, known=_ORIGINAL_MIXER_KEYS.keys() | _ORIGINAL_IGNORED | {"dt_limit", "D_has_hdim"}
    )
    mixer = {ours: ssm[key] for key, ours in _ORIGINAL_MIXER_KEYS.items() if key in ssm}
    if "D_has_hdim" in ssm:
        mixer["skip"] = "channel" if ssm["D_has_hdim"] else "head"
    return fields | {"mixer": {"kind": "mamba2", **mixer, **limits_from(ssm, "dt_limit")}}


def _to_original(config: ModelConfig) -> dict[str, Any]:
    """The content of `config.json`; a key is left out where it has the authors' default, which is ours as well."""
    mixer, default = _mixer(config, ("norm_eps",)), Mamba2Config()
    chosen: dict[str, Any] = {
        key: getattr(mixer, name)
        for key, name in _ORIGINAL_MIXER_KEYS.items()
        if getattr(mixer, name) != getattr(default, name)
    }
    if mixer.skip == "channel":
        chosen["D_has_hdim"] = True
    if mixer.dt_limit != default.dt_limit:
        chosen["dt_limit"] = list(mixer.dt_limit)
    return published.to_original(config, {"layer": "Mamba2", **chosen})


def _stored(prefix: str, name: str, *shape: int, **ways: Any) -> Tensor:
    return Tensor(name=prefix + name, shape=shape, **ways)


def _of_projections(mixer: Mamba2Config, model: int, prefix: str) -> dict[str, Tensor]:
    """Those of the input projection, by their paths in the mixer."""
    channels, gated = mixer.channels(model), mixer.gated_channels(model)
    shapes: dict[str, tuple[int, ...]] = {
        "mlp_proj": (2, gated),
        "in_proj": (2, channels),
        "BC_proj": (2, mixer.num_groups, mixer.state_dim),
        "dt_proj": (mixer.heads(model),),
    }
    parts = published.rows_of({name: math.prod(shape) for name, shape in shapes.items()})
    total = parts["dt_proj"][1]
    tensors = {}
    for name in shapes if gated else list(shapes)[1:]:
        tensors[f"{name}/kernel"] = _stored(
            prefix,
            "in_proj.weight",
            total,
            model,
            rows=parts[name],
            to_file=lambda w: w.reshape(model, -1).T,
            from_file=lambda w, shape=shapes[name]: w.T.reshape(model, *shape),
        )
        if mixer.use_bias:
            tensors[f"{name}/bias"] = _stored(
                prefix,
                "in_proj.bias",
                total,
                rows=parts[name],
                to_file=np.ravel,
                from_file=lambda b, shape=shapes[name]: b.reshape(shape),
            )
    return tensors


def _of_convolutions(mixer: Mamba2Config, model: int, prefix: str) -> dict[str, Tensor]:
    """The tensors of both convolutions, which a published file holds in one: the rows of x, then of B and C."""
    parts = published.rows_of({"conv1d": mixer.channels(model), "BC_conv1d": 2 * mixer.num_groups * mixer.state_dim})
    total = parts["BC_conv1d"][1]
    tensors = {}
    for name, rows in parts.items():
        tensors[f"{name}/weight"] = _stored(
            prefix,
            "conv1d.weight",
            total,
            1,
            mixer.conv_width,
            rows=rows,
            to_file=lambda w: w.T[:, None],
            from_file=lambda w: w[:, 0].T,
        )
        if mixer.use_conv_bias:
            tensors[f"{name}/bias"] = _stored(prefix, "conv1d.bias", total, rows=rows)
    return tensors


def tensors_of_mixer(mixer: Mamba2Config, model: int, prefix: str) -> dict[str, Tensor]:
    """The tensors of a mixer, by their paths in it.

    Args:
        mixer: its config.
        model: D.
        prefix: what their names begin with.
    """
    stored = functools.partial(_stored, prefix)
    channels, heads = mixer.channels(model), mixer.heads(model)
    inner = channels + mixer.gated_channels(model)
    transpose: dict[str, Callable[[np.ndarray], np.ndarray]] = {"to_file": np.transpose, "from_file": np.transpose}
    tensors = {
        **_of_projections(mixer, model, prefix),
        **_of_convolutions(mixer, model, prefix),
        "dt_bias": stored("dt_bias", heads),
        "A_log": stored("A_log", heads),
        "D": stored("D", heads),
        "out_proj/kernel": stored("out_proj.weight", model, inner, **transpose),
    }
    if mixer.skip == "channel":
        tensors["D"] = stored("D", channels, to_file=np.ravel, from_file=lambda D: D.reshape(heads, mixer.head_dim))
    if mixer.use_norm:
        tensors["norm/scale"] = stored("norm.weight", channels)
    if mixer.use_bias:
        tensors["out_proj/bias"] = stored("out_proj.bias", model)
    if mixer.learn_initial_state:
        tensors["initial_state"] = stored("init_states", heads, mixer.head_dim, mixer.state_dim)
    return tensors


def _of_mixer(config: ModelConfig) -> dict[str, Tensor]:
    return tensors_of_mixer(_mixer(config), config.d_model, "backbone.layers.{}.mixer.")


FORMATS = (
    published.hf_format(
        "mamba2",
        model_types=("mamba2",),
        read_config=_from_hf,
        check_config=_check_hf,
        write_config=_to_hf,
        tensors=_of_mixer,
    ),
    published.original_format(
        "mamba2", layers=("Mamba2",), read_config=_from_original, write_config=_to_original, tensors=_of_mixer
    ),
)
