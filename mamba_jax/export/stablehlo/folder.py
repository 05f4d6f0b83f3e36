"""Writes a model as StableHLO: its programs for any platform, its weights, and how to run them without this library."""

import dataclasses
import hashlib
import importlib.resources
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export

from mamba_jax.errors import InputError
from mamba_jax.export import files
from mamba_jax.export.stablehlo.names import by_name
from mamba_jax.export.stablehlo.programs import Programs, exported
from mamba_jax.models.config import ModelConfig
from mamba_jax.models.parameters import Params, define
from mamba_jax.models.storage.as_multiplied import as_multiplied

LAYOUT = "stablehlo"
WEIGHTS, DESCRIPTION = "model.safetensors", "stablehlo.json"
_ARGUMENTS = {
    "prefill": (("weights", "tokens", "lengths"), ("logits", "state")),
    "decode_step": (("weights", "tokens", "state"), ("logits", "state")),
    "forward": (("weights", "tokens"), ("logits",)),
}


def save(
    path: str | Path,
    config: ModelConfig,
    params: Params,
    *,
    max_length: int | None = None,
    vocab_size: int | None = None,
    end_of_document: int | None = None,
    companions: Mapping[str, bytes] | None = None,
) -> tuple[str, ...]:
    """Writes a model's programs into a new folder, for `cpu`, `cuda` and `tpu` from any machine: all files or none.

    Args:
        path: the folder; it must not exist, or be empty.
        config: config of the model. Backends that it names are left out: XLA compiles the programs everywhere.
        params: its parameters, with layers stacked.
        max_length: most tokens of a row, prompt included; a model with attention without a window needs it.
        vocab_size: ids that logits are given for, such as those of the tokenizer; None means those of the model.
        end_of_document: id of the token that ends a text; None if it has none.
        companions: further files by name, such as those of the tokenizer.

    Returns:
        Names of the files.

    Raises:
        InputError: the folder is not empty or cannot be written, the package flatbuffers is missing, `max_length` is
            missing or below 1, or the model has a part that cannot be compiled for sizes that are not known.
    """
    path = Path(path)
    files.require_new_folder(path)
    if max_length is not None and max_length < 1:
        raise InputError(f"max_length is {max_length}: give the most tokens of a row, 1 or more")
    definition, params = as_multiplied(define(_on_any_backend(config)), params)
    programs = Programs(
        definition=definition,
        params=definition.unstacked(params),
        vocab_size=min(config.vocab_size, vocab_size or config.vocab_size),
        max_length=max_length,
    )
    made = exported(programs)
    data = {_file(name): _serialized(program) for name, program in made.items()}
    about = {
        "jax_version": jax.__version__,
        "vocab_size": programs.vocab_size,
        "max_length": max_length,
        "end_of_document": end_of_document,
        "programs": {name: _described(name, program, data[_file(name)]) for name, program in made.items()},
    }
    data |= {DESCRIPTION: (json.dumps(about, indent=2) + "\n").encode(), **(companions or {})}
    data["run.py"] = importlib.resources.files(__package__ or "").joinpath("run.py").read_bytes()
    weights = {name: np.asarray(array) for name, array in by_name(programs.params).items()}
    with files.new_folder(path) as folder:
        files.write_safetensors(folder / WEIGHTS, weights)
        for name, content in data.items():
            (folder / name).write_bytes(content)
    return (*data, WEIGHTS)


def _on_any_backend(value: Any) -> Any:
    """A config whose mixers name no backend, and read one token by what every platform has."""
    if isinstance(value, tuple):
        return tuple(map(_on_any_backend, value))
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value

    def on_any(name: str) -> Any:
        if name.endswith("_implementation"):
            return "layers" if name == "step_implementation" else None
        return _on_any_backend(getattr(value, name))

    return dataclasses.replace(value, **{field.name: on_any(field.name) for field in dataclasses.fields(value)})


def _file(program: str) -> str:
    return f"{program}.jax_export"


def _serialized(program: export.Exported) -> bytes:
    try:
        return bytes(program.serialize())
    except ImportError:
        raise InputError(
            f"the layout {LAYOUT!r} needs the package flatbuffers: pip install 'mamba-jax[stablehlo]'"
        ) from None


def _described(name: str, program: export.Exported, data: bytes) -> dict[str, Any]:
    """What `stablehlo.json` says of a program: how to call it, and what it was made for."""
    inputs, outputs = _ARGUMENTS[name]
    given, _ = jax.tree.unflatten(program.in_tree, program.in_avals)
    results = jax.tree.unflatten(program.out_tree, program.out_avals)
    return {
        "file": _file(name),
        "sha256": hashlib.sha256(data).hexdigest(),
        "inputs": dict(zip(inputs, map(_shapes, given), strict=True)),
        "outputs": dict(zip(outputs, map(_shapes, results if len(outputs) > 1 else (results,)), strict=True)),
        "platforms": program.platforms,
        "calling_convention_version": program.calling_convention_version,
    }


def _shapes(given: Any) -> Any:
    """Shape and dtype of an array, or of each in a dictionary; sizes that are not fixed are symbols."""
    if isinstance(given, dict):
        return {name: _shapes(array) for name, array in given.items()}
    return {"shape": [size if isinstance(size, int) else str(size) for size in given.shape], "dtype": str(given.dtype)}
