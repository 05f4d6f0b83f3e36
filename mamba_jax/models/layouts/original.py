"""How the authors publish Mamba models with attention or MLPs, such as mamba2attn-2.7b: more keys of their layout.

Every layer is a Mamba mixer, or attention if `attn_layer_idx` lists it, and all have an MLP after it if
`d_intermediate` is not 0. Models of Mamba layers alone are published as their mixers' formats say.
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
from mamba_jax.models.mixers.mamba1.config import Mamba1Config
from mamba_jax.models.mixers.mamba2.config import Mamba2Config
from mamba_jax.models.mixers.mlp.config import MlpConfig
from mamba_jax.models.published import (
    Format,
    Table,
    Tensor,
    layer_of_original,
    refuse_unsupported,
    rows_of,
    whole_table,
)
from pallas_kernels.common.rounding import round_up

_PURE = {"d_intermediate": 0, "attn_layer_idx": []}
_MAMBA = (Mamba1Config, Mamba2Config)
_LAYER = "backbone.layers.{}."
# The authors' MLP rounds its width up to a multiple of this.
_MLP_MULTIPLE = 128
# Keys of `attn_cfg` with our fields and the authors' defaults.
_ATTENTION_KEYS: dict[str, tuple[str, Any]] = {
    "num_heads": ("num_heads", None),
    "num_heads_kv": ("num_kv_heads", None),
    "head_dim": ("head_dim", None),
    "d_conv": ("conv_width", 0),
    "qkv_proj_bias": ("use_qkv_bias", True),
    "out_proj_bias": ("use_output_bias", True),
    "softmax_scale": ("softmax_scale", None),
    "rotary_emb_dim": ("rotary_dims", 0),
    "rotary_emb_base": ("rope_theta", 10_000.0),
}
_ATTENTION_REQUIRED = {"causal": True, "mlp_dim": 0, "rotary_emb_interleaved": False}


def _recognises(content: Mapping[str, Any]) -> bool:
    return "d_model" in content and any(content.get(key, value) != value for key, value in _PURE.items())


def _pure_format(content: Mapping[str, Any]) -> Format:
    """The format of models that are made of this file's Mamba layers alone."""
    known = (found for mixer in _MAMBA for found in mixer.formats())
    here = [found for found in known if found.layout == "original" and found.recognises(content)]
    require(len(here) == 1, f"ssm_cfg.layer={short(layer_of_original(content))} is not supported")
    return here[0]


