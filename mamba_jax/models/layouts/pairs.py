"""Layers of a mixer and of what acts on every token alone, with the names that Bamba and Jamba share."""

from collections.abc import Collection
from typing import Any

from mamba_jax.models.config import ModelConfig
from mamba_jax.models.layouts import parts
from mamba_jax.models.mixers.attention.config import AttentionConfig
from mamba_jax.models.mixers.declaration import MixerConfig
from mamba_jax.models.mixers.mamba1.config import Mamba1Config
from mamba_jax.models.mixers.mamba2.config import Mamba2Config
from mamba_jax.models.mixers.mlp.config import MlpConfig
from mamba_jax.models.mixers.moe.config import MoeConfig
from mamba_jax.models.published import Table, Tensor, whole_table

_LAYER = "model.layers.{}."


def heads_content(mixer: AttentionConfig, d_model: int) -> dict[str, Any]:
    """The keys for heads of attention; their width is left out where they share out that of the model."""
    channels = mixer.channels(d_model)
    content = {"num_attention_heads": mixer.num_heads, "num_key_value_heads": mixer.kv_heads}
    return content if channels * mixer.num_heads == d_model else content | {"head_dim": channels}


def without_attention(layers: Collection[int]) -> list[str]:
    """The problem of a model in which no layer is attention: only there `transformers` counts the tokens of a cache."""
    return [] if layers else ["no layer is attention, without which `transformers` cannot generate"]


def tensors(config: ModelConfig) -> Table:
    """How every parameter is stored."""

    def of_block(mixer: MixerConfig) -> parts.Tensors:
        norm, own = _of_mixer(mixer, config.d_model)
        return {"norm/scale": Tensor(name=f"{_LAYER}{norm}.weight", shape=(config.d_model,)), **own}

    return whole_table(config, of_block, norm="model.final_layernorm.weight", blocks_per_layer=2)


def _of_mixer(mixer: MixerConfig, d_model: int) -> tuple[str, parts.Tensors]:
    """The name of the norm before a mixer, and the mixer's tensors by their paths in the block."""
    if isinstance(mixer, AttentionConfig):
        return "input_layernorm", parts.attention_tensors(mixer, d_model, f"{_LAYER}self_attn.")
    if isinstance(mixer, Mamba1Config | Mamba2Config):
        return "input_layernorm", parts.mamba_tensors(mixer, d_model, f"{_LAYER}mamba.")
    prefix = f"{_LAYER}feed_forward."
    if isinstance(mixer, MoeConfig):
        return "pre_ff_layernorm", _of_experts(mixer, d_model, prefix)
    assert isinstance(mixer, MlpConfig)
    return "pre_ff_layernorm", parts.mlp_tensors(mixer, d_model, prefix)


def _of_experts(mixer: MoeConfig, d_model: int, prefix: str) -> parts.Tensors:
    """Those of a mixture, in which every expert has tensors of its own."""
    inner, every, own = mixer.channels(d_model), slice(None), {"members": mixer.num_experts}
    expert = f"{prefix}experts.{{}}."
    return {
        "mixer/router/kernel": parts.matrix(f"{prefix}router.weight", (d_model,), (mixer.num_experts,)),
        "mixer/experts/up_proj": tuple(
            parts.matrix(f"{expert}{name}.weight", (d_model,), (inner,), place=(every, half), **own)
            for half, name in enumerate(("gate_proj", "up_proj"))
        ),
        "mixer/experts/down_proj": parts.matrix(f"{expert}down_proj.weight", (inner,), (d_model,), **own),
    }
