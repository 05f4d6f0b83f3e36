"""How hybrids of Jamba's kind are published: as `JambaForCausalLM` of `transformers`.

Every layer is Mamba-1, whose selection has norms with weights, or attention without positions, and then an MLP or a
mixture of experts. Layers of attention and those with experts come at equal distances.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mamba_jax.config_base import require
from mamba_jax.models.config import ModelConfig
from mamba_jax.models.layouts import pairs, parts
from mamba_jax.models.mixers.attention.config import AttentionConfig
from mamba_jax.models.mixers.declaration import MixerConfig
from mamba_jax.models.mixers.mamba1.config import Mamba1Config
from mamba_jax.models.mixers.mlp.config import MlpConfig
from mamba_jax.models.mixers.moe.config import MoeConfig
from mamba_jax.models.published import refuse_unsupported

_REQUIRED = {"hidden_act": "silu"}
_MAMBA_KEYS = {
    "mamba_d_state": "state_dim",
    "mamba_d_conv": "conv_width",
    "mamba_expand": "expand",
    "mamba_proj_bias": "use_bias",
    "mamba_conv_bias": "use_conv_bias",
}
# What a file that lacks a key means.
_DEFAULTS: dict[str, Any] = {
    "rms_norm_eps": 1e-6,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_proj_bias": False,
    "mamba_conv_bias": True,
    "mamba_dt_rank": "auto",
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "attn_layer_period": 8,
    "attn_layer_offset": 4,
    "router_aux_loss_coef": 0.001,
}


def _read(content: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `ModelConfig`, the two blocks of every layer in turn."""
    refuse_unsupported(content, _REQUIRED | parts.NO_WINDOW)
    content = {**_DEFAULTS, **content}
    count, inner = parts.layer_count(content), parts.whole(content, "intermediate_size", "channels")
    attention = AttentionConfig(
        num_heads=content["num_attention_heads"],
        num_kv_heads=content["num_key_value_heads"],
        head_dim=parts.head_channels(content),
        rotary_dims=0,
    )
    mamba = Mamba1Config(
        dt_rank=None if content["mamba_dt_rank"] == "auto" else parts.whole(content, "mamba_dt_rank", "channels"),
        selection_norm_eps=content["rms_norm_eps"],
        selection_norm_weights=True,
        **{ours: content[key] for key, ours in _MAMBA_KEYS.items()},
    )
    feed_forward: list[MixerConfig] = [MlpConfig(hidden_dim=inner)] * count
    # A single expert is an MLP.
    if parts.whole(content, "num_experts", "experts") > 1:
        experts = MoeConfig(
            hidden_dim=inner,
            num_experts=content["num_experts"],
            experts_per_token=content["num_experts_per_tok"],
            balance_weight=content["router_aux_loss_coef"],
        )
        for layer in _at_distances(content, "expert_layer", count):
            feed_forward[layer] = experts
    with_attention = _at_distances(content, "attn_layer", count)
    parts.refuse(*pairs.without_attention(with_attention))
    first: list[MixerConfig] = [attention if layer in with_attention else mamba for layer in range(count)]
    mixers = [mixer for layer in zip(first, feed_forward, strict=True) for mixer in layer]
    return parts.model_fields(content) | parts.hybrid_fields(mixers)


def _at_distances(content: Mapping[str, Any], name: str, count: int) -> range:
    """The layers whose number leaves the offset when divided by the period."""
    period = parts.whole(content, f"{name}_period", "layers")
    offset = parts.whole(content, f"{name}_offset", "layers", least=0, most=period - 1)
    return range(offset, count, period)


def _distances(layers: Sequence[int], count: int, name: str, what: str) -> dict[str, int]:
    """The two keys that tell which of a number of layers are of a kind; at least one is.

    Raises:
        InputError: they are not at equal distances.
    """
    offset = layers[0]
    found = [period for period in range(offset + 1, count + 1) if [*range(offset, count, period)] == [*layers]]
    require(
        len(found) > 0, f"layers {', '.join(map(str, layers))} {what}, which are not at equal distances from the first"
    )
    return {f"{name}_period": found[0], f"{name}_offset": offset}


def _write(config: ModelConfig) -> dict[str, Any]:
    """The content of `config.json`; refuses a model that `JambaForCausalLM` cannot compute."""
    layers = parts.layers_of(config, (Mamba1Config, AttentionConfig), (MlpConfig, MoeConfig))
    firsts, seconds = zip(*layers, strict=True)
    attention = parts.one_of_kind(firsts, AttentionConfig(rotary_dims=0))
    # A model without any Mamba layer says of them what has a meaning.
    mamba = parts.one_of_kind(firsts, Mamba1Config(selection_norm_eps=config.norm_eps, selection_norm_weights=True))
    inner = parts.one_of_all([second.channels(config.d_model) for second in seconds], "hidden_dim")
    with_attention = [number for number, first in enumerate(firsts) if isinstance(first, AttentionConfig)]
    parts.refuse(
        *parts.unexpressed(config, parts.MODEL_FIELDS),
        *_unexpressed(config, attention, mamba),
        *(problem for mixer in dict.fromkeys(seconds) for problem in _unexpressed_after(mixer)),
        *pairs.without_attention(with_attention),
    )
    return {
        "architectures": ["JambaForCausalLM"],
        "model_type": "jamba",
        **_REQUIRED,
        **parts.model_content(config),
        **pairs.heads_content(attention, config.d_model),
        "num_hidden_layers": len(layers),
        **_distances(with_attention, len(layers), "attn_layer", "are attention"),
        **{key: getattr(mamba, name) for key, name in _MAMBA_KEYS.items()},
        "mamba_dt_rank": mamba.rank(config.d_model),
        "intermediate_size": inner,
        **_experts_content(seconds),
    }


def _experts_content(feed_forward: Collection[MixerConfig]) -> dict[str, Any]:
    """The keys of the experts; without any, the number that says so is enough."""
    layers = [number for number, mixer in enumerate(feed_forward) if isinstance(mixer, MoeConfig)]
    if not layers:
        return {"num_experts": 1}
    experts = parts.one_of_kind(feed_forward, MoeConfig())
    return {
        "num_experts": experts.num_experts,
        "num_experts_per_tok": experts.experts_per_token,
        "router_aux_loss_coef": experts.balance_weight,
        **_distances(layers, len(feed_forward), "expert_layer", "have experts"),
    }


def _unexpressed(config: ModelConfig, attention: AttentionConfig, mamba: Mamba1Config) -> list[str]:
    """The options of what comes first in a layer that a file has no key for."""
    return [
        *parts.unexpressed(attention, ("num_heads", "num_kv_heads", "head_dim", "rope_theta"), rotary_dims=0),
        *parts.unexpressed(
            mamba,
            (*_MAMBA_KEYS.values(), "dt_rank"),
            selection_norm_eps=config.norm_eps,
            selection_norm_weights=True,
        ),
    ]


def _unexpressed_after(mixer: MlpConfig | MoeConfig) -> list[str]:
    """The options of what comes second."""
    if isinstance(mixer, MlpConfig):
        return parts.unexpressed(mixer, ("hidden_dim", "hidden_multiple"))
    problems = parts.unexpressed(mixer, ("hidden_dim", "hidden_multiple", "num_experts", "experts_per_token"))
    return [*problems, "Moe with num_experts=1 has no place, only more"] if mixer.num_experts == 1 else problems


FORMAT = parts.hf_family(
    "JambaForCausalLM",
    "jamba",
    read_config=_read,
    write_config=_write,
    tensors=pairs.tensors,
)
