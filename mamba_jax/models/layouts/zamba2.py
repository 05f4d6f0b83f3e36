"""How Zamba2 models are published: `Zamba2ForCausalLM` of `transformers`.

Layers are Mamba-2, and "hybrid" ones in front of whose Mamba-2 stands a block of attention and an MLP. Hybrid layers
take such blocks in turn, of which there are `num_mem_blocks`; a block's weights are stored in the first layer that uses
it, and so are the adapters of all layers for it, under the numbers of the hybrid layers.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mamba_jax.config_base import require
from mamba_jax.errors import short
from mamba_jax.models.config import ModelConfig
from mamba_jax.models.layouts import parts
from mamba_jax.models.mixers.attention.config import AttentionConfig
from mamba_jax.models.mixers.declaration import MixerConfig
from mamba_jax.models.mixers.mamba2.config import Mamba2Config
from mamba_jax.models.mixers.mamba2.published import tensors_of_mixer
from mamba_jax.models.mixers.mlp.config import MlpConfig
from mamba_jax.models.mixers.with_shared.config import SharedBlockConfig, WithSharedConfig
from mamba_jax.models.published import Table, Tensor, refuse_unsupported, table_of, whole_table

_REQUIRED = {"hidden_act": "gelu", "use_shared_attention_adapter": False}
_MAMBA_KEYS = {
    "mamba_d_state": "state_dim",
    "mamba_d_conv": "conv_width",
    "mamba_expand": "expand",
    "mamba_ngroups": "num_groups",
    "time_step_max": "dt_max",
    "time_step_floor": "dt_init_floor",
    "use_conv_bias": "use_conv_bias",
    "add_bias_linear": "use_bias",
}
_KINDS = {"linear_attention": False, "mamba": False, "hybrid": True}


def _read(content: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `ModelConfig`, whose hybrid layers name their shared block."""
    refuse_unsupported(content, _REQUIRED)
    kinds, count = content["layers_block_type"], parts.layer_count(content)
    require(
        isinstance(kinds, list) and len(kinds) == count and all(kind in _KINDS for kind in kinds),
        f"layers_block_type={short(kinds)} does not name {count} layers, each linear_attention or hybrid",
    )
    mamba = _read_mamba(content)
    with_shared = [
        WithSharedConfig(inner=mamba, shared=shared, adapter_rank=content.get("adapter_rank", 128))
        for shared in _read_shared(content)
    ]
    mixers: list[MixerConfig] = []
    uses = 0
    for kind in kinds:
        mixers.append(with_shared[uses % len(with_shared)] if _KINDS[kind] else mamba)
        uses += _KINDS[kind]
    return parts.model_fields({"rms_norm_eps": 1e-5, **content}, tied=True) | parts.hybrid_fields(mixers)


