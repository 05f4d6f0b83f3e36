"""Mamba-1 checkpoints as safetensors, in the original layout and in that of Hugging Face `MambaForCausalLM`.

The layouts differ in the name of the embedding, in `config.json`, and in whether a tied head is written. Tensors keep
PyTorch's orientation there: linear weights (out, in), convolution weights (channels, 1, taps).
"""

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from mamba_jax.config import DType, ModelConfig
from mamba_jax.errors import InputError
from mamba_jax.export import configs
from mamba_jax.export.configs import Layout
from mamba_jax.models.parameters import Params, define

_HEAD = "lm_head.weight"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A checkpoint in memory.

    Attributes:
        config: of the model.
        params: numpy arrays, layers stacked.
        extra: keys of a Hugging Face `config.json` that do not describe the network, such as the ids of special tokens.
    """

    config: ModelConfig
    params: Params
    extra: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tensor:
    """How one parameter is stored: its name (with `{}` for the layer), and the way there and back."""

    name: str
    to_file: Callable[[np.ndarray], np.ndarray] = np.asarray
    from_file: Callable[[np.ndarray], np.ndarray] = np.asarray


def _table(config: ModelConfig, layout: Layout) -> dict[tuple[str, ...], _Tensor]:
    """Storage of every parameter, by its path in our tree."""
    parts, inner, width = 1 + config.mixer.use_gate, config.d_inner, config.mixer.conv_width
    transpose = {"to_file": np.transpose, "from_file": np.transpose}
    mixer = "backbone.layers.{}.mixer."
    embedding = "backbone.embeddings.weight" if layout == "hf" else "backbone.embedding.weight"
    tensors = {
        "embedding/table": _Tensor(name=embedding),
        "norm_f/scale": _Tensor(name="backbone.norm_f.weight"),
        "lm_head/table": _Tensor(name=_HEAD),
        "layers/norm/scale": _Tensor(name="backbone.layers.{}.norm.weight"),
        "layers/mixer/in_proj/kernel": _Tensor(
            name=mixer + "in_proj.weight",
            to_file=lambda w: w.reshape(w.shape[0], parts * inner).T,
            from_file=lambda w: w.T.reshape(w.shape[1], parts, inner),
        ),
        "layers/mixer/in_proj/bias": _Tensor(
            name=mixer + "in_proj.bias", to_file=np.ravel, from_file=lambda b: b.reshape(parts, inner)
        ),
        "layers/mixer/conv1d/weight": _Tensor(
            name=mixer + "conv1d.weight",
            to_file=lambda w: w.T[:, None],
            from_file=lambda w: w.reshape(inner, width).T,
        ),
        "layers/mixer/conv1d/bias": _Tensor(name=mixer + "conv1d.bias"),
        "layers/mixer/x_proj/kernel": _Tensor(name=mixer + "x_proj.weight", **transpose),
        "layers/mixer/dt_proj/kernel": _Tensor(name=mixer + "dt_proj.weight", **transpose),
        "layers/mixer/dt_proj/bias": _Tensor(name=mixer + "dt_proj.bias"),
        "layers/mixer/A_log": _Tensor(name=mixer + "A_log"),
        "layers/mixer/D": _Tensor(name=mixer + "D"),
        "layers/mixer/out_proj/kernel": _Tensor(name=mixer + "out_proj.weight", **transpose),
        "layers/mixer/out_proj/bias": _Tensor(name=mixer + "out_proj.bias"),
    }
    ours = traverse_util.flatten_dict(define(config).params, sep="/")
    return {tuple(path.split("/")): tensors[path] for path in ours}


def save(
    path: str | Path,
    config: ModelConfig,
    params: Params,
    *,
    layout: Layout,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes `config.json` and `model.safetensors` into a new folder.

    Args:
        path: the folder; it must not exist, or be empty.
        config: of the model.
        params: its parameters, with layers stacked.
        layout: "hf" for `transformers`, "original" for the authors' code.
        extra: further keys of a Hugging Face `config.json`; the original layout has no place for them.

    Raises:
        InputError: the folder is not empty, or the layout cannot express the model.
    """
    path = Path(path)
    require_new_folder(path)
    config_json = configs.to_json(config, layout=layout, extra=extra or {})
    flat = traverse_util.flatten_dict(params)
    tensors: dict[str, np.ndarray] = {}
    for key, tensor in _table(config, layout).items():
        value = np.asarray(flat[key])
        if key[0] == "layers":
            tensors |= {tensor.name.format(i): tensor.to_file(layer) for i, layer in enumerate(value)}
        else:
            tensors[tensor.name] = tensor.to_file(value)
    if layout == "original" and config.tie_embeddings:
        tensors[_HEAD] = tensors["backbone.embedding.weight"]
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        contiguous = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
        safetensors.numpy.save_file(contiguous, staging / "model.safetensors", metadata={"format": "pt"})
        (staging / "config.json").write_text(json.dumps(config_json, indent=2) + "\n")
        staging.chmod(0o755)
        os.replace(staging, path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def require_new_folder(path: str | Path) -> None:
    """Raises InputError if something is there already that writing the folder would destroy."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} exists and is not an empty folder: choose another or remove it")


def load(path: str | Path) -> LoadedModel:
    """Reads a folder in either layout, sharded or not; the whole model or nothing.

    Args:
        path: a folder with `config.json` and `model.safetensors`, `model.safetensors.index.json` or, if torch is
            installed, `pytorch_model.bin`.

    Returns:
        The config, and the parameters as numpy arrays of the stored dtype.

    Raises:
        InputError: a file is missing or damaged, the config is not one of a Mamba-1 model, or a tensor is missing,
            unexpected or of another shape; the message names them all.
    """
    path = Path(path)
    published = configs.read(path / "config.json")
    config = published.config
    tensors = _read_tensors(path)
    table = _table(config, published.layout)
    if config.tie_embeddings and _HEAD in tensors:
        embedding = tensors.get(table["embedding", "table"].name)
        head = tensors.pop(_HEAD)
        if embedding is not None and not np.array_equal(head, embedding):
            raise InputError(f"{path}: {_HEAD} differs from the embedding although the config ties them")
    flat, problems = _assemble(tensors, table, config)
    if problems:
        raise InputError(f"{path} does not hold the model of its config.json: {'; '.join(problems)}")
    dtypes = {str(value.dtype) for value in flat.values()}
    if len(dtypes) > 1:
        dtypes = {"float32"}
        flat = {key: value.astype(np.float32) for key, value in flat.items()}
    config = dataclasses.replace(config, param_dtype=cast(DType, dtypes.pop()))
    return LoadedModel(config=config, params=traverse_util.unflatten_dict(flat), extra=published.extra)


def _assemble(
    tensors: Mapping[str, np.ndarray], table: Mapping[tuple[str, ...], _Tensor], config: ModelConfig
) -> tuple[dict[tuple[str, ...], np.ndarray], list[str]]:
    """Parameters by path, and what is wrong with the tensors; only without problems are the parameters complete."""
    expected: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(define(config).params)
    flat: dict[tuple[str, ...], np.ndarray] = {}
    problems: list[str] = []
    used: set[str] = set()
    for key, tensor in table.items():
        is_stacked = key[0] == "layers"
        shape = expected[key].shape[is_stacked:]
        stored_shape = tensor.to_file(np.empty(shape, np.int8)).shape
        values = []
        for layer in range(config.num_layers if is_stacked else 1):
            name = tensor.name.format(layer)
            used.add(name)
            if name not in tensors:
                problems.append(f"missing {name}")
            elif tensors[name].shape != stored_shape:
                problems.append(f"{name} has shape {tensors[name].shape}, expected {stored_shape}")
            elif str(tensors[name].dtype) not in get_args(DType):
                problems.append(f"{name} has dtype {tensors[name].dtype}, expected {' or '.join(get_args(DType))}")
            else:
                values.append(tensor.from_file(tensors[name]))
        if not problems:
            flat[key] = np.stack(values) if is_stacked else values[0]
    return flat, problems + [f"unexpected {name}" for name in tensors if name not in used]


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        weight_map = configs.read_json(index).get("weight_map")
        files = set(weight_map.values()) if isinstance(weight_map, dict) else {None}
        if not all(isinstance(name, str) and Path(name).name == name for name in files):
            raise InputError(f"{index} has no 'weight_map' from tensor names to names of files beside it")
        tensors: dict[str, np.ndarray] = {}
        for name in sorted(files):
            tensors |= _read_safetensors(path / name)
        return tensors
    if (path / "model.safetensors").is_file():
        return _read_safetensors(path / "model.safetensors")
    if (path / "pytorch_model.bin").is_file():
        return _read_torch(path / "pytorch_model.bin")
    raise InputError(f"{path} holds no model.safetensors, model.safetensors.index.json or pytorch_model.bin")


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        return safetensors.numpy.load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path} is missing although the index names it") from None
    except safetensors.SafetensorError as error:
        raise InputError(f"{path} is damaged or no safetensors file ({error}): fetch it again") from None


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch  # pyrefly: ignore[missing-import]
    except ImportError:
        raise InputError(
            f"reading {path} needs PyTorch: install torch, or convert it to safetensors elsewhere"
        ) from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {name: tensor.float().numpy() for name, tensor in state.items()}
    except Exception as error:  # which one depends on where the damage is
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path} is damaged or no PyTorch state dictionary ({reason}): fetch it again") from None
