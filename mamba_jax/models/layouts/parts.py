"""What the layouts of several model families share: blocks in order, and the tensors of attention and MLPs."""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from mamba_jax.config_base import require
from mamba_jax.errors import InputError, short
from mamba_jax.models.config import ModelConfig
from mamba_jax.models.mixers.attention.config import AttentionConfig
from mamba_jax.models.mixers.declaration import MixerConfig
from mamba_jax.models.mixers.mamba1 import published as mamba1
from mamba_jax.models.mixers.mamba1.config import Mamba1Config
from mamba_jax.models.mixers.mamba2 import published as mamba2
from mamba_jax.models.mixers.mamba2.config import Mamba2Config
from mamba_jax.models.mixers.mlp.config import MlpConfig
from mamba_jax.models.pattern import repeating_units
from mamba_jax.models.published import Format, Table, Tensor

# A file that claims more layers than this is damaged: the largest published models have about a hundred.
_MOST_LAYERS = 1000
# More than any base or share of a rotation is.
_MOST_ROTATION = 1e30

Tensors = Mapping[str, Tensor | tuple[Tensor, ...]]


def whole(content: Mapping[str, Any], key: str, what: str, *, least: int = 1, most: int = 2**32 - 1) -> int:
    """A whole number of a `config.json`, checked before anything is computed from it.

    Args:
        content: of the file.
        key: under which it stands.
        what: of which it is the number, for the message.
        least: smallest number that has a meaning.
        most: largest one.

    Raises:
        InputError: it is not such a number.
    """
    value = content[key]
    require(
        isinstance(value, int) and not isinstance(value, bool) and least <= value <= most,
        f"{key}={short(value)} is not a number of {what} from {least} to {most}",
    )
    return value


def layer_count(content: Mapping[str, Any], key: str = "num_hidden_layers") -> int:
    """The number of layers of a `config.json`.

    Raises:
        InputError: it is not a number from 1 to 1000.
    """
    return whole(content, key, "layers", most=_MOST_LAYERS)


def layer_numbers(content: Mapping[str, Any], key: str, count: int) -> set[int]:
    """The layers that a `config.json` lists, counted from 0; none if there is no list.

    Args:
        content: of the file.
        key: of the list.
        count: number of layers of the model.

    Raises:
        InputError: it is not a list of numbers of layers.
    """
    numbers = content.get(key)
    if numbers is None:
        return set()
    is_list = isinstance(numbers, list) and all(type(number) is int and 0 <= number < count for number in numbers)
    require(is_list, f"{key}={short(numbers)} is not a list of layers from 0 to {count - 1}")
    return set(numbers)


def head_channels(content: Mapping[str, Any]) -> int:
    """Channels of a head, which are the width shared out among the heads where a `config.json` does not say them."""
    if content.get("head_dim") is not None:
        return whole(content, "head_dim", "channels")
    return whole(content, "hidden_size", "channels") // whole(content, "num_attention_heads", "heads")


def hybrid_fields(mixers: Sequence[MixerConfig | Mapping[str, Any]]) -> dict[str, Any]:
    """Fields of `ModelConfig` for blocks with these mixers, in order: configs, or their fields as in our own JSON."""
    units = [
        {"mixers": [dataclasses.asdict(own) if isinstance(own, MixerConfig) else own for own in unit], "repeats": times}
        for unit, times in repeating_units(mixers)
    ]
    return {"num_layers": len(mixers), "mixer": {"kind": "hybrid", "units": units}}


def blocks(config: ModelConfig) -> list[MixerConfig]:
    """The mixers of a model's blocks, in order."""
    return [stack.mixer for unit in config.units for _ in range(unit[0].repeats) for stack in unit]


def check_widths(content: Mapping[str, Any], config: ModelConfig) -> None:
    """Makes sure that widths divide into heads and groups.

    Raises:
        InputError: those of a block do not.
    """
    del content
    for mixer in dict.fromkeys(blocks(config)):
        mixer.decisive(config.d_model)


def layers_of(config: ModelConfig, *kinds: Collection[type]) -> list[tuple[Any, ...]]:
    """The blocks of a model as the layers of a family that has several blocks of ours in each.

    Args:
        config: of the model.
        *kinds: what the first block of a layer may be, what the second, and so on.

    Raises:
        InputError: the blocks are not such layers.
    """
    mixers, size = blocks(config), len(kinds)
    names = [" or ".join(kind.__name__.removesuffix("Config") for kind in some) for some in kinds]
    for number, mixer in enumerate(mixers):
        here = number % size
        require(isinstance(mixer, tuple(kinds[here])), f"block {number} is {mixer.kind!r}, not {names[here]}")
    over = len(mixers) % size
    require(over == 0, f"the last block, {mixers[-1].kind!r}, has no {names[over]} after it")
    return [tuple(mixers[first : first + size]) for first in range(0, len(mixers), size)]


