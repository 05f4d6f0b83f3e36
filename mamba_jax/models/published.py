"""How others publish models: the keys of their config files, and the names and orientations of their tensors."""

import dataclasses
from collections.abc import Callable, Mapping
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
        to_file: our array, of one layer, to that of the file.
        from_file: the way back.
    """

    name: str
    shape: tuple[int, ...]
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
