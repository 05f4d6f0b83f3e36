"""Published checkpoints: a folder with `config.json` and safetensors, in any of the formats that mixers declare."""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
from flax import traverse_util

from mamba_jax.errors import InputError, short
from mamba_jax.export import files
from mamba_jax.export import published_config as configs
from mamba_jax.export.published_config import format_of
from mamba_jax.export.weights import StoredTensor, first_few, open_weights
from mamba_jax.models.config import DType, ModelConfig
from mamba_jax.models.parameters import Params, define
from mamba_jax.models.published import Table, Tensor

_HEAD = "lm_head.weight"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A checkpoint in memory.

    Attributes:
        config: config of the model; both its dtypes are that of the weights.
        layout: name of the folder's layout, such as "hf".
        params: the parameters as numpy arrays, with layers stacked.
        extra: keys of a Hugging Face `config.json` that do not describe the network, such as the ids of special tokens.
    """

    config: ModelConfig
    layout: str
    params: Params
    extra: dict[str, Any]


def save(
    path: str | Path,
    config: ModelConfig,
    params: Params,
    *,
    layout: str,
    extra: Mapping[str, Any] | None = None,
    companions: Mapping[str, bytes] | None = None,
) -> None:
    """Writes `config.json` and `model.safetensors` into a new folder: all files appear together, or none.

    Args:
        path: the folder; it must not exist, or be empty.
        config: config of the model.
        params: its parameters, with layers stacked.
        layout: "hf" for `transformers`, "original" for the authors' code.
        extra: further keys of `config.json`; the original layout has no place for them.
        companions: further files by name, such as those of the tokenizer.

    Raises:
        InputError: the folder is not empty or cannot be written, or the layout cannot express the model.
    """
    path = Path(path)
    files.require_new_folder(path)
    config_json = _config_text(config, layout, extra or {})
    tensors = tensors_of(config, params, layout=layout)
    with files.new_folder(path) as folder:
        files.write_safetensors(folder / "model.safetensors", tensors)
        for name, data in {"config.json": config_json, **(companions or {})}.items():
            (folder / name).write_bytes(data)


def tensors_of(config: ModelConfig, params: Params, *, layout: str) -> dict[str, np.ndarray]:
    """The tensors of a model's files in a layout, by name; arguments as in `save`."""
    published = format_of(config, layout)
    table = published.tensors(config)
    flat = traverse_util.flatten_dict(params)
    parts: dict[str, list[tuple[tuple[int, int] | None, np.ndarray]]] = defaultdict(list)
    for key, given in table.items():
        value = np.asarray(flat.pop(key))
        for tensor in given:
            for name, part in tensor.parts(value):
                parts[name].append((tensor.rows, tensor.to_file(part)))
    assert not flat, f"no name for {list(flat)}"
    tensors = {name: _joined(given) for name, given in parts.items()}
    if published.tied_head is not None and config.tie_embeddings:
        tensors[published.tied_head] = tensors[table["embedding", "table"][0].name]
    return tensors


def _joined(parts: list[tuple[tuple[int, int] | None, np.ndarray]]) -> np.ndarray:
    """A tensor of the file, from the parameters that share out its rows."""
    if len(parts) == 1:
        return parts[0][1]
    return np.concatenate([value for _, value in sorted(parts, key=lambda part: part[0] or (0, 0))])


def _config_text(config: ModelConfig, layout: str, extra: Mapping[str, Any]) -> bytes:
    content = configs.to_json(config, layout=layout, extra=extra)
    try:
        return (json.dumps(content, indent=2) + "\n").encode()
    except RecursionError:
        raise InputError(f"config.json: a value is nested too deeply among {short(sorted(extra))}") from None


