"""How Mamba-1 models are published: by the authors ("original"), and as `MambaForCausalLM` of `transformers` ("hf").

`FalconMambaForCausalLM` is the second with norms in the mixer, which have no weights.

The layouts differ in the name of the embedding, in `config.json`, and in whether a tied head is written. Tensors keep
PyTorch's orientation there: linear weights (out, in), convolution weights (channels, 1, taps).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mamba_jax.errors import InputError
from mamba_jax.models import published
from mamba_jax.models.config import ModelConfig
from mamba_jax.models.mixers.mamba1.config import Mamba1Config
from mamba_jax.models.published import Tensor, refuse_unsupported

# Value that a key must have, if it is there, for the model to be a Mamba-1 as this library computes it.
_HF_REQUIRED = {"hidden_act": "silu"}
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


def _mixer(config: ModelConfig, *fixed: str) -> Mamba1Config:
    """The mixer, if a published layout can express it; `fixed` are further fields that one has no key for."""
    mixer, default = config.mixer, Mamba1Config()
    assert isinstance(mixer, Mamba1Config)
    for name in ("use_conv", "use_gate", "selective", "discretization", "selection_norm_weights", *fixed):
        if getattr(mixer, name) != getattr(default, name):
            raise InputError(
                f"the published layouts cannot express model.mixer.{name}={getattr(mixer, name)!r}; "
                f"only models with {getattr(default, name)!r} can be exported"
            )
    return mixer


def _mixer_fields(content: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    fields = {ours: content[key] for key, ours in keys.items() if key in content}
    if fields.get("dt_rank") == "auto":
        del fields["dt_rank"]
    return {"kind": "mamba1", **fields}


def _from_hf(content: Mapping[str, Any]) -> dict[str, Any]:
    refuse_unsupported(content, _HF_REQUIRED)
    mixer = _mixer_fields(content, _HF_MIXER_KEYS)
    if content["model_type"] == "falcon_mamba":
        mixer["selection_norm_eps"] = content.get("mixer_rms_eps", 1e-6)
    return published.from_hf(content, tied=True) | {"mixer": mixer}


def _check_hf(content: Mapping[str, Any], config: ModelConfig) -> None:
    refuse_unsupported(content, {"intermediate_size": _mixer(config).channels(config.d_model)})


def _to_hf(config: ModelConfig) -> dict[str, Any]:
    """The content of Hugging Face's config.json: FalconMamba's if the mixer norms B, C and dt, else Mamba's."""
    mixer = _mixer(config)
    kind: dict[str, Any] = {"architectures": ["MambaForCausalLM"], "model_type": "mamba"}
    if (eps := mixer.selection_norm_eps) is not None:
        kind = {"architectures": ["FalconMambaForCausalLM"], "model_type": "falcon_mamba", "mixer_rms_eps": eps}
    return {
        **kind,
        **_HF_REQUIRED,
        **{key: getattr(mixer, name) for key, name in _HF_MIXER_KEYS.items()},
        "time_step_rank": mixer.rank(config.d_model),
        "intermediate_size": mixer.channels(config.d_model),
        **published.to_hf(config),
    }


def _from_original(content: Mapping[str, Any]) -> dict[str, Any]:
    fields, ssm = published.from_original(content, known={*_ORIGINAL_MIXER_KEYS, "layer", "use_fast_path"})
    return fields | {"mixer": _mixer_fields(ssm, _ORIGINAL_MIXER_KEYS)}


def _to_original(config: ModelConfig) -> dict[str, Any]:
    """The content of `config.json`; a key is left out where it has the authors' default, which is ours as well."""
    mixer, default = _mixer(config, "selection_norm_eps"), Mamba1Config()
    chosen = {
        key: getattr(mixer, name)
        for key, name in _ORIGINAL_MIXER_KEYS.items()
        if getattr(mixer, name) != getattr(default, name)
    }
    return published.to_original(config, chosen)


def tensors_of_mixer(mixer: Mamba1Config, model: int, prefix: str) -> dict[str, Tensor]:
    """The tensors of a mixer, by their paths in it.

    Args:
        mixer: its config.
        model: D.
        prefix: what their names begin with.
    """
    state, width, inner, rank = mixer.state_dim, mixer.conv_width, mixer.channels(model), mixer.rank(model)

    def stored(name: str, *shape: int, **ways: Any) -> Tensor:
        return Tensor(name=prefix + name, shape=shape, **ways)

    transpose = {"to_file": np.transpose, "from_file": np.transpose}
    tensors = {
        "in_proj/kernel": stored(
            "in_proj.weight",
            2 * inner,
            model,
            to_file=lambda w: w.reshape(w.shape[0], 2 * inner).T,
            from_file=lambda w: w.T.reshape(w.shape[1], 2, inner),
        ),
        "conv1d/weight": stored(
            "conv1d.weight",
            inner,
            1,
            width,
            to_file=lambda w: w.T[:, None],
            from_file=lambda w: w.reshape(inner, width).T,
        ),
        "x_proj/kernel": stored("x_proj.weight", rank + 2 * state, inner, **transpose),
        "dt_proj/kernel": stored("dt_proj.weight", inner, rank, **transpose),
        "dt_proj/bias": stored("dt_proj.bias", inner),
        "A_log": stored("A_log", inner, state),
        "D": stored("D", inner),
        "out_proj/kernel": stored("out_proj.weight", model, inner, **transpose),
    }
    if mixer.use_conv_bias:
        tensors["conv1d/bias"] = stored("conv1d.bias", inner)
    if mixer.use_bias:
        tensors["in_proj/bias"] = stored(
            "in_proj.bias", 2 * inner, to_file=np.ravel, from_file=lambda b: b.reshape(2, inner)
        )
        tensors["out_proj/bias"] = stored("out_proj.bias", model)
    if mixer.selection_norm_weights:
        for name, size in (("dt", rank), ("B", state), ("C", state)):
            tensors[f"{name}_scale"] = stored(f"{name.lower()}_layernorm.weight", size)
    return tensors


def _of_mixer(config: ModelConfig) -> dict[str, Tensor]:
    return tensors_of_mixer(_mixer(config), config.d_model, "backbone.layers.{}.mixer.")


FORMATS = (
    published.hf_format(
        "mamba1",
        model_types=("mamba", "falcon_mamba"),
        read_config=_from_hf,
        check_config=_check_hf,
        write_config=_to_hf,
        tensors=_of_mixer,
    ),
    published.original_format(
        "mamba1", layers=(None, "Mamba1"), read_config=_from_original, write_config=_to_original, tensors=_of_mixer
    ),
)
