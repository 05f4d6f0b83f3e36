"""How hybrids of Bamba's kind are published: as `BambaForCausalLM` of `transformers`.

Every layer is Mamba-2 or attention, and then an MLP.
"""

from collections.abc import Mapping
from typing import Any

from mamba_jax.models.config import ModelConfig
from mamba_jax.models.layouts import pairs, parts
from mamba_jax.models.mixers.attention.config import AttentionConfig
from mamba_jax.models.mixers.mamba2.config import Mamba2Config
from mamba_jax.models.mixers.mamba2.published import limits_from, limits_to_hf
from mamba_jax.models.mixers.mlp.config import MlpConfig
from mamba_jax.models.published import refuse_unsupported

_REQUIRED = {"hidden_act": "silu"}
# `transformers` does not read this key of older files, and rotates half of a head.
_OF_OLDER_FILES = {"partial_rotary_factor": 0.5}
_HALF = 0.5
_MAMBA_KEYS = {
    "mamba_d_state": "state_dim",
    "mamba_n_groups": "num_groups",
    "mamba_d_conv": "conv_width",
    "mamba_expand": "expand",
    "mamba_proj_bias": "use_bias",
    "mamba_conv_bias": "use_conv_bias",
}
# What a file that lacks a key means.
_DEFAULTS: dict[str, Any] = {
    "rms_norm_eps": 1e-5,
    "mamba_n_groups": 1,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_proj_bias": False,
    "mamba_conv_bias": True,
    "mamba_d_head": "auto",
    "attention_bias": False,
    "mlp_bias": False,
}


def _read(content: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `ModelConfig`, the two blocks of every layer in turn."""
    refuse_unsupported(content, _REQUIRED | parts.NO_WINDOW | _OF_OLDER_FILES)
    content = {**_DEFAULTS, **content}
    count = parts.layer_count(content)
    with_attention = parts.layer_numbers(content, "attn_layer_indices", count)
    parts.refuse(*pairs.without_attention(with_attention))
    head_dim = parts.head_channels(content)
    attention = AttentionConfig(
        num_heads=content["num_attention_heads"],
        num_kv_heads=content["num_key_value_heads"],
        head_dim=head_dim,
        use_qkv_bias=content["attention_bias"],
        use_output_bias=content["attention_bias"],
        **parts.rotary_fields(content, head_dim, fraction=_HALF),
    )
    mamba = Mamba2Config(
        head_dim=_mamba_head_channels(content),
        norm_eps=content["rms_norm_eps"],
        **{ours: content[key] for key, ours in _MAMBA_KEYS.items()},
        **limits_from(content, "time_step_limit"),
    )
    mlp = MlpConfig(hidden_dim=parts.whole(content, "intermediate_size", "channels"), use_bias=content["mlp_bias"])
    mixers = [mixer for layer in range(count) for mixer in (attention if layer in with_attention else mamba, mlp)]
    return parts.model_fields(content) | parts.hybrid_fields(mixers)


def _mamba_head_channels(content: Mapping[str, Any]) -> int:
    """Channels of a head of the recurrence, which share out all of them where the file does not say."""
    heads = parts.whole(content, "mamba_n_heads", "heads")
    if content["mamba_d_head"] != "auto":
        return parts.whole(content, "mamba_d_head", "channels")
    width, expand = parts.whole(content, "hidden_size", "channels"), parts.whole(content, "mamba_expand", "times")
    return width * expand // heads


def _check(content: Mapping[str, Any], config: ModelConfig) -> None:
    """Compares what the file says twice."""
    for mixer in parts.blocks(config):
        if isinstance(mixer, Mamba2Config):
            refuse_unsupported(content, {"mamba_n_heads": mixer.heads(config.d_model)})
        if isinstance(mixer, AttentionConfig):
            refuse_unsupported(content, {"attn_rotary_emb": mixer.rotary_dims})


def _write(config: ModelConfig) -> dict[str, Any]:
    """The content of `config.json`; refuses a model that `BambaForCausalLM` cannot compute."""
    layers = parts.layers_of(config, (Mamba2Config, AttentionConfig), (MlpConfig,))
    firsts, seconds = zip(*layers, strict=True)
    attention = parts.one_of_kind(firsts, AttentionConfig(rotary_dims=0))
    # A model without any Mamba layer says of them what has a meaning.
    mamba = parts.one_of_kind(firsts, Mamba2Config(head_dim=2 * config.d_model, norm_eps=config.norm_eps))
    mlp = parts.one_of_all(seconds, "the MLP")
    with_attention = [number for number, first in enumerate(firsts) if isinstance(first, AttentionConfig)]
    parts.refuse(
        *parts.unexpressed(config, parts.MODEL_FIELDS),
        *_unexpressed(config, attention, mamba, mlp),
        *pairs.without_attention(with_attention),
    )
    rotation = parts.rotary_content(attention, config.d_model)
    rotation["rope_parameters"].setdefault("partial_rotary_factor", 1.0)
    return {
        "architectures": ["BambaForCausalLM"],
        "model_type": "bamba",
        **_REQUIRED,
        **parts.model_content(config),
        **rotation,
        **pairs.heads_content(attention, config.d_model),
        "num_hidden_layers": len(layers),
        "attn_layer_indices": with_attention,
        "attention_bias": attention.use_qkv_bias,
        **{key: getattr(mamba, name) for key, name in _MAMBA_KEYS.items()},
        "mamba_d_head": mamba.head_dim,
        "mamba_n_heads": mamba.heads(config.d_model),
        "time_step_limit": limits_to_hf(mamba),
        "intermediate_size": mlp.channels(config.d_model),
        "mlp_bias": mlp.use_bias,
    }


def _unexpressed(config: ModelConfig, attention: AttentionConfig, mamba: Mamba2Config, mlp: MlpConfig) -> list[str]:
    """The options of the mixers that a file has no key for."""
    channels = mamba.channels(config.d_model)
    return [
        *parts.unexpressed(
            attention,
            ("num_heads", "num_kv_heads", "head_dim", "rotary_dims", "rope_theta", "use_qkv_bias"),
            use_output_bias=attention.use_qkv_bias,
        ),
        *parts.unexpressed(
            mamba,
            (*_MAMBA_KEYS.values(), "head_dim", "dt_lower_limit", "dt_upper_limit"),
            norm_eps=config.norm_eps,
            norm_group_size=None if mamba.norm_group_size is None else channels // mamba.num_groups,
        ),
        *parts.unexpressed(mlp, ("hidden_dim", "hidden_multiple", "use_bias")),
    ]


FORMAT = parts.hf_family(
    "BambaForCausalLM",
    "bamba",
    read_config=_read,
    write_config=_write,
    tensors=pairs.tensors,
    check_config=_check,
)
