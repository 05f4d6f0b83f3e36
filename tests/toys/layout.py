"""A layout that the library does not know: dots in names, matrices as we keep them."""

from collections.abc import Mapping
from typing import Any

from flax import traverse_util

from mamba_jax.export.published_config import FORMATS
from mamba_jax.models.config import ModelConfig
from mamba_jax.models.parameters import define
from mamba_jax.models.published import Format, Table, Tensor, refuse_unsupported
from tests.toys.mixer import EmaConfig


def read_config(content: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `ModelConfig`; a missing key is told by its `KeyError`."""
    refuse_unsupported(content, {"version": 1})
    return {
        "vocab_size": content["vocabulary"],
        "vocab_multiple": 1,
        "d_model": content["width"],
        "num_layers": content["depth"],
        "mixer": {"kind": "ema", "rate": content["rate"]},
    }


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The content of `config.json`."""
    assert isinstance(config.mixer, EmaConfig)
    return {
        "toy": True,
        "version": 1,
        "vocabulary": config.padded_vocab_size,
        "width": config.d_model,
        "depth": config.num_layers,
        "rate": config.mixer.rate,
    }


def tensors(config: ModelConfig) -> Table:
    """Every parameter under its path, with dots; in a layer without the axis that counts the layers."""
    table: Table = {}
    shapes: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(define(config).params)
    for path, leaf in shapes.items():
        numbers = range(config.num_layers) if path[0] == "layers" else None
        name, shape = ("layer{}", leaf.shape[1:]) if numbers else (path[0], leaf.shape)
        table[path] = (Tensor(name=".".join([name, *path[1:]]), shape=shape, numbers=numbers),)
    return table


TOY = Format(
    layout="toy",
    mixer="ema",
    recognises=lambda content: "toy" in content,
    read_config=read_config,
    check_config=lambda content, config: None,
    write_config=write_config,
    tensors=tensors,
)
FORMATS.append(TOY)
