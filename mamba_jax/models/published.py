"""How others publish models: the keys of their config files, and the names and orientations of their tensors."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from mamba_jax.errors import InputError, short
from mamba_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """How one parameter is stored.

    Attributes:
        name: in the file, with `{}` for the number of the layer.
        shape: in the file, that of one layer.
        rows: first row of the file's tensor that belongs to the parameter, and the first one that no longer does;
            None is all of them. Parameters that share a tensor share out its rows.
        to_file: our array, of one layer, to that of the file.
        from_file: the way back.
    """

    name: str
    shape: tuple[int, ...]
    rows: tuple[int, int] | None = None
    to_file: Callable[[np.ndarray], np.ndarray] = np.asarray
    from_file: Callable[[np.ndarray], np.ndarray] = np.asarray


# By the path of the parameter in our tree.
Table = dict[tuple[str, ...], Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """A layout in which models of a mixer are published: a `config.json`, and safetensors.

    Attributes:
        layout: its name; formats of several mixers share one, as "hf" is that of `transformers`.
        mixer: kind of the mixer.
        recognises: whether a `config.json` with this content, a JSON object, is one of the format.
        read_config: the content to fields of `ModelConfig` as in our own JSON, which are checked afterwards.
        check_config: what can be told once the model is known: (content, config).
        write_config: the config to a content.
        tensors: how every parameter is stored; the table's size does not depend on the model's.
        tied_head: name under which the embedding is written once more where the head shares it; None if it is not.
        keeps_extra: keys that say nothing of the network go along.
    """

    layout: str
    mixer: str
    recognises: Callable[[Mapping[str, Any]], bool]
    read_config: Callable[[Mapping[str, Any]], dict[str, Any]]
    check_config: Callable[[Mapping[str, Any], ModelConfig], None]
    write_config: Callable[[ModelConfig], dict[str, Any]]
    tensors: Callable[[ModelConfig], Table]
    tied_head: str | None = None
    keeps_extra: bool = False


def refuse_unsupported(content: Mapping[str, Any], required: Mapping[str, Any]) -> None:
    """Checks keys that may have one value only, if they are there.

    Raises:
        InputError: another value, in one short line.
    """
    for key, value in required.items():
        if content.get(key, value) != value:
            raise InputError(f"{key}={short(content[key])} is not supported, only {short(value)}")


def tensor_of_layer(name: str, *shape: int, **ways: Any) -> Tensor:
    """A tensor of a layer, as models of the Mamba family name them."""
    return Tensor(name="backbone.layers.{}." + name, shape=shape, **ways)


def backbone(config: ModelConfig, mixer: Mapping[str, Tensor], *, embedding: str) -> Table:
    """All tensors of a model of the Mamba family.

    Args:
        config: of the model.
        mixer: the tensors of a layer's mixer, by their paths in it, with slashes.
        embedding: name of the embedding, which the layouts do not agree on.
    """
    vocab, model = config.padded_vocab_size, config.d_model
    tensors = {
        "embedding/table": Tensor(name=embedding, shape=(vocab, model)),
        "norm_f/scale": Tensor(name="backbone.norm_f.weight", shape=(model,)),
        "layers/norm/scale": tensor_of_layer("norm.weight", model),
        **{f"layers/mixer/{path}": tensor for path, tensor in mixer.items()},
    }
    if not config.tie_embeddings:
        tensors["lm_head/table"] = Tensor(name="lm_head.weight", shape=(vocab, model))
    return {tuple(path.split("/")): tensor for path, tensor in tensors.items()}


# Value that a key of the authors' `config.json` must have, if it is there, for the blocks to be those of this library.
_ORIGINAL_REQUIRED = {"d_intermediate": 0, "attn_layer_idx": [], "rms_norm": True}


def layer_of_original(content: Mapping[str, Any]) -> Any:
    """The name of the mixer in the authors' `config.json`; None if it does not say, and means their first."""
    ssm = content.get("ssm_cfg")
    return ssm.get("layer") if isinstance(ssm, Mapping) else None


