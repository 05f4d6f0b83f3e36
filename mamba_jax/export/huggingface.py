"""Mamba-1 checkpoints as safetensors, in the original layout and in that of Hugging Face `MambaForCausalLM`.

The layouts differ in the name of the embedding, in `config.json`, and in whether a tied head is written. Tensors keep
PyTorch's orientation there: linear weights (out, in), convolution weights (channels, 1, taps).
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from mamba_jax.errors import InputError
from mamba_jax.export import files
from mamba_jax.export import published_config as configs
from mamba_jax.export.published_config import Layout
from mamba_jax.export.weights import StoredTensor, first_few, open_weights
from mamba_jax.models.config import DType, ModelConfig
from mamba_jax.models.parameters import Params

_HEAD = "lm_head.weight"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A checkpoint in memory.

    Attributes:
        config: of the model; it computes in the dtype of the weights.
        layout: of the folder.
        params: numpy arrays, layers stacked.
        extra: keys of a Hugging Face `config.json` that do not describe the network, such as the ids of special tokens.
    """

    config: ModelConfig
    layout: Layout
    params: Params
    extra: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tensor:
    """How one parameter is stored: its name (with `{}` for the layer), its shape, and the way there and back."""

    name: str
    shape: tuple[int, ...]
    to_file: Callable[[np.ndarray], np.ndarray] = np.asarray
    from_file: Callable[[np.ndarray], np.ndarray] = np.asarray


Table = dict[tuple[str, ...], _Tensor]


def _layer(name: str, *shape: int, **ways: Callable[[np.ndarray], np.ndarray]) -> _Tensor:
    return _Tensor(name="backbone.layers.{}." + name, shape=shape, **ways)


def _table(config: ModelConfig, layout: Layout) -> Table:
    """Storage of every parameter, by its path in our tree; of a size that does not depend on the model's."""
    vocab, model, inner, rank = config.padded_vocab_size, config.d_model, config.d_inner, config.dt_rank
    mixer, state, width = config.mixer, config.mixer.state_dim, config.mixer.conv_width
    transpose = {"to_file": np.transpose, "from_file": np.transpose}
    embedding = "backbone.embeddings.weight" if layout == "hf" else "backbone.embedding.weight"
    in_proj = _layer(
        "mixer.in_proj.weight",
        2 * inner,
        model,
        to_file=lambda w: w.reshape(w.shape[0], 2 * inner).T,
        from_file=lambda w: w.T.reshape(w.shape[1], 2, inner),
    )
    conv1d = _layer(
        "mixer.conv1d.weight",
        inner,
        1,
        width,
        to_file=lambda w: w.T[:, None],
        from_file=lambda w: w.reshape(inner, width).T,
    )
    in_proj_bias = _layer("mixer.in_proj.bias", 2 * inner, to_file=np.ravel, from_file=lambda b: b.reshape(2, inner))
    tensors = {
        "embedding/table": _Tensor(name=embedding, shape=(vocab, model)),
        "norm_f/scale": _Tensor(name="backbone.norm_f.weight", shape=(model,)),
        "layers/norm/scale": _layer("norm.weight", model),
        "layers/mixer/in_proj/kernel": in_proj,
        "layers/mixer/conv1d/weight": conv1d,
        "layers/mixer/x_proj/kernel": _layer("mixer.x_proj.weight", rank + 2 * state, inner, **transpose),
        "layers/mixer/dt_proj/kernel": _layer("mixer.dt_proj.weight", inner, rank, **transpose),
        "layers/mixer/dt_proj/bias": _layer("mixer.dt_proj.bias", inner),
        "layers/mixer/A_log": _layer("mixer.A_log", inner, state),
        "layers/mixer/D": _layer("mixer.D", inner),
        "layers/mixer/out_proj/kernel": _layer("mixer.out_proj.weight", model, inner, **transpose),
    }
    if not config.tie_embeddings:
        tensors["lm_head/table"] = _Tensor(name=_HEAD, shape=(vocab, model))
    if mixer.use_conv_bias:
        tensors["layers/mixer/conv1d/bias"] = _layer("mixer.conv1d.bias", inner)
    if mixer.use_bias:
        tensors["layers/mixer/in_proj/bias"] = in_proj_bias
        tensors["layers/mixer/out_proj/bias"] = _layer("mixer.out_proj.bias", model)
    return {tuple(path.split("/")): tensor for path, tensor in tensors.items()}


