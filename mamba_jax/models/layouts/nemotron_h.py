"""Nemotron-H: Mamba-2, attention without positions and squared-ReLU MLPs, as `NemotronHForCausalLM` of `transformers`.

A layer of theirs is a block of ours. Their residual stream has the dtype of the weights (`residual_in_fp32` is false in
the files that are published, and `transformers` does not read it); ours is float32, which is the same for float32
weights and rounds less often for others. Steps of Mamba-2 are at least `time_step_min`, as in `transformers`, which
reads no other limit; its generation of single tokens has none, where ours has the same.

Source: arXiv 2504.03624.
"""

from collections.abc import Callable, Mapping
from typing import Any

from mamba_jax.config_base import require
from mamba_jax.errors import short
from mamba_jax.models.config import ModelConfig
from mamba_jax.models.layouts import parts
from mamba_jax.models.mixers.attention.config import AttentionConfig
from mamba_jax.models.mixers.declaration import MixerConfig
from mamba_jax.models.mixers.mamba2.config import Mamba2Config
from mamba_jax.models.mixers.mlp.config import MlpConfig
from mamba_jax.models.published import Table, Tensor, refuse_unsupported, whole_table

_REQUIRED = {
    "attention_bias": False,
    "mamba_hidden_act": "silu",
    "mlp_hidden_act": "relu2",
    "num_nextn_predict_layers": 0,
    **parts.NO_WINDOW,
}
_MAMBA2_KEYS = {
    "ssm_state_size": "state_dim",
    "n_groups": "num_groups",
    "conv_kernel": "conv_width",
    "time_step_min": "dt_lower_limit",
    "time_step_max": "dt_max",
    "time_step_floor": "dt_init_floor",
    "use_bias": "use_bias",
    "use_conv_bias": "use_conv_bias",
}
_LAYER = "backbone.layers.{}."
# What a layer is called in `layers_block_type`.
_KINDS: dict[str, type[MixerConfig]] = {
    "linear_attention": Mamba2Config,
    "full_attention": AttentionConfig,
    "mlp": MlpConfig,
}
# What it was called there and in `hybrid_override_pattern`.
_OLDER = {
    "mamba": "linear_attention",
    "M": "linear_attention",
    "attention": "full_attention",
    "*": "full_attention",
    "-": "mlp",
    "E": "moe",
}


def _words(content: Mapping[str, Any]) -> list[str]:
    """What the layers are, in order.

    Raises:
        InputError: the file says it in another way, or has layers that this library does not.
    """
    has_list = content.get("layers_block_type") is not None
    key, kind = ("layers_block_type", list) if has_list else ("hybrid_override_pattern", str)
    if not has_list and key not in content:
        raise KeyError("layers_block_type")
    given = content[key]
    count = parts.layer_count({key: len(given)}, key) if isinstance(given, kind) else 0
    require(count > 0, f"{key}={short(given)} is not {'a list of words' if has_list else 'a text'}")
    if content.get("num_hidden_layers") is not None:
        layers = parts.layer_count(content)
        require(layers == count, f"num_hidden_layers={layers}, but {key} has {count} layers")
    words = [_OLDER.get(word, word) if isinstance(word, str) else short(word) for word in given]
    require("moe" not in words, f"{key} has mixtures of experts (moe), which are not supported in Nemotron-H")
    unknown = [word for word in words if word not in _KINDS]
    require(not unknown, f"{key} has {short(unknown[:1])}, which is not supported, only {', '.join(_KINDS)}")
    return words


def _read_mamba2(content: Mapping[str, Any]) -> dict[str, Any]:
    """Its inner channels are those of its heads, whatever `expand` says."""
    head_dim = parts.whole(content, "mamba_head_dim", "channels")
    given = {"time_step_min": 0.001, "n_groups": 8, "layer_norm_epsilon": 1e-5, **content}
    return {
        "kind": "mamba2",
        **{ours: given[key] for key, ours in _MAMBA2_KEYS.items() if key in given},
        "head_dim": head_dim,
        "inner_dim": parts.whole(content, "mamba_num_heads", "heads") * head_dim,
        # Of random weights, which cannot have a step of zero.
        "dt_min": given["time_step_min"] or 0.001,
        "norm_eps": given["layer_norm_epsilon"],
    }


def _read_attention(content: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "kind": "attention",
        "num_heads": content["num_attention_heads"],
        "num_kv_heads": content.get("num_key_value_heads"),
        "head_dim": content.get("head_dim") or content.get("attention_head_dim", 128),
        "rotary_dims": 0,
    }


def _read_mlp(content: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "kind": "mlp",
        "hidden_dim": parts.whole(content, "intermediate_size", "channels"),
        "activation": "relu_squared",
        "gated": False,
        "use_bias": content.get("mlp_bias", False),
    }