def one_of_all[T](values: Collection[T], what: str) -> T:
    """The value that all have.

    Raises:
        InputError: they differ, or there is none.
    """
    distinct = list(dict.fromkeys(values))
    if len(distinct) != 1:
        raise InputError(f"{what} must be the same in all layers, not {', '.join(map(short, distinct)) or 'missing'}")
    return distinct[0]


def one_of_kind[T: MixerConfig](mixers: Collection[MixerConfig], absent: T) -> T:
    """The mixer that all blocks of a kind have.

    Args:
        mixers: of all blocks.
        absent: of this kind; the result if no block is.

    Raises:
        InputError: they differ.
    """
    kind = type(absent)
    name = kind.__name__.removesuffix("Config")
    return one_of_all([mixer for mixer in mixers if isinstance(mixer, kind)] or [absent], name)


# Fields that say nothing of what trained weights are: names, how random ones are drawn, and what training alone adds.
_OF_TRAINING = (
    "kind",
    "dt_min",
    "dt_max",
    "dt_init",
    "dt_scale",
    "dt_init_floor",
    "a_init",
    "a_init_range",
    "conv_init",
    "balance_weight",
    "z_weight",
)


def unexpressed(config: MixerConfig | ModelConfig, free: Collection[str], **fixed: Any) -> list[str]:
    """What a layout has no key for, a short text for each field.

    Args:
        config: of the mixer or the model.
        free: fields that may have any value.
        **fixed: the only value of some others; the rest must be at their defaults.
    """
    problems = []
    for field in dataclasses.fields(config):
        if field.name in (*free, *_OF_TRAINING) or field.name.endswith("_implementation"):
            continue
        value, only = getattr(config, field.name), fixed.get(field.name, field.default)
        if value != only:
            name = type(config).__name__.removesuffix("Config")
            problems.append(f"{name} with {field.name}={short(value)} has no place, only {short(only)}")
    return problems


def refuse(*problems: str) -> None:
    """Raises an `InputError` that lists the problems, if there are any."""
    require(not problems, "; ".join(problems))


def refuse_unexpressed(config: MixerConfig | ModelConfig, free: Collection[str], **fixed: Any) -> None:
    """Raises an `InputError` with what `unexpressed` finds, if it does."""
    refuse(*unexpressed(config, free, **fixed))


# For classes of `transformers` whose attention reaches every token before.
NO_WINDOW = {"sliding_window": None}
# Fields of a model's config that say nothing of what a published layout holds, or that all of them have keys for.
MODEL_FIELDS = (
    "vocab_size",
    "d_model",
    "num_layers",
    "mixer",
    "vocab_multiple",
    "tie_embeddings",
    "norm_eps",
    "embedding_std",
    "rescale_residual",
    "param_dtype",
    "compute_dtype",
    "remat",
    "unroll",
)


def model_fields(content: Mapping[str, Any], *, eps: str = "rms_norm_eps", tied: bool = False) -> dict[str, Any]:
    """Fields of `ModelConfig` but its blocks from a `config.json` of `transformers`.

    Args:
        content: of the file.
        eps: key of the norms' epsilon.
        tied: whether a file that does not say so shares the embedding with the head.
    """
    return {
        "vocab_size": content["vocab_size"],
        "vocab_multiple": 1,
        "d_model": content["hidden_size"],
        "norm_eps": content.get(eps, 1e-6),
        "tie_embeddings": content.get("tie_word_embeddings", tied),
        "embedding_std": content.get("initializer_range", 0.02),
    }


def model_content(config: ModelConfig, *, eps: str = "rms_norm_eps") -> dict[str, Any]:
    """The keys of a `config.json` of `transformers` for what `model_fields` reads."""
    return {
        "vocab_size": config.padded_vocab_size,
        "hidden_size": config.d_model,
        eps: config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.embedding_std,
        "dtype": config.param_dtype,
        "use_cache": True,
    }


def matrix(name: str, inputs: tuple[int, ...], outputs: tuple[int, ...], **options: Any) -> Tensor:
    """A linear map, stored as (outputs, inputs) with each of them flat, and here as (*inputs, *outputs)."""
    shape = (math.prod(outputs), math.prod(inputs))
    return Tensor(
        name=name,
        shape=shape,
        to_file=lambda kernel: kernel.reshape(shape[::-1]).T,
        from_file=lambda weight: weight.T.reshape(*inputs, *outputs),
        **options,
    )


def bias(name: str, *shape: int, **options: Any) -> Tensor:
    """A bias, stored flat."""
    return Tensor(
        name=name,
        shape=(math.prod(shape),),
        to_file=np.ravel,
        from_file=lambda values: values.reshape(shape),
        **options,
    )


def mamba_tensors(mixer: Mamba1Config | Mamba2Config, d_model: int, prefix: str) -> dict[str, Tensor]:
    """Those of a Mamba mixer, under names that begin with `prefix`; paths in the block."""
    tensors = (
        mamba1.tensors_of_mixer(mixer, d_model, prefix)
        if isinstance(mixer, Mamba1Config)
        else mamba2.tensors_of_mixer(mixer, d_model, prefix)
    )
    return {f"mixer/{path}": tensor for path, tensor in tensors.items()}


