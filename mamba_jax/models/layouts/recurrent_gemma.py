"""RecurrentGemma: Griffin's recurrent blocks and local attention, as `RecurrentGemmaForCausalLM` of `transformers`.

A layer of theirs, a temporal block and a gated MLP, is two blocks of ours. Embeddings are multiplied by sqrt(d_model)
rounded to bfloat16, norms by 1 + weight, and logits are capped.

Source: arXiv 2404.07839.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from mamba_jax.config_base import require
from mamba_jax.errors import short
from mamba_jax.models.config import ModelConfig
from mamba_jax.models.layouts import parts
from mamba_jax.models.mixers.attention.config import AttentionConfig
from mamba_jax.models.mixers.declaration import MixerConfig
from mamba_jax.models.mixers.mlp.config import MlpConfig
from mamba_jax.models.mixers.rg_lru.config import RGLRUConfig
from mamba_jax.models.published import Table, Tensor, refuse_unsupported, whole_table

_REQUIRED = {"hidden_activation": "gelu_pytorch_tanh"}
_LAYER = "model.layers.{}."
# `transformers` repeats `block_types` this often, and takes as many as there are layers.
_REPEATS = 100


def _embedding_scale(d_model: int) -> float:
    return float(jnp.bfloat16(np.float32(d_model**0.5)))


def _words(content: Mapping[str, Any]) -> list[str]:
    """What the temporal blocks are, in order.

    Raises:
        InputError: the file says it in another way, or has blocks that there are not.
    """
    count = parts.layer_count(content)
    period = content.get("block_types", ["recurrent", "recurrent", "attention"])
    is_list = isinstance(period, list) and all(word in ("recurrent", "attention") for word in period[:count])
    require(is_list, f"block_types={short(period)} is not a list of 'recurrent' and 'attention'")
    most = len(period) * _REPEATS
    require(count <= most, f"num_hidden_layers={count} is more than {_REPEATS} times block_types={short(period)}")
    return (period[:count] * _REPEATS)[:count]


def _period(words: list[str]) -> list[str]:
    """The shortest `block_types` that repeat to these blocks."""
    lengths = range(-(-len(words) // _REPEATS), len(words) + 1)
    return next(
        words[:length] for length in lengths if all(word == words[place % length] for place, word in enumerate(words))
    )


def _read_recurrent(content: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "kind": "rg_lru",
        "lru_width": content.get("lru_width") or content["hidden_size"],
        "num_heads": content["num_attention_heads"],
        "conv_width": content.get("conv1d_width", 4),
    }


def _read_attention(content: Mapping[str, Any]) -> dict[str, Any]:
    """Half of each head is rotated if the file does not say it; heads share out the width whatever it says."""
    heads = parts.whole(content, "num_attention_heads", "heads")
    head_dim = parts.whole(content, "hidden_size", "channels") // heads
    refuse_unsupported(content, {"head_dim": head_dim})
    return {
        "kind": "attention",
        "num_heads": heads,
        "num_kv_heads": content.get("num_key_value_heads"),
        "head_dim": head_dim,
        "window": content.get("attention_window_size", 2048),
        "use_qkv_bias": content.get("attention_bias", False),
        "use_output_bias": True,
        **parts.rotary_fields(content, head_dim, fraction=0.5),
    }


def _read(content: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `ModelConfig`, blocks of a temporal mixer and of the MLP in turn."""
    refuse_unsupported(content, _REQUIRED)
    words = _words(content)
    readers = {"recurrent": _read_recurrent, "attention": _read_attention}
    temporal = {word: readers[word](content) for word in dict.fromkeys(words)}
    mlp = {
        "kind": "mlp",
        "hidden_dim": parts.whole(content, "intermediate_size", "channels", least=2) // 2,
        "activation": "gelu_tanh",
        "use_bias": True,
    }
    return {
        **parts.model_fields(content, tied=True),
        "norm_offset": 1.0,
        "embedding_scale": _embedding_scale(parts.whole(content, "hidden_size", "channels")),
        "logit_cap": content.get("logits_soft_cap", 30.0),
        **parts.hybrid_fields([mixer for word in words for mixer in (temporal[word], mlp)]),
    }


def _unexpressed(config: ModelConfig, mixer: MixerConfig) -> list[str]:
    """What the layout has no key for in a block with this mixer."""
    if isinstance(mixer, RGLRUConfig):
        return parts.unexpressed(mixer, ("lru_width", "num_heads", "conv_width", "decay_range"))
    if isinstance(mixer, MlpConfig):
        free = ("hidden_dim", "hidden_multiple")
        return parts.unexpressed(mixer, free, activation="gelu_tanh", use_bias=True)
    assert isinstance(mixer, AttentionConfig)
    free = ("num_heads", "num_kv_heads", "window", "rotary_dims", "rope_theta", "use_qkv_bias")
    head_dim = None if mixer.head_dim is None else config.d_model // mixer.num_heads
    problems = parts.unexpressed(mixer, free, head_dim=head_dim, use_output_bias=True)
    return problems if mixer.window is not None else [*problems, "Attention without window has no place"]


