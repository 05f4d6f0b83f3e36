"""How others publish models: the keys of their config files, and the names and orientations of their tensors."""

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mamba_jax.errors import InputError, short
from mamba_jax.models.config import ModelConfig
from mamba_jax.models.mixers.declaration import MixerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """How a parameter, or a part of it, is stored.

    Attributes:
        name: in the file, with `{}` for the number of the layer, and where there are members, one more for theirs.
        shape: in the file, that of one layer and member.
        numbers: the file's numbers of the layers that are stacked in the parameter; None if it is not stacked.
        members: length of the parameter's next dimension, if the file has a tensor for each of its elements, as for
            experts; None if it has one for all.
        place: where in the parameter, of one layer and member, the tensor's values lie; () is all of it. Tensors that
            share a parameter share out its places.
        rows: first row of the file's tensor that belongs to the parameter, and the first one that no longer does;
            None is all of them. Parameters that share a tensor share out its rows.
        to_file: our array, of one layer and member, to that of the file.
        from_file: the way back.
    """

    name: str
    shape: tuple[int, ...]
    numbers: Sequence[int] | None = None
    members: int | None = None
    place: tuple[int | slice, ...] = ()
    rows: tuple[int, int] | None = None
    to_file: Callable[[np.ndarray], np.ndarray] = np.asarray
    from_file: Callable[[np.ndarray], np.ndarray] = np.asarray

    def parts(self, value: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Names in the file, and the views of a parameter's array that are stored there, in our orientation."""
        for name, index in self._stored():
            yield name, value[index][self.place]

    def names(self) -> Iterator[str]:
        """All names in the file."""
        return (name for name, _ in self._stored())

    def _stored(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names in the file, and the index of the layer and member in the parameter that each stands for."""
        layers = [((), ())] if self.numbers is None else (((at,), (number,)) for at, number in enumerate(self.numbers))
        for index, number in layers:
            for member in [()] if self.members is None else ((at,) for at in range(self.members)):
                yield self.name.format(*number, *member), (*index, *member)


# How a parameter is stored, by its path in our tree: in one tensor or in several.
Table = dict[tuple[str, ...], tuple[Tensor, ...]]


def table_of(tensors: Mapping[str, Tensor | tuple[Tensor, ...]]) -> Table:
    """A table from paths with slashes, and with tensors for themselves where there is one."""
    return {tuple(path.split("/")): given if isinstance(given, tuple) else (given,) for path, given in tensors.items()}


def rows_of(sizes: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """The `rows` of parameters that share a tensor.

    Args:
        sizes: number of rows of each, in their order there.
    """
    ends = itertools.accumulate(sizes.values())
    return {name: (end - size, end) for (name, size), end in zip(sizes.items(), ends, strict=True)}


def stacked(
    config: ModelConfig,
    tensors: Callable[[MixerConfig], Mapping[str, Tensor | tuple[Tensor, ...]]],
    *,
    blocks_per_layer: int = 1,
) -> dict[str, tuple[Tensor, ...]]:
    """The tensors of all blocks, by the paths of the parameters in which blocks are stacked.

    Args:
        config: of the model.
        tensors: those of a block with this mixer, by their paths in it.
        blocks_per_layer: how many blocks of ours are a layer of the file, which counts layers from 0.
    """
    found: dict[str, tuple[Tensor, ...]] = {}
    for stack in config.stacks:
        blocks = config.block_numbers[stack.name]
        numbers = blocks if blocks_per_layer == 1 else [block // blocks_per_layer for block in blocks]
        for path, given in tensors(stack.mixer).items():
            own = given if isinstance(given, tuple) else (given,)
            found[f"{stack.name}/{path}"] = tuple(dataclasses.replace(tensor, numbers=numbers) for tensor in own)
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """A layout in which models of a mixer are published: a `config.json`, and safetensors.

    Attributes:
        layout: its name; formats of several mixers share one, as "hf" is that of `transformers`.
        mixer: kind of the mixer, or "hybrid".
        recognises: whether a `config.json` with this content, a JSON object, is one of the format.
        read_config: the content to fields of `ModelConfig` as in our own JSON, which are checked afterwards.
        check_config: what can be told once the model is known: (content, config).
        write_config: the config to a content.
        tensors: how every parameter is stored; the table's size does not depend on the model's.
        tied_head: name under which the embedding is written once more where the head shares it; None if it is not.
        keeps_extra: keys that say nothing of the network go along.
        family: name of the models, which tells formats of hybrids in the same layout apart.
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
    family: str = ""


def refuse_unsupported(content: Mapping[str, Any], required: Mapping[str, Any]) -> None:
    """Checks keys that may have one value only, if they are there.

    Raises:
        InputError: another value, in one short line.
    """
    for key, value in required.items():
        if content.get(key, value) != value:
            raise InputError(f"{key}={short(content[key])} is not supported, only {short(value)}")


def whole_table(
    config: ModelConfig,
    of_block: Callable[[MixerConfig], Mapping[str, Tensor | tuple[Tensor, ...]]],
    *,
    norm: str,
    embedding: str = "model.embed_tokens.weight",
    blocks_per_layer: int = 1,
) -> Table:
    """The table of a model.

    Args:
        config: of the model.
        of_block: tensors of a block with a mixer, by their paths in it.
        norm: name of the last norm's scale.
        embedding: name of the embedding.
        blocks_per_layer: see `stacked`.
    """
    vocab, model = config.padded_vocab_size, config.d_model
    tensors: dict[str, Tensor | tuple[Tensor, ...]] = {
        "embedding/table": Tensor(name=embedding, shape=(vocab, model)),
        "norm_f/scale": Tensor(name=norm, shape=(model,)),
        **stacked(config, of_block, blocks_per_layer=blocks_per_layer),
    }
    if not config.tie_embeddings:
        tensors["lm_head/table"] = Tensor(name="lm_head.weight", shape=(vocab, model))
    return table_of(tensors)


def backbone(config: ModelConfig, mixer: Mapping[str, Tensor], *, embedding: str) -> Table:
    """All tensors of a model of the Mamba family.

    Args:
        config: of the model.
        mixer: the tensors of a layer's mixer, by their paths in it, with slashes.
        embedding: name of the embedding, which the layouts do not agree on.
    """
    of_block = {"norm/scale": Tensor(name="backbone.layers.{}.norm.weight", shape=(config.d_model,))}
    of_block |= {f"mixer/{path}": tensor for path, tensor in mixer.items()}
    return whole_table(config, lambda mixer: of_block, norm="backbone.norm_f.weight", embedding=embedding)


# Value that a key of the authors' `config.json` must have, if it is there, for the blocks to be those of this library.
_ORIGINAL_REQUIRED = {"rms_norm": True}


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


def _refuse_scales(config: ModelConfig) -> None:
    """Refuses what no layout of Mamba layers alone has a key for."""
    for name, only in (("norm_offset", 0.0), ("embedding_scale", 1.0), ("logit_cap", None)):
        if (value := getattr(config, name)) != only:
            raise InputError(f"the published layouts of Mamba models cannot express model.{name}={value}, only {only}")


def to_original(config: ModelConfig, ssm: Mapping[str, Any]) -> dict[str, Any]:
    """The content of the authors' `config.json`.

    Args:
        config: of the model.
        ssm: its keys of the mixer.

    Raises:
        InputError: the layout cannot express the model.
    """
    _refuse_scales(config)
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
    """What a `config.json` of `transformers` says of a model of the Mamba family, besides the mixer.

    Raises:
        InputError: the layout cannot express the model.
    """
    _refuse_scales(config)
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