def save(
    path: str | Path,
    config: ModelConfig,
    params: Params,
    *,
    layout: Layout,
    extra: Mapping[str, Any] | None = None,
    companions: Mapping[str, bytes] | None = None,
) -> None:
    """Writes `config.json` and `model.safetensors` into a new folder: all files appear together, or none.

    Args:
        path: the folder; it must not exist, or be empty.
        config: of the model.
        params: its parameters, with layers stacked.
        layout: "hf" for `transformers`, "original" for the authors' code.
        extra: further keys of a Hugging Face `config.json`; the original layout has no place for them.
        companions: further files by name, such as those of the tokenizer.

    Raises:
        InputError: the folder is not empty or cannot be written, or the layout cannot express the model.
    """
    path = Path(path)
    files.require_new_folder(path)
    config_json = _config_text(config, layout, extra or {})
    flat = traverse_util.flatten_dict(params)
    tensors: dict[str, np.ndarray] = {}
    for key, tensor in _table(config, layout).items():
        value = np.asarray(flat.pop(key))
        if key[0] == "layers":
            tensors |= {tensor.name.format(i): tensor.to_file(layer) for i, layer in enumerate(value)}
        else:
            tensors[tensor.name] = tensor.to_file(value)
    assert not flat, f"no name for {list(flat)}"
    if layout == "original" and config.tie_embeddings:
        tensors[_HEAD] = tensors["backbone.embedding.weight"]
    contiguous = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    with files.new_folder(path) as folder:
        try:
            safetensors.numpy.save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
        except safetensors.SafetensorError as error:
            raise OSError(str(error)) from error
        for name, data in {"config.json": config_json, **(companions or {})}.items():
            (folder / name).write_bytes(data)
        # The library keeps others from reading what it writes.
        shutil.copymode(folder / "config.json", folder / "model.safetensors")


def _config_text(config: ModelConfig, layout: Layout, extra: Mapping[str, Any]) -> bytes:
    content = configs.to_json(config, layout=layout, extra=extra)
    try:
        return (json.dumps(content, indent=2) + "\n").encode()
    except RecursionError:
        raise InputError(f"config.json: a value is nested too deeply among {files.short(sorted(extra))}") from None


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
        InputError: a file is missing or damaged, the config is not one of a Mamba-1 model, or a tensor is missing,
            unexpected, of another shape or not finite; the message names the first of them.
    """
    path = Path(path)
    published = configs.read(path / "config.json")
    config, layout = published.config, published.layout
    stored = open_weights(path)
    table = _table(config, layout)
    head = stored.pop(_HEAD, None) if config.tie_embeddings else None
    if problems := list(_problems(stored, table, config.num_layers)):
        raise InputError(f"{path} does not hold the model of its config.json: {first_few(problems)}")
    dtypes = {tensor.dtype for tensor in stored.values()}
    dtype = cast(DType, dtypes.pop() if len(dtypes) == 1 else "float32")
    try:
        flat = {key: _read(path, stored, key, tensor, config.num_layers, dtype) for key, tensor in table.items()}
        if head is not None and not _same(head, stored[table["embedding", "table"].name]):
            raise InputError(f"{path}: {_HEAD} differs from the embedding although the config ties them")
    except MemoryError:
        raise InputError(f"{path} does not fit the memory of this machine: use a larger one") from None
    config = dataclasses.replace(config, param_dtype=dtype, compute_dtype=dtype)
    return LoadedModel(config=config, layout=layout, params=traverse_util.unflatten_dict(flat), extra=published.extra)


def _problems(stored: Mapping[str, StoredTensor], table: Table, num_layers: int) -> Iterator[str]:
    """What is wrong with the tensors, by their names, shapes and dtypes."""
    if num_layers > len(stored):
        yield f"{files.short(num_layers)} layers, but only {len(stored)} tensors"
        return
    used: set[str] = set()
    for key, tensor in table.items():
        for name in map(tensor.name.format, range(num_layers if key[0] == "layers" else 1)):
            used.add(name)
            if name not in stored:
                yield f"missing {name}"
            elif stored[name].shape != tensor.shape:
                yield f"{name} has shape {files.short(stored[name].shape)}, expected {files.short(tensor.shape)}"
            elif stored[name].dtype not in get_args(DType):
                yield f"{name} has dtype {stored[name].dtype}, expected {' or '.join(get_args(DType))}"
    for name in stored.keys() - used:
        yield f"unexpected {name if len(name) < 100 else files.short(name)}"


def _read(
    path: Path,
    stored: Mapping[str, StoredTensor],
    key: tuple[str, ...],
    tensor: _Tensor,
    num_layers: int,
    dtype: DType,
) -> np.ndarray:
    """One parameter; only one layer of it exists twice."""
    if key[0] != "layers":
        return tensor.from_file(_finite(path, stored, tensor.name)).astype(dtype, copy=False)
    result: np.ndarray | None = None
    for layer in range(num_layers):
        value = tensor.from_file(_finite(path, stored, tensor.name.format(layer)))
        if result is None:
            result = np.empty((num_layers, *value.shape), dtype)
        result[layer] = value
    assert result is not None
    return result


def _finite(path: Path, stored: Mapping[str, StoredTensor], name: str) -> np.ndarray:
    value = stored[name].read()
    if not np.isfinite(value).all():
        count = value.size - np.count_nonzero(np.isfinite(value))
        raise InputError(f"{path}: {name} has {count} values of {value.size} that are not finite: fetch it again")
    return value


def _same(one: StoredTensor, other: StoredTensor) -> bool:
    return one.shape == other.shape and np.array_equal(one.read(), other.read())