def load(path: str | Path) -> LoadedModel:
    """Reads a folder in either layout, sharded or not; the whole model or nothing.

    Names, dtypes and shapes are compared before any values are read, so a folder takes the memory of the tensors that
    it holds, whatever its config claims.

    Args:
        path: a folder with `config.json` and `model.safetensors`, `model.safetensors.index.json` or, if torch is
            installed, `pytorch_model.bin`.

    Returns:
        The config, and the parameters as numpy arrays of the stored dtype.

    Raises:
        InputError: a file is missing or damaged, no format knows the config, or a tensor is missing,
            unexpected, of another shape or not finite; the message names the first of them.
    """
    path = Path(path)
    published = configs.read(path / "config.json")
    config, layout = published.config, published.format.layout
    stored = open_weights(path)
    table = published.format.tensors(config)
    # A folder may hold a tied head whatever its layout: programs write what they have in memory.
    head = stored.pop(_HEAD, None) if config.tie_embeddings else None
    if problems := list(_problems(stored, table, config.num_layers)):
        raise InputError(f"{path} does not hold the model of its config.json: {first_few(problems)}")
    dtypes = {tensor.dtype for tensor in stored.values()}
    dtype = cast(DType, dtypes.pop() if len(dtypes) == 1 else "float32")
    try:
        shapes: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(define(config).params)
        flat = {key: _read(path, stored, given, shapes[key].shape, dtype) for key, given in table.items()}
        if head is not None and not _same(head, stored[table["embedding", "table"][0].name]):
            raise InputError(f"{path}: {_HEAD} differs from the embedding although the config ties them")
    except MemoryError:
        raise InputError(f"{path} does not fit the memory of this machine: use a larger one") from None
    config = dataclasses.replace(config, param_dtype=dtype, compute_dtype=dtype)
    return LoadedModel(config=config, layout=layout, params=traverse_util.unflatten_dict(flat), extra=published.extra)


def _problems(stored: Mapping[str, StoredTensor], table: Table, num_layers: int) -> Iterator[str]:
    """Yields a message for each tensor that is missing, unexpected, or of a wrong shape or dtype; reads no values."""
    if num_layers > len(stored):
        yield f"{short(num_layers)} layers, but only {len(stored)} tensors"
        return
    used: set[str] = set()
    for tensor in (tensor for given in table.values() for tensor in given):
        if (tensor.members or 0) > len(stored):
            yield f"{short(tensor.members)} experts, but only {len(stored)} tensors"
            return
        # A tensor that several parameters share is told of once.
        for name in [name for name in tensor.names() if name not in used]:
            used.add(name)
            if name not in stored:
                yield f"missing {name}"
            elif stored[name].shape != tensor.shape:
                yield f"{name} has shape {short(stored[name].shape)}, expected {short(tensor.shape)}"
            elif stored[name].dtype not in get_args(DType):
                yield f"{name} has dtype {stored[name].dtype}, expected {' or '.join(get_args(DType))}"
    for name in stored.keys() - used:
        yield f"unexpected {name if len(name) < 100 else short(name)}"


def _read(
    path: Path, stored: Mapping[str, StoredTensor], given: tuple[Tensor, ...], shape: tuple[int, ...], dtype: DType
) -> np.ndarray:
    """Reads one parameter tensor by tensor, so that at most one tensor of the file is in memory twice."""
    result = np.empty(shape, dtype)
    for tensor in given:
        rows = slice(None) if tensor.rows is None else slice(*tensor.rows)
        for name, part in tensor.parts(result):
            value = tensor.from_file(_finite(path, stored, name)[rows])
            assert part.shape == value.shape, f"{name} gives {value.shape} for {part.shape}"
            part[...] = value
    return result


def _finite(path: Path, stored: Mapping[str, StoredTensor], name: str) -> np.ndarray:
    value = stored[name].read()
    if not np.isfinite(value).all():
        count = value.size - np.count_nonzero(np.isfinite(value))
        raise InputError(f"{path}: {name} has {count} values of {value.size} that are not finite: fetch it again")
    return value


def _same(one: StoredTensor, other: StoredTensor) -> bool:
    return one.shape == other.shape and np.array_equal(one.read(), other.read())