def attention_tensors(mixer: AttentionConfig, d_model: int, prefix: str) -> dict[str, Tensor]:
    """Those of an attention with four projections, under names that begin with `prefix`; paths in the block."""
    channels, inputs = mixer.channels(d_model), mixer.input_dim or d_model
    tensors = {}
    for name, heads in (("q", mixer.num_heads), ("k", mixer.kv_heads), ("v", mixer.kv_heads)):
        tensors[f"mixer/{name}_proj/kernel"] = matrix(f"{prefix}{name}_proj.weight", (inputs,), (heads, channels))
        if mixer.use_qkv_bias:
            tensors[f"mixer/{name}_proj/bias"] = bias(f"{prefix}{name}_proj.bias", heads, channels)
    tensors["mixer/out_proj/kernel"] = matrix(f"{prefix}o_proj.weight", (mixer.num_heads * channels,), (d_model,))
    if mixer.use_output_bias:
        tensors["mixer/out_proj/bias"] = bias(f"{prefix}o_proj.bias", d_model)
    return tensors


def mlp_tensors(mixer: MlpConfig, d_model: int, prefix: str) -> dict[str, Tensor | tuple[Tensor, ...]]:
    """Those of an MLP whose gate and up have a projection each, under names that begin with `prefix`."""
    inner = mixer.channels(d_model)
    names = ("gate_proj", "up_proj") if mixer.gated else ("up_proj",)
    every = slice(None)
    tensors: dict[str, Tensor | tuple[Tensor, ...]] = {
        "mixer/up_proj/kernel": tuple(
            matrix(f"{prefix}{name}.weight", (d_model,), (inner,), place=(every, half))
            for half, name in enumerate(names)
        ),
        "mixer/down_proj/kernel": matrix(f"{prefix}down_proj.weight", (inner,), (d_model,)),
    }
    if mixer.use_bias:
        tensors["mixer/up_proj/bias"] = tuple(
            bias(f"{prefix}{name}.bias", inner, place=(half,)) for half, name in enumerate(names)
        )
        tensors["mixer/down_proj/bias"] = bias(f"{prefix}down_proj.bias", d_model)
    return tensors


def rotary_fields(content: Mapping[str, Any], head_dim: int, *, fraction: float = 1.0) -> dict[str, Any]:
    """Our fields of the rotation, from a `config.json` of this year's `transformers` or of earlier ones.

    Args:
        content: of the file.
        head_dim: channels of a head.
        fraction: the part of them that is rotated if the file does not say it.

    Raises:
        InputError: positions are scaled, which is not supported, or a value is no number.
    """
    rope = content.get("rope_scaling") or content.get("rope_parameters") or {}
    require(isinstance(rope, dict), f"rope_scaling or rope_parameters={short(rope)} is not an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    require(kind == "default", f"rope_type={short(kind)} is not supported, only 'default'")
    values = {}
    for key, default in (("rope_theta", 10_000.0), ("partial_rotary_factor", fraction)):
        value = values[key] = rope.get(key, content.get(key, default))
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < _MOST_ROTATION
        require(is_number, f"{key}={short(value)} is not a number from 0 to {_MOST_ROTATION}")
    return {
        "rope_theta": float(values["rope_theta"]),
        "rotary_dims": int(head_dim * values["partial_rotary_factor"]),
    }


def rotary_content(mixer: AttentionConfig, d_model: int) -> dict[str, Any]:
    """The key of the rotation in a `config.json` of `transformers`."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": mixer.rope_theta}
    channels, rotated = mixer.channels(d_model), mixer.rotated_channels(d_model)
    if rotated != channels:
        part = rotated / channels
        # Rounded downwards it would stand for a channel less.
        rope["partial_rotary_factor"] = part if int(channels * part) == rotated else math.nextafter(part, 1.0)
    return {"rope_parameters": rope}


def hf_family(
    name: str,
    model_type: str,
    *,
    read_config: Callable[[Mapping[str, Any]], dict[str, Any]],
    write_config: Callable[[ModelConfig], dict[str, Any]],
    tensors: Callable[[ModelConfig], Table],
    check_config: Callable[[Mapping[str, Any], ModelConfig], None] = lambda content, config: None,
    tied_head: str | None = None,
) -> Format:
    """The layout of `transformers` for a family of hybrids.

    Args:
        name: of its class.
        model_type: that of its `config.json`.
        read_config: see `Format`, as for all others.
        write_config: see `Format`.
        tensors: see `Format`.
        check_config: see `Format`.
        tied_head: see `Format`.
    """
    return Format(
        layout="hf",
        mixer="hybrid",
        recognises=lambda content: content.get("model_type") == model_type,
        read_config=read_config,
        check_config=check_config,
        write_config=write_config,
        tensors=tensors,
        tied_head=tied_head,
        keeps_extra=True,
        family=name,
    )