def _write(config: ModelConfig) -> dict[str, Any]:
    """The content of `config.json`; refuses a model that `RecurrentGemmaForCausalLM` cannot compute."""
    layers = parts.layers_of(config, (RGLRUConfig, AttentionConfig), (MlpConfig,))
    free, scale = (*parts.MODEL_FIELDS, "logit_cap"), _embedding_scale(config.d_model)
    mixers = dict.fromkeys(mixer for layer in layers for mixer in layer)
    parts.refuse(
        *parts.unexpressed(config, free, norm_offset=1.0, embedding_scale=scale),
        *(["Model without logit_cap has no place"] if config.logit_cap is None else []),
        *dict.fromkeys(problem for mixer in mixers for problem in _unexpressed(config, mixer)),
    )
    mlp = parts.one_of_all([mlp for _, mlp in layers], "MLP")
    temporal = [mixer for mixer, _ in layers]
    common = parts.model_content(config)
    del common["initializer_range"]
    return {
        "architectures": ["RecurrentGemmaForCausalLM"],
        "model_type": "recurrent_gemma",
        **_REQUIRED,
        **common,
        **_write_recurrent([mixer for mixer in temporal if isinstance(mixer, RGLRUConfig)], config.d_model),
        **_write_attention([mixer for mixer in temporal if isinstance(mixer, AttentionConfig)], config.d_model),
        "num_hidden_layers": len(layers),
        "num_attention_heads": parts.one_of_all([mixer.num_heads for mixer in temporal], "num_heads"),
        "block_types": _period(["recurrent" if isinstance(mixer, RGLRUConfig) else "attention" for mixer in temporal]),
        "intermediate_size": 2 * mlp.channels(config.d_model),
        "logits_soft_cap": config.logit_cap,
    }


def _write_recurrent(mixers: Sequence[RGLRUConfig], d_model: int) -> dict[str, Any]:
    """The keys of the recurrent blocks, if there are any."""
    if not mixers:
        return {}
    mixer = parts.one_of_all(mixers, "RGLRU")
    return {"lru_width": mixer.channels(d_model), "conv1d_width": mixer.conv_width}


def _write_attention(mixers: Sequence[AttentionConfig], d_model: int) -> dict[str, Any]:
    """The keys of the attention, if there is any."""
    if not mixers:
        return {}
    mixer = parts.one_of_all(mixers, "attention")
    rope = parts.rotary_content(mixer, d_model)["rope_parameters"]
    return {
        # A file that does not say means half of each head.
        "rope_parameters": {"partial_rotary_factor": 1.0, **rope},
        "num_key_value_heads": mixer.kv_heads,
        "head_dim": mixer.channels(d_model),
        "attention_window_size": mixer.window,
        "attention_bias": mixer.use_qkv_bias,
    }


def _of_recurrent(mixer: RGLRUConfig, d_model: int, prefix: str) -> parts.Tensors:
    """Those of a recurrent block, under names that begin with `prefix`; paths in the block."""
    channels, heads = mixer.channels(d_model), mixer.num_heads
    size, every = channels // heads, slice(None)
    branches = ("linear_y", "linear_x")
    gates = ("recurrent_gate", "input_gate")
    return {
        "mixer/in_proj/kernel": tuple(
            parts.matrix(f"{prefix}{name}.weight", (d_model,), (channels,), place=(every, branch))
            for branch, name in enumerate(branches)
        ),
        "mixer/in_proj/bias": tuple(
            parts.bias(f"{prefix}{name}.bias", channels, place=(branch,)) for branch, name in enumerate(branches)
        ),
        "mixer/conv1d/weight": Tensor(
            name=f"{prefix}conv_1d.weight",
            shape=(channels, 1, mixer.conv_width),
            to_file=lambda w: w.T[:, None],
            from_file=lambda w: w[:, 0].T,
        ),
        "mixer/conv1d/bias": parts.bias(f"{prefix}conv_1d.bias", channels),
        "mixer/rg_lru/gates/kernel": tuple(
            Tensor(name=f"{prefix}rg_lru.{name}_weight", shape=(heads, size, size), place=(every, every, gate))
            for gate, name in enumerate(gates)
        ),
        "mixer/rg_lru/gates/bias": tuple(
            Tensor(name=f"{prefix}rg_lru.{name}_bias", shape=(heads, size), place=(every, gate))
            for gate, name in enumerate(gates)
        ),
        "mixer/rg_lru/Lambda": Tensor(name=f"{prefix}rg_lru.recurrent_param", shape=(channels,)),
        "mixer/out_proj/kernel": parts.matrix(f"{prefix}linear_out.weight", (channels,), (d_model,)),
        "mixer/out_proj/bias": parts.bias(f"{prefix}linear_out.bias", d_model),
    }


def _tensors(config: ModelConfig) -> Table:
    """How every parameter is stored."""
    model = config.d_model

    def of_block(mixer: MixerConfig) -> parts.Tensors:
        part = "channel" if isinstance(mixer, MlpConfig) else "temporal"
        own: parts.Tensors
        if isinstance(mixer, MlpConfig):
            own = parts.mlp_tensors(mixer, model, f"{_LAYER}mlp_block.")
        elif isinstance(mixer, AttentionConfig):
            own = parts.attention_tensors(mixer, model, f"{_LAYER}temporal_block.")
        else:
            assert isinstance(mixer, RGLRUConfig)
            own = _of_recurrent(mixer, model, f"{_LAYER}temporal_block.")
        return {"norm/scale": Tensor(name=f"{_LAYER}{part}_pre_norm.weight", shape=(model,)), **own}

    return whole_table(config, of_block, norm="model.final_norm.weight", blocks_per_layer=2)


FORMAT = parts.hf_family(
    "RecurrentGemmaForCausalLM",
    "recurrent_gemma",
    read_config=_read,
    write_config=_write,
    tensors=_tensors,
    check_config=parts.check_widths,
)
