"""Low-rank adapters as PEFT stores them: `adapter_config.json` and `adapter_model.safetensors`.

A module of theirs is a tensor of the "hf" layout. Where that joins several of our projections, its A holds theirs below
each other, and its B has theirs in blocks; where it is a part of one, it has the whole A and its rows of B.

    W + scale (A_1 B_1 | A_2 B_2)^T = W + scale diag(B_1^T, B_2^T) (A_1 | A_2)^T
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from os.path import isdir, lexists
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from mamba_jax.errors import InputError, short
from mamba_jax.export import files
from mamba_jax.export.published_config import format_of
from mamba_jax.export.weights import StoredTensor, first_few, open_safetensors
from mamba_jax.models.config import LoraConfig, ModelConfig
from mamba_jax.models.parameters import Params
from mamba_jax.models.published import Tensor, refuse_unsupported
from mamba_jax.models.storage.matrix import LowRank

LAYOUT = "peft"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_NAME = re.compile(re.escape(_PREFIX) + r"(.+)\.lora_([AB])\.weight")
# Values that the keys must have, if they are there, for the file to be W + scale A B of linear layers and no more.
_REQUIRED = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_dora": False,
    "modules_to_save": None,
    "layer_replication": None,
}
# Beginnings of the kinds of models whose out_proj PEFT refuses, because kernels there read the weights past the module.
_WITHOUT_OUTPUT = ("mamba", "falcon_mamba", "nemotron_h")
# Kinds of models in which `transformers` multiplies with the weights of dt_proj itself.
_WITH_STEP_PASSED_BY = ("mamba", "falcon_mamba", "jamba")


def save(
    path: str | Path,
    config: ModelConfig,
    stored: Params,
    *,
    lora: LoraConfig,
    base: str,
    companions: Mapping[str, bytes],
) -> tuple[str, ...]:
    """Writes the adapters of a model into a new folder.

    Args:
        path: the folder; it must not exist, or be empty.
        config: config of the model.
        stored: its parameters, stacked, with a `LowRank` where there is an adapter.
        lora: rank and alpha of the adapters.
        base: folder of the model that they belong to, for `base_model_name_or_path`.
        companions: further files by name, such as those of the tokenizer.

    Returns:
        The names of the files.

    Raises:
        InputError: the folder is not empty or cannot be written, the "hf" layout cannot express the model, or an
            adapter is of a block that layers share.
    """
    path = Path(path)
    files.require_new_folder(path)
    modules = modules_of(config, stored)
    _refuse_shared(config, modules)
    tensors = {
        f"{_PREFIX}{name}.lora_{letter}.weight": np.ascontiguousarray(value)
        for name, pair in modules.items()
        for letter, value in zip("AB", pair, strict=True)
    }
    content = _content(config, lora, modules, base)
    with files.new_folder(path) as folder:
        files.write_safetensors(folder / WEIGHTS, tensors)
        for name, data in {**companions, CONFIG: (json.dumps(content, indent=2) + "\n").encode()}.items():
            (folder / name).write_bytes(data)
    return (CONFIG, WEIGHTS, *companions)


def _refuse_shared(config: ModelConfig, modules: Collection[str]) -> None:
    """Refuses adapters of a block that layers share: `transformers` has a module for each, and PEFT adapts one."""
    table = format_of(config, "hf").tensors(config)
    for name in config.shared_blocks:
        own = [tensor.name.split(".") for key, given in table.items() if key[0] == f"shared_{name}" for tensor in given]
        # Where the layers' own parameters for the block are as well.
        place = ".".join(first for first, *rest in zip(*own, strict=False) if set(rest) == {first})
        if shared := sorted(module for module in modules if module.startswith(f"{place}.")):
            raise InputError(
                f"PEFT would adapt a block that layers share in one of them alone ({first_few(shared, limit=2)}): "
                "train with --lora.targets of other projections, or take the layout 'hf', into which it is merged"
            )


def limits(config: ModelConfig, stored: Params) -> list[str]:
    """What PEFT 0.21 and `transformers` 5.24 do otherwise with the adapters of a model, a sentence for each."""
    kind = str(format_of(config, "hf").write_config(config).get("model_type"))
    words = {name.rpartition(".")[2] for name in modules_of(config, stored)}
    found = []
    if kind.startswith(_WITHOUT_OUTPUT) and "out_proj" in words:
        found.append(
            f"PEFT refuses adapters of out_proj in models of the type {kind!r}: to load them there, train with "
            "--lora.targets that leave it out, or take the layout 'hf', into which they are merged"
        )
    if kind in _WITH_STEP_PASSED_BY and "dt_proj" in words:
        found.append(
            f"transformers reads the weights of dt_proj past its adapter in models of the type {kind!r}, until PEFT "
            "has merged it (merge_and_unload)"
        )
    return found


def modules_of(config: ModelConfig, stored: Params) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A (r, I) and B (O, r) of every module of the "hf" layout with an adapter, by its name; arguments as in `save`."""
    found: dict[str, list[tuple[Tensor, np.ndarray, np.ndarray]]] = defaultdict(list)
    leaves = traverse_util.flatten_dict(stored)
    for key, given in format_of(config, "hf").tensors(config).items():
        matrix = leaves[key]
        if isinstance(matrix, LowRank):
            for tensor in given:
                inputs = replace(tensor, place=()).parts(np.asarray(matrix.lora_a))
                outputs = tensor.parts(np.asarray(matrix.lora_b))
                for (name, lora_a), (_, lora_b) in zip(inputs, outputs, strict=True):
                    rows = _rows_of_file(tensor, lora_b, lora_a.shape[0])
                    found[_module(name)].append((tensor, lora_a.T, rows))
    return {name: _joined(parts) for name, parts in found.items()}


