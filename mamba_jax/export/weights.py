"""Opens the tensors of a checkpoint folder: names, dtypes and shapes at once, values only when asked for."""

import dataclasses
import functools
import pickle
import re
import warnings
from collections.abc import Callable, Iterable
from os.path import lexists
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from mamba_jax.errors import InputError, reason, short
from mamba_jax.export.files import read_json, require_file

_INDEX, _SINGLE, _TORCH = "model.safetensors.index.json", "model.safetensors", "pytorch_model.bin"
# A header takes about 150 bytes a tensor: enough for 50,000 tensors a file.
_HEADER_BYTES = 8 * 2**20
_NAME_BYTES = 255
_KINDS = {"F": "float", "BF": "bfloat", "I": "int", "U": "uint"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor in a file, whose values have not been read yet.

    Attributes:
        file: the file that holds it.
        dtype: numpy's name of its dtype, or the file's name if numpy has none, such as F8_E4M3.
        shape: its shape as stored, which may be transposed compared to ours.
        read: function that reads the values.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def open_weights(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a folder by name, in memory that does not depend on their sizes (but for PyTorch's files).

    Args:
        folder: with `model.safetensors`, `model.safetensors.index.json` or, if torch is installed,
            `pytorch_model.bin`.

    Raises:
        InputError: a file is missing, damaged or not what the index says.
    """
    if lexists(folder / _INDEX):
        return _open_indexed(folder)
    if lexists(folder / _SINGLE):
        return open_safetensors(folder / _SINGLE)
    if lexists(folder / _TORCH):
        return _open_torch(folder / _TORCH)
    raise InputError(f"{folder} holds no {_SINGLE}, {_INDEX} or {_TORCH}")


def _open_indexed(folder: Path) -> dict[str, StoredTensor]:
    """All tensors, by name, of a model whose safetensors files are listed in an index."""
    index = folder / _INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(map(_is_file_name, weight_map.values())):
        raise InputError(f"{index} has no 'weight_map' from tensor names to names of files beside it")
    found: dict[str, StoredTensor] = {}
    for file in sorted(set(weight_map.values())):
        if not lexists(folder / file):
            raise InputError(f"{folder / file} is missing although the index names it")
        stored = open_safetensors(folder / file)
        if both := found.keys() & stored.keys():
            raise InputError(f"{folder}: two files of the index hold {short(min(both))}: fetch it again")
        found |= stored
    for name, file in weight_map.items():
        if name in found and found[name].file.name != file:
            raise InputError(f"{index} looks for {short(name)} in {file}, but {found[name].file.name} holds it")
    return found


def _is_file_name(name: Any) -> bool:
    if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\0\ud800-\udfff]", name):
        return False
    return len(name.encode()) <= _NAME_BYTES


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """All tensors of a safetensors file by name; only the header is read now, the values when asked for.

    Raises:
        InputError: it is no such file, or cannot be read.
    """
    opened = _opened(path)
    return {name: _stored(path, opened, name) for name in opened.keys()}  # noqa: SIM118  no mapping


def read_metadata(path: Path) -> dict[str, str]:
    """The texts in the header of a safetensors file, by name.

    Raises:
        InputError: it is no such file, or cannot be read.
    """
    return dict(_opened(path).metadata() or {})


def _opened(path: Path) -> Any:
    """A safetensors file whose header has a size that can be right."""
    require_file(path)
    try:
        with path.open("rb") as file:
            if (header := int.from_bytes(file.read(8), "little")) > _HEADER_BYTES:
                raise InputError(f"{path} is damaged or not a safetensors file (a header of {header} bytes)")
        # The alternative maps the file, and a file that someone shortens meanwhile would end the process.
        return safetensors.safe_open(path, framework="np", backend="pread")
    except (OSError, safetensors.SafetensorError) as error:
        raise _unreadable(path, error) from None


def _stored(path: Path, opened: Any, name: str) -> StoredTensor:
    entry = opened.get_slice(name)
    dtype = re.sub(r"^(F|BF|I|U)(\d+)$", lambda match: _KINDS[match[1]] + match[2], entry.get_dtype())
    read = functools.partial(_read, path, opened, name)
    return StoredTensor(file=path, dtype=dtype, shape=tuple(entry.get_shape()), read=read)


def _read(path: Path, opened: Any, name: str) -> np.ndarray:
    try:
        return opened.get_tensor(name)
    except (OSError, safetensors.SafetensorError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> InputError:
    if isinstance(error, OSError):
        return InputError(f"cannot read {path} ({reason(error)})")
    return InputError(f"{path} is damaged or not a safetensors file ({str(error)[:200]}): fetch it again")


def _open_torch(path: Path) -> dict[str, StoredTensor]:
    """All tensors of a PyTorch state dictionary by name, as float32; PyTorch reads all of them at once."""
    require_file(path)
    try:
        import torch  # pyrefly: ignore[missing-import]
    except ImportError:
        raise InputError(
            f"reading {path} needs PyTorch: install torch, or convert it to safetensors elsewhere"
        ) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
        arrays = {str(name): tensor.float().numpy() for name, tensor in state.items()}
    except pickle.UnpicklingError:
        raise InputError(
            f"{path} is damaged, or asks for something else than tensors, which is not done: fetch it again, as "
            "safetensors if there are any"
        ) from None
    except Exception as error:  # which one depends on where the damage is
        text = str(error).partition("\n")[0][:200]
        raise InputError(f"{path} is damaged or not a PyTorch state dictionary ({text}): fetch it again") from None
    return {
        name: StoredTensor(file=path, dtype="float32", shape=array.shape, read=lambda array=array: array)
        for name, array in arrays.items()
    }


def first_few(problems: Iterable[str], *, limit: int = 10) -> str:
    """Problems in one short line, by number where there are many."""
    problems = list(problems)
    more = f"; and {len(problems) - limit} more" if len(problems) > limit else ""
    return "; ".join(problems[:limit]) + more