def from_original(content: Mapping[str, Any], *, known: Collection[str]) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Fields of `ModelConfig` but the mixer from the authors' `config.json`, and its keys of the mixer.

    Args:
        content: of the file.
        known: the keys that the mixer may have.

    Raises:
        InputError: a key that is not supported, in one short line.
    """
    refuse_unsupported(content, _ORIGINAL_REQUIRED)
    ssm = content.get("ssm_cfg", {})
    if not isinstance(ssm, dict):
        raise InputError(f"ssm_cfg={short(ssm)} is not a JSON object")
    if unknown := sorted(ssm.keys() - known):
        raise InputError(f"ssm_cfg keys {', '.join(unknown)[:100]} are not supported")
    fields = {
        "vocab_size": content["vocab_size"],
        "vocab_multiple": content.get("pad_vocab_size_multiple", 8),
        "d_model": content["d_model"],
        "num_layers": content["n_layer"],
        "norm_eps": content.get("norm_epsilon", 1e-5),
        "tie_embeddings": content.get("tie_embeddings", True),
    }
    return fields, ssm


def to_original(config: ModelConfig, ssm: Mapping[str, Any]) -> dict[str, Any]:
    """The content of the authors' `config.json`.

    Args:
        config: of the model.
        ssm: its keys of the mixer.

    Raises:
        InputError: the layout cannot express the model.
    """
    if config.norm_eps != 1e-5:
        raise InputError(f"the original layout fixes norm_eps at 1e-05, the model has {config.norm_eps}")
    return {
        "d_model": config.d_model,
        "d_intermediate": 0,
        "n_layer": config.num_layers,
        "vocab_size": config.vocab_size,
        "ssm_cfg": dict(ssm),
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": config.vocab_multiple,
        "tie_embeddings": config.tie_embeddings,
    }


def from_hf(content: Mapping[str, Any], *, tied: bool) -> dict[str, Any]:
    """Fields of `ModelConfig` but the mixer from a `config.json` of `transformers`.

    Args:
        content: of the file.
        tied: whether models whose file does not say so share the embedding with the head.
    """
    return {
        "vocab_size": content["vocab_size"],
        "vocab_multiple": 1,
        "d_model": content["hidden_size"],
        "num_layers": content["num_hidden_layers"],
        "norm_eps": content.get("layer_norm_epsilon", 1e-5),
        "tie_embeddings": content.get("tie_word_embeddings", tied),
        "embedding_std": content.get("initializer_range", 0.1),
        "rescale_residual": content.get("rescale_prenorm_residual", False),
    }


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """What a `config.json` of `transformers` says of a model of the Mamba family, besides the mixer."""
    return {
        "vocab_size": config.padded_vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.embedding_std,
        # `from_pretrained` scales what it has loaded if this is true; these weights are finished.
        "rescale_prenorm_residual": False,
        "residual_in_fp32": True,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
        "dtype": config.param_dtype,
    }


def hf_format(
    mixer: str,
    *,
    model_types: Collection[str],
    read_config: Callable[[Mapping[str, Any]], dict[str, Any]],
    check_config: Callable[[Mapping[str, Any], ModelConfig], None],
    write_config: Callable[[ModelConfig], dict[str, Any]],
    tensors: Callable[[ModelConfig], Mapping[str, Tensor]],
) -> Format:
    """The layout of `transformers` for a model of the Mamba family.

    Args:
        mixer: kind of the mixer.
        model_types: those of such a `config.json`.
        read_config: see `Format`.
        check_config: see `Format`.
        write_config: see `Format`.
        tensors: the tensors of a layer's mixer, as in `backbone`.
    """
    return Format(
        layout="hf",
        mixer=mixer,
        recognises=lambda content: content.get("model_type") in model_types,
        read_config=read_config,
        check_config=check_config,
        write_config=write_config,
        tensors=lambda config: backbone(config, tensors(config), embedding="backbone.embeddings.weight"),
        keeps_extra=True,
    )


def original_format(
    mixer: str,
    *,
    layers: Collection[str | None],
    read_config: Callable[[Mapping[str, Any]], dict[str, Any]],
    write_config: Callable[[ModelConfig], dict[str, Any]],
    tensors: Callable[[ModelConfig], Mapping[str, Tensor]],
) -> Format:
    """The authors' layout.

    Args:
        mixer: kind of the mixer.
        layers: what the authors call it; None for a file that does not say.
        read_config: see `Format`.
        write_config: see `Format`.
        tensors: the tensors of a layer's mixer, as in `backbone`.
    """
    return Format(
        layout="original",
        mixer=mixer,
        recognises=lambda content: "d_model" in content and layer_of_original(content) in layers,
        read_config=read_config,
        check_config=lambda content, config: None,
        write_config=write_config,
        tensors=lambda config: backbone(config, tensors(config), embedding="backbone.embedding.weight"),
        tied_head="lm_head.weight",
    )