def _rows_of_file(tensor: Tensor, lora_b: np.ndarray, inputs: int) -> np.ndarray:
    """B (r, *O) of a parameter in the order that the file has for the rows of its matrix, (O, r)."""
    columns = []
    for first in range(0, lora_b.shape[0], inputs):
        some = lora_b[first : first + inputs]
        # As if they were the weights of the first inputs, of which only the outputs are arranged anew.
        kernel = np.zeros((inputs, *lora_b.shape[1:]), lora_b.dtype)
        kernel[: len(some)] = some
        columns.append(tensor.to_file(kernel)[:, : len(some)])
    return np.concatenate(columns, axis=1)


def _joined(parts: list[tuple[Tensor, np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """A and B of a module, from those of the parameters that share out its rows."""
    first, lora_a, _ = parts[0]
    is_shared = all(np.array_equal(lora_a, other) for _, other, _ in parts)
    rank = lora_a.shape[0] if is_shared else sum(other.shape[0] for _, other, _ in parts)
    whole = np.zeros((first.shape[0], rank), lora_a.dtype)
    column = 0
    for tensor, other, rows in parts:
        place = slice(None) if tensor.rows is None else slice(*tensor.rows)
        whole[place, column : column + other.shape[0]] = rows
        column += 0 if is_shared else other.shape[0]
    return (lora_a if is_shared else np.concatenate([other for _, other, _ in parts])), whole


def _content(
    config: ModelConfig, lora: LoraConfig, modules: Mapping[str, tuple[np.ndarray, np.ndarray]], base: str
) -> dict[str, Any]:
    """The content of `adapter_config.json`; modules are named in full where their last word would match others."""
    assert lora.rank is not None
    words = {name.rpartition(".")[2] for name in modules}
    table = format_of(config, "hf").tensors(config)
    every = {_module(name) for given in table.values() for tensor in given for name in tensor.names()}
    # A number would match a whole layer.
    exact = not any(map(str.isdecimal, words)) and all(
        name in modules for name in every if name.rpartition(".")[2] in words
    )
    wider = {_inside(name): pair[0].shape[0] for name, pair in modules.items() if pair[0].shape[0] != lora.rank}
    alpha = int(lora.alpha) if lora.alpha.is_integer() else lora.alpha
    return {
        **_REQUIRED,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(words) if exact else sorted(map(_inside, modules)),
        "rank_pattern": wider,
        "alpha_pattern": {name: alpha * rank / lora.rank for name, rank in wider.items()},
    }


def _module(tensor: str) -> str:
    return tensor.removesuffix(".weight")


def _inside(module: str) -> str:
    """The name of a module without its first word, which `transformers` changes for some models when it loads them."""
    return module.partition(".")[2]


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter rather than a model."""
    return lexists(folder / CONFIG)


def base_of(folder: Path) -> Path:
    """The folder of the model that an adapter belongs to, as it stands in the file or beside the adapter's folder.

    Raises:
        InputError: there is no such folder here.
    """
    base = files.read_json(folder / CONFIG).get("base_model_name_or_path")
    if isinstance(base, str) and base:
        for place in (Path(base), folder / base):
            if isdir(place) and not is_adapter(place):
                return place
    raise InputError(
        f"{folder / CONFIG}: base_model_name_or_path={short(base)} is no folder of a model here: write that of the "
        "model which the adapter belongs to"
    )


def merge(folder: Path, config: ModelConfig, params: Params) -> Params:
    """The parameters of a model with an adapter merged into them, W + scale A B, computed in float32.

    Args:
        folder: of the adapter.
        config: config of the model.
        params: its parameters, stacked; they stay as they are.

    Raises:
        InputError: a file is missing or damaged, the adapter is of another kind, or belongs to another model.
    """
    content = files.read_json(folder / CONFIG)
    try:
        refuse_unsupported(content, _REQUIRED)
    except InputError as error:
        raise InputError(f"{folder / CONFIG}: {error}") from None
    modules = dict(_stored_modules(folder))
    flat: dict[tuple[str, ...], Any] = dict(traverse_util.flatten_dict(params))
    used = set()
    for key, given in format_of(config, "hf").tensors(config).items():
        names = {_inside(_module(name)) for tensor in given for name in tensor.names()}
        if not names & modules.keys():
            continue
        flat[key] = value = np.array(flat[key])
        for tensor in given:
            rows = slice(None) if tensor.rows is None else slice(*tensor.rows)
            for name, part in tensor.parts(value):
                if (module := _inside(_module(name))) in modules:
                    change = _change(folder, content, module, modules[module], tensor.shape)
                    part[...] = part.astype(np.float32) + tensor.from_file(change[rows])
        used |= names
    if unknown := sorted(modules.keys() - used):
        raise InputError(f"{folder} is of another model than its base, which has no {first_few(unknown, limit=4)}")
    return traverse_util.unflatten_dict(flat)


def _stored_modules(folder: Path) -> Iterator[tuple[str, dict[str, StoredTensor]]]:
    """Yields each module of an adapter's file, by its name without the first word, with its A and B."""
    found: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    for name, stored in open_safetensors(folder / WEIGHTS).items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise InputError(f"{folder / WEIGHTS} holds {short(name)}, which is no lora_A or lora_B of a linear layer")
        found[_inside(match[1])][match[2]] = stored
    for name, pair in found.items():
        if pair.keys() != {"A", "B"}:
            raise InputError(f"{folder / WEIGHTS} holds only lora_{next(iter(pair))} of {short(name)}: fetch it again")
        yield name, pair


def _change(
    folder: Path,
    content: Mapping[str, Any],
    module: str,
    pair: Mapping[str, StoredTensor],
    shape: tuple[int, ...],
) -> np.ndarray:
    """What an adapter adds to a tensor of a shape (O, I)."""
    (rank, inputs), (outputs, inner) = (
        stored.shape if len(stored.shape) == 2 else (0, 0) for stored in (pair["A"], pair["B"])
    )
    if (outputs, inputs) != shape or rank != inner or rank == 0:
        raise InputError(
            f"{folder} is of another model than its base: {module} has lora_A {pair['A'].shape} and lora_B "
            f"{pair['B'].shape} for a matrix {shape}"
        )
    patterns = content.get("alpha_pattern") or {}
    own = [alpha for pattern, alpha in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", module)]
    alpha = own[0] if own else content.get("lora_alpha", 8)
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise InputError(f"{folder / CONFIG}: lora_alpha={short(alpha)} is not a number")
    scale = alpha / (math.sqrt(rank) if content.get("use_rslora") else rank)
    lora_a, lora_b = (pair[letter].read().astype(np.float32) for letter in "AB")
    if not (np.isfinite(lora_a).all() and np.isfinite(lora_b).all()):
        raise InputError(f"{folder / WEIGHTS}: the adapter of {module} has values that are not finite: fetch it again")
    return scale * (lora_b @ lora_a)