def _read(content: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `ModelConfig`: those of a model of Mamba layers, and the other blocks between them."""
    count = parts.layer_count(content, "n_layer")
    with_attention = parts.layer_numbers(content, "attn_layer_idx", count)
    width = parts.whole({**_PURE, **content}, "d_intermediate", "channels", least=0)
    fields = _pure_format(content).read_config({**content, **_PURE})
    attention = _read_attention(content.get("attn_cfg", {})) if with_attention else {}
    mlps = [MlpConfig(hidden_dim=round_up(width, _MLP_MULTIPLE))] if width else []
    layers = ([attention if layer in with_attention else fields["mixer"], *mlps] for layer in range(count))
    return fields | parts.hybrid_fields([mixer for layer in layers for mixer in layer])


def _read_attention(given: Any) -> dict[str, Any]:
    """Fields of `AttentionConfig` from `attn_cfg`."""
    require(isinstance(given, dict), f"attn_cfg={short(given)} is not a JSON object")
    unknown = sorted(given.keys() - _ATTENTION_KEYS.keys() - _ATTENTION_REQUIRED.keys())
    require(not unknown, f"attn_cfg keys {', '.join(unknown)[:100]} are not supported")
    refuse_unsupported({"causal": False, **given}, _ATTENTION_REQUIRED)
    require("num_heads" in given, "attn_cfg lacks the key 'num_heads'")
    fields = {ours: given.get(key, default) for key, (ours, default) in _ATTENTION_KEYS.items()}
    return {"kind": "attention", **fields, "conv_width": fields["conv_width"] or None}


def _write(config: ModelConfig) -> dict[str, Any]:
    """The content of `config.json`; a key of the mixers is left out where it has the authors' default."""
    parts.refuse_unexpressed(config, parts.MODEL_FIELDS)
    with_mlp = _has_mlp(config)
    layers = parts.layers_of(config, (*_MAMBA, AttentionConfig), *([(MlpConfig,)] if with_mlp else []))
    with_attention = [number for number, layer in enumerate(layers) if isinstance(layer[0], AttentionConfig)]
    mambas = [first for first, *_ in layers if isinstance(first, _MAMBA)]
    # A model without Mamba layers says nothing of them.
    mamba: MixerConfig = parts.one_of_all(mambas or [Mamba1Config()], "the Mamba mixer")
    pure = next(found for found in mamba.formats() if found.layout == "original")
    attention = parts.one_of_all([layers[number][0] for number in with_attention] or [None], "attention")
    return {
        **pure.write_config(dataclasses.replace(config, mixer=mamba, num_layers=len(layers))),
        "d_intermediate": _width(config, [layer[1] for layer in layers]) if with_mlp else 0,
        "attn_layer_idx": with_attention,
        "attn_cfg": {} if attention is None else _write_attention(attention, config.d_model),
    }


def _has_mlp(config: ModelConfig) -> bool:
    return any(isinstance(mixer, MlpConfig) for mixer in parts.blocks(config))


def _width(config: ModelConfig, mlps: Sequence[MlpConfig]) -> int:
    """Channels of the MLP of all layers."""
    mlp = parts.one_of_all(mlps, "the MLP")
    parts.refuse_unexpressed(mlp, ("hidden_dim", "hidden_multiple"))
    width = mlp.channels(config.d_model)
    require(width % _MLP_MULTIPLE == 0, f"Mlp with hidden_dim={width} has no place, only multiples of {_MLP_MULTIPLE}")
    return width


def _write_attention(attention: AttentionConfig, d_model: int) -> dict[str, Any]:
    """The content of `attn_cfg`; refuses options without a key."""
    free = [ours for ours, _ in _ATTENTION_KEYS.values()]
    # Where the authors have the convolution, it has a bias.
    parts.refuse_unexpressed(attention, free if attention.conv_width else [*free, "use_conv_bias"])
    values = dataclasses.asdict(attention) | {
        "head_dim": attention.channels(d_model),
        "conv_width": attention.conv_width or 0,
        "rotary_dims": attention.rotated_channels(d_model),
    }
    chosen = {key: values[ours] for key, (ours, default) in _ATTENTION_KEYS.items() if values[ours] != default}
    return {"causal": True, **chosen}


def _tensors(config: ModelConfig) -> Table:
    """How every parameter is stored."""
    model = config.d_model

    def of_block(mixer: MixerConfig) -> parts.Tensors:
        norm, own = _of_mixer(mixer, model)
        return {"norm/scale": Tensor(name=f"{_LAYER}{norm}.weight", shape=(model,)), **own}

    return whole_table(
        config,
        of_block,
        embedding="backbone.embedding.weight",
        norm="backbone.norm_f.weight",
        blocks_per_layer=2 if _has_mlp(config) else 1,
    )


def _of_mixer(mixer: MixerConfig, model: int) -> tuple[str, parts.Tensors]:
    """The name of the norm before a mixer, and the mixer's tensors by their paths in the block."""
    prefix = f"{_LAYER}mixer."
    if isinstance(mixer, _MAMBA):
        return "norm", parts.mamba_tensors(mixer, model, prefix)
    if isinstance(mixer, AttentionConfig):
        return "norm", _of_attention(mixer, model, prefix)
    assert isinstance(mixer, MlpConfig)
    inner, prefix = mixer.channels(model), f"{_LAYER}mlp."
    # The rows of what is gated come first there, those of the gate here.
    up = Tensor(
        name=f"{prefix}fc1.weight",
        shape=(2 * inner, model),
        to_file=lambda kernel: kernel[:, ::-1].reshape(model, 2 * inner).T,
        from_file=lambda weight: weight.T.reshape(model, 2, inner)[:, ::-1],
    )
    down = parts.matrix(f"{prefix}fc2.weight", (inner,), (model,))
    return "norm2", {"mixer/up_proj/kernel": up, "mixer/down_proj/kernel": down}


def _of_attention(mixer: AttentionConfig, model: int, prefix: str) -> dict[str, Tensor]:
    """Those of attention: queries, keys and values share one projection and one convolution, a row for each channel."""
    channels = mixer.channels(model)
    heads = {"q": mixer.num_heads, "k": mixer.kv_heads, "v": mixer.kv_heads}
    rows = rows_of({name: count * channels for name, count in heads.items()})
    total = rows["v"][1]

    def shared(tensor: Tensor, name: str) -> Tensor:
        """The tensor of all rows, of which these are the parameter's."""
        return dataclasses.replace(tensor, shape=(total, *tensor.shape[1:]), rows=rows[name])

    tensors = {
        "mixer/out_proj/kernel": parts.matrix(f"{prefix}out_proj.weight", (mixer.num_heads * channels,), (model,))
    }
    if mixer.use_output_bias:
        tensors["mixer/out_proj/bias"] = parts.bias(f"{prefix}out_proj.bias", model)
    for name, count in heads.items():
        projection = parts.matrix(f"{prefix}in_proj.weight", (model,), (count, channels))
        tensors[f"mixer/{name}_proj/kernel"] = shared(projection, name)
        if mixer.use_qkv_bias:
            tensors[f"mixer/{name}_proj/bias"] = shared(parts.bias(f"{prefix}in_proj.bias", count, channels), name)
        if mixer.conv_width is not None:
            taps = Tensor(
                name=f"{prefix}conv1d.weight",
                shape=(total, 1, mixer.conv_width),
                to_file=lambda weight: weight.T[:, None],
                from_file=lambda weight: weight[:, 0].T,
            )
            tensors[f"mixer/{name}_conv1d/weight"] = shared(taps, name)
            tensors[f"mixer/{name}_conv1d/bias"] = shared(parts.bias(f"{prefix}conv1d.bias", count * channels), name)
    return tensors


FORMAT = Format(
    layout="original",
    mixer="hybrid",
    family="the authors'",
    recognises=_recognises,
    read_config=_read,
    check_config=lambda content, config: None,
    write_config=_write,
    tensors=_tensors,
    tied_head="lm_head.weight",
)