def _read_mamba(content: Mapping[str, Any]) -> Mamba2Config:
    """The Mamba-2 of every layer; `transformers` keeps its steps above `time_step_min`."""
    fields = {ours: content[key] for key, ours in _MAMBA_KEYS.items() if key in content}
    sizes = {"mamba_expand": 2, "n_mamba_heads": 8} | dict(content)
    expand, model = parts.whole(sizes, "mamba_expand", "times the width"), parts.whole(sizes, "hidden_size", "channels")
    heads = parts.whole(sizes, "n_mamba_heads", "heads")
    least = content.get("time_step_min", 0.001)
    return Mamba2Config(head_dim=expand * model // heads, dt_min=least, dt_lower_limit=least, **fields)


def _read_shared(content: Mapping[str, Any]) -> list[SharedBlockConfig]:
    """The blocks that hybrid layers take in turn."""
    sizes = {"num_mem_blocks": 1} | dict(content)
    model, heads = parts.whole(sizes, "hidden_size", "channels"), parts.whole(sizes, "num_attention_heads", "heads")
    count = parts.whole(sizes, "num_mem_blocks", "blocks", most=1000)
    channels = 2 * model // heads
    rotary = parts.rotary_fields(content, channels)
    if not content.get("use_mem_rope"):
        rotary["rotary_dims"] = 0
    attention = AttentionConfig(
        num_heads=heads,
        num_kv_heads=content.get("num_key_value_heads") or heads,
        head_dim=channels,
        softmax_scale=(channels / 2) ** -0.5,
        **rotary,
    )
    mlp = MlpConfig(
        hidden_dim=content.get("intermediate_size") or 4 * model,
        activation="gelu",
        use_bias=content.get("add_bias_linear", False),
    )
    return [SharedBlockConfig(name=f"block_{number}", attention=attention, mlp=mlp) for number in range(count)]


def _write(config: ModelConfig) -> dict[str, Any]:
    """The content of `config.json`; refuses a model that `Zamba2ForCausalLM` cannot compute."""
    parts.refuse_unexpressed(config, parts.MODEL_FIELDS)
    mixers = parts.blocks(config)
    mamba = parts.one_of_all([_own(mixer) for mixer in mixers], "Mamba-2")
    hybrids = [mixer for mixer in mixers if isinstance(mixer, WithSharedConfig)]
    names = list(dict.fromkeys(mixer.shared.name for mixer in hybrids))
    require(
        [mixer.shared.name for mixer in hybrids] == [names[use % len(names)] for use in range(len(hybrids))],
        "shared blocks are not taken in turn",
    )
    attention, mlp, rank = parts.one_of_all(
        [(mixer.shared.attention, mixer.shared.mlp, mixer.adapter_rank) for mixer in hybrids], "shared blocks"
    )
    require(rank is not None, "layers with a shared block need an adapter: give adapter_rank")
    return {
        "architectures": ["Zamba2ForCausalLM"],
        "model_type": "zamba2",
        **_REQUIRED,
        **parts.model_content(config),
        **_write_mamba(config, mamba),
        **_write_shared(config, attention, mlp),
        "num_hidden_layers": len(mixers),
        "layers_block_type": ["hybrid" if mixer in hybrids else "linear_attention" for mixer in mixers],
        "hybrid_layer_ids": _hybrid_layers(mixers),
        "num_mem_blocks": len(names),
        "adapter_rank": rank,
    }


def _own(mixer: MixerConfig) -> Mamba2Config:
    """The Mamba-2 of a layer."""
    own = mixer.inner if isinstance(mixer, WithSharedConfig) else mixer
    require(isinstance(own, Mamba2Config), f"a block is {own.kind!r}, not Mamba2")
    assert isinstance(own, Mamba2Config)
    return own


def _hybrid_layers(mixers: Sequence[MixerConfig]) -> list[int]:
    return [number for number, mixer in enumerate(mixers) if isinstance(mixer, WithSharedConfig)]


def _write_mamba(config: ModelConfig, mamba: Mamba2Config) -> dict[str, Any]:
    """What `config.json` says of the Mamba-2 of every layer."""
    parts.refuse_unexpressed(
        mamba,
        (*_MAMBA_KEYS.values(), "head_dim", "dt_min", "a_init_range", "conv_init"),
        dt_lower_limit=mamba.dt_min,
        norm_group_size=mamba.norm_group_size and mamba.channels(config.d_model) // mamba.num_groups,
    )
    heads = mamba.heads(config.d_model)
    return {
        **{key: getattr(mamba, ours) for key, ours in _MAMBA_KEYS.items()},
        "time_step_min": mamba.dt_min,
        "n_mamba_heads": heads,
        "mamba_headdim": mamba.head_dim,
    }


def _write_shared(config: ModelConfig, attention: AttentionConfig, mlp: MlpConfig) -> dict[str, Any]:
    """What `config.json` says of the shared blocks."""
    channels = 2 * config.d_model // attention.num_heads
    parts.refuse_unexpressed(
        attention,
        ("num_heads", "num_kv_heads", "rope_theta", "input_dim"),
        head_dim=channels,
        softmax_scale=(channels / 2) ** -0.5,
        rotary_dims=attention.rotary_dims if attention.rotary_dims in (0, None) else channels,
    )
    parts.refuse_unexpressed(mlp, ("hidden_dim", "hidden_multiple"), activation="gelu", use_bias=_own_bias(config))
    return {
        **parts.rotary_content(attention if attention.rotary_dims else _turned(attention), config.d_model),
        "use_mem_rope": attention.rotary_dims != 0,
        "num_attention_heads": attention.num_heads,
        "num_query_groups": attention.num_heads,
        "num_key_value_heads": attention.kv_heads,
        "kv_channels": config.d_model // attention.num_heads,
        "attention_head_dim": channels,
        "attention_hidden_size": 2 * config.d_model,
        "intermediate_size": mlp.channels(config.d_model),
    }


def _own_bias(config: ModelConfig) -> bool:
    return _own(parts.blocks(config)[0]).use_bias


def _turned(attention: AttentionConfig) -> AttentionConfig:
    """With all channels rotated: `transformers` reads the base of a rotation that it does not make."""
    return dataclasses.replace(attention, rotary_dims=None)


def _tensors(config: ModelConfig) -> Table:
    """How every parameter is stored."""
    model, layer = config.d_model, "model.layers.{}."
    mixers = parts.blocks(config)
    hybrid_layers = _hybrid_layers(mixers)

    def of_block(mixer: MixerConfig) -> parts.Tensors:
        prefix, inner = (f"{layer}mamba_decoder.", "inner/") if isinstance(mixer, WithSharedConfig) else (layer, "")
        mamba = tensors_of_mixer(_own(mixer), model, f"{prefix}mamba.")
        tensors: dict[str, Tensor | tuple[Tensor, ...]] = {
            "norm/scale": Tensor(name=f"{prefix}input_layernorm.weight", shape=(model,)),
            **{f"mixer/{inner}{path}": tensor for path, tensor in mamba.items()},
        }
        if isinstance(mixer, WithSharedConfig):
            tensors["mixer/linear/kernel"] = parts.matrix(f"{layer}linear.weight", (model,), (model,))
            tensors |= _adapters(mixer, model, _place(mixer, config))
        return tensors

    table = whole_table(config, of_block, norm="model.final_layernorm.weight")
    for path, (tensor, *_) in table.items():
        if path[-2].startswith("adapter"):
            assert tensor.numbers is not None
            uses = [hybrid_layers.index(number) for number in tensor.numbers]
            table[path] = (dataclasses.replace(tensor, numbers=uses),)
    for name in config.shared_blocks:
        mixer = next(one for one in mixers if isinstance(one, WithSharedConfig) and one.shared.name == name)
        table |= table_of({f"shared_{name}/{path}": one for path, one in _of_shared(mixer, model, config).items()})
    return table


def _place(mixer: WithSharedConfig, config: ModelConfig) -> str:
    """What the names of a shared block's tensors begin with."""
    first = next(
        number
        for number, other in enumerate(parts.blocks(config))
        if isinstance(other, WithSharedConfig) and other.shared.name == mixer.shared.name
    )
    return f"model.layers.{first}.shared_transformer."


def _adapters(mixer: WithSharedConfig, model: int, prefix: str) -> dict[str, Tensor]:
    """The tensors of a layer's adapter, numbered by the hybrid layers."""
    assert mixer.adapter_rank is not None
    rank, mlp = (mixer.adapter_rank,), mixer.shared.mlp
    name = prefix + "feed_forward.gate_up_proj_adapter_list.{}"
    return {
        "mixer/adapter_down/kernel": parts.matrix(f"{name}.0.weight", (model,), rank),
        "mixer/adapter_up/kernel": parts.matrix(f"{name}.1.weight", rank, (2, mlp.channels(model))),
    }


def _of_shared(mixer: WithSharedConfig, model: int, config: ModelConfig) -> dict[str, Tensor]:
    """The tensors of a shared block, by their paths in it."""
    prefix, shared = _place(mixer, config), mixer.shared
    inner = shared.mlp.channels(model)
    attention = parts.attention_tensors(shared.reading(model), model, f"{prefix}self_attn.")
    tensors = {
        "norm/scale": Tensor(name=f"{prefix}input_layernorm.weight", shape=(2 * model,)),
        "mlp_norm/scale": Tensor(name=f"{prefix}pre_ff_layernorm.weight", shape=(model,)),
        **{path.replace("mixer/", "attention/"): tensor for path, tensor in attention.items()},
        "mlp/up_proj/kernel": parts.matrix(f"{prefix}feed_forward.gate_up_proj.weight", (model,), (2, inner)),
        "mlp/down_proj/kernel": parts.matrix(f"{prefix}feed_forward.down_proj.weight", (inner,), (model,)),
    }
    if shared.mlp.use_bias:
        tensors["mlp/up_proj/bias"] = parts.bias(f"{prefix}feed_forward.gate_up_proj.bias", 2, inner)
        tensors["mlp/down_proj/bias"] = parts.bias(f"{prefix}feed_forward.down_proj.bias", model)
    return tensors


FORMAT = parts.hf_family(
    "Zamba2ForCausalLM",
    "zamba2",
    read_config=_read,
    write_config=_write,
    tensors=_tensors,
)