def _read(content: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `ModelConfig`, a block for every layer."""
    refuse_unsupported(content, _REQUIRED)
    words = _words(content)
    readers: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]]
    readers = {"linear_attention": _read_mamba2, "full_attention": _read_attention, "mlp": _read_mlp}
    mixers = {word: readers[word](content) for word in dict.fromkeys(words)}
    fields = parts.model_fields({"layer_norm_epsilon": 1e-5, **content}, eps="layer_norm_epsilon")
    rescale = {"rescale_residual": content.get("rescale_prenorm_residual", True)}
    return fields | rescale | parts.hybrid_fields([mixers[word] for word in words])


def _unexpressed(mixer: MixerConfig, config: ModelConfig) -> list[str]:
    """What the layout has no key for in a block with this mixer."""
    if isinstance(mixer, Mamba2Config):
        return parts.unexpressed(
            mixer,
            (*_MAMBA2_KEYS.values(), "head_dim", "expand", "inner_dim"),
            ssm_dim=None if mixer.gated_channels(config.d_model) else mixer.ssm_dim,
            norm_group_size=mixer.norm_group_size and mixer.channels(config.d_model) // mixer.num_groups,
            norm_eps=config.norm_eps,
        )
    if isinstance(mixer, AttentionConfig):
        return parts.unexpressed(mixer, ("num_heads", "num_kv_heads", "head_dim", "rope_theta"), rotary_dims=0)
    if isinstance(mixer, MlpConfig):
        free = ("hidden_dim", "hidden_multiple", "use_bias")
        return parts.unexpressed(mixer, free, activation="relu_squared", gated=False)
    return [f"blocks of {mixer.kind!r} have no place, only of 'mamba2', 'attention' and 'mlp'"]


def _content_of(mixer: MixerConfig, d_model: int) -> dict[str, Any]:
    """The keys of the layers with a mixer."""
    if isinstance(mixer, MlpConfig):
        return {"intermediate_size": mixer.channels(d_model), "mlp_bias": mixer.use_bias}
    if isinstance(mixer, AttentionConfig):
        return {
            "num_attention_heads": mixer.num_heads,
            "num_key_value_heads": mixer.kv_heads,
            "head_dim": mixer.channels(d_model),
        }
    assert isinstance(mixer, Mamba2Config)
    return {
        **{key: getattr(mixer, ours) for key, ours in _MAMBA2_KEYS.items()},
        "mamba_num_heads": mixer.heads(d_model),
        "mamba_head_dim": mixer.head_dim,
        # That of random weights, which must not be below the least step.
        "time_step_max": max(mixer.dt_max, mixer.dt_lower_limit),
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    """The content of `config.json`; refuses a model that `NemotronHForCausalLM` cannot compute."""
    mixers = parts.blocks(config)
    parts.refuse(
        *parts.unexpressed(config, parts.MODEL_FIELDS),
        *dict.fromkeys(problem for mixer in dict.fromkeys(mixers) for problem in _unexpressed(mixer, config)),
    )
    words = {kind: word for word, kind in _KINDS.items()}
    content = {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        **_REQUIRED,
        **parts.model_content(config, eps="layer_norm_epsilon"),
        "rescale_prenorm_residual": config.rescale_residual,
        "layers_block_type": [words[type(mixer)] for mixer in mixers],
    }
    for word, kind in _KINDS.items():
        if of_kind := [mixer for mixer in mixers if isinstance(mixer, kind)]:
            content |= _content_of(parts.one_of_all(of_kind, word), config.d_model)
    return content


def _tensors(config: ModelConfig) -> Table:
    """How every parameter is stored."""

    def of_block(mixer: MixerConfig) -> parts.Tensors:
        prefix = f"{_LAYER}mixer."
        own: parts.Tensors
        if isinstance(mixer, Mamba2Config):
            own = parts.mamba_tensors(mixer, config.d_model, prefix)
        elif isinstance(mixer, AttentionConfig):
            own = parts.attention_tensors(mixer, config.d_model, prefix)
        else:
            assert isinstance(mixer, MlpConfig)
            own = parts.mlp_tensors(mixer, config.d_model, prefix)
        return {"norm/scale": Tensor(name=f"{_LAYER}norm.weight", shape=(config.d_model,)), **own}

    return whole_table(config, of_block, embedding="backbone.embeddings.weight", norm="backbone.norm_f.weight")


FORMAT = parts.hf_family(
    "NemotronHForCausalLM",
    "nemotron_h",
    read_config=_read,
    write_config=_write,
    tensors=_tensors,
    check_config=parts.check_widths,
    # `transformers` reads the head from the file even where it is to share the embedding's weights.
    tied_head="lm_head.weight",
)
