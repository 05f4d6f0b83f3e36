"""How Transformers of Llama's kind are published: as `LlamaForCausalLM` of `transformers`."""

from collections.abc import Mapping
from typing import Any

from mamba_jax.models.config import ModelConfig
from mamba_jax.models.layouts import parts
from mamba_jax.models.mixers.attention.config import AttentionConfig
from mamba_jax.models.mixers.declaration import MixerConfig
from mamba_jax.models.mixers.mlp.config import MlpConfig
from mamba_jax.models.published import Table, Tensor, refuse_unsupported, whole_table

_REQUIRED = {"hidden_act": "silu", "pretraining_tp": 1}
_LAYER = "model.layers.{}."


def _read(content: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `ModelConfig`, blocks of attention and of the MLP in turn."""
    refuse_unsupported(content, _REQUIRED | parts.NO_WINDOW)
    heads, has_bias = content["num_attention_heads"], content.get("attention_bias", False)
    head_dim = parts.head_channels(content)
    attention = AttentionConfig(
        num_heads=heads,
        num_kv_heads=content.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        use_qkv_bias=has_bias,
        use_output_bias=has_bias,
        **parts.rotary_fields(content, head_dim),
    )
    mlp = MlpConfig(
        hidden_dim=parts.whole(content, "intermediate_size", "channels"), use_bias=content.get("mlp_bias", False)
    )
    return parts.model_fields(content) | parts.hybrid_fields([attention, mlp] * parts.layer_count(content))


def _write(config: ModelConfig) -> dict[str, Any]:
    """The content of `config.json`; refuses a model that `LlamaForCausalLM` cannot compute."""
    parts.refuse_unexpressed(config, parts.MODEL_FIELDS)
    layers = parts.layers_of(config, (AttentionConfig,), (MlpConfig,))
    attention, mlp = parts.one_of_all(layers, "attention and MLP")
    parts.refuse_unexpressed(
        attention,
        ("num_heads", "num_kv_heads", "head_dim", "rope_theta", "use_qkv_bias"),
        rotary_dims=attention.channels(config.d_model) if attention.rotary_dims is not None else None,
        use_output_bias=attention.use_qkv_bias,
    )
    parts.refuse_unexpressed(mlp, ("hidden_dim", "hidden_multiple", "use_bias"))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **_REQUIRED,
        **parts.model_content(config),
        **parts.rotary_content(attention, config.d_model),
        "num_hidden_layers": len(layers),
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.channels(config.d_model),
        "attention_bias": attention.use_qkv_bias,
        "intermediate_size": mlp.channels(config.d_model),
        "mlp_bias": mlp.use_bias,
    }


def _tensors(config: ModelConfig) -> Table:
    """How every parameter is stored."""

    def of_block(mixer: MixerConfig) -> parts.Tensors:
        if isinstance(mixer, AttentionConfig):
            norm, own = "input_layernorm", parts.attention_tensors(mixer, config.d_model, f"{_LAYER}self_attn.")
        else:
            assert isinstance(mixer, MlpConfig)
            norm, own = "post_attention_layernorm", parts.mlp_tensors(mixer, config.d_model, f"{_LAYER}mlp.")
        return {"norm/scale": Tensor(name=f"{_LAYER}{norm}.weight", shape=(config.d_model,)), **own}

    return whole_table(config, of_block, norm="model.norm.weight", blocks_per_layer=2)


FORMAT = parts.hf_family(
    "LlamaForCausalLM",
    "llama",
    read_config=_read,
    write_config=_write,
    tensors=_tensors,
)
