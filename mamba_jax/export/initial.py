"""Weights that a training run starts from, given as a safetensors folder, if they belong to exactly the same model."""

import dataclasses
import json
from os.path import isdir
from pathlib import Path
from typing import Any

from mamba_jax.config_base import nested_fields
from mamba_jax.data.config import TokenizerConfig
from mamba_jax.data.tokenizer import Tokenizer, make_tokenizer
from mamba_jax.errors import InputError, short
from mamba_jax.experiment import ExperimentConfig
from mamba_jax.export import huggingface
from mamba_jax.export.companions import tokenizer_beside
from mamba_jax.models.config import ModelConfig
from mamba_jax.models.mixers.declaration import MixerConfig
from mamba_jax.models.parameters import Params

# Fields that say how random weights are drawn, or how and in which precision a step is computed.
_FREE = {
    "embedding_std",
    "rescale_residual",
    "param_dtype",
    "compute_dtype",
    "remat",
}


def initial_params(config: ExperimentConfig) -> Params | None:
    """The weights in the folder `config.train.init_from`; None if none is given.

    Raises:
        InputError: there is no such folder, it is damaged, or its model computes something else, which shapes need not
            show; the message names each field that differs, and the tokenizer if the folder has another one.
    """
    if config.train.init_from is None:
        return None
    folder = Path(config.train.init_from)
    if not isdir(folder):
        raise InputError(f"train.init_from: no folder {str(folder)!r}; give one with config.json and weights")
    if isdir(folder / "checkpoints"):
        raise InputError(
            f"train.init_from {folder} is a training run: export it (python -m mamba_jax.export {folder} FOLDER) and "
            "give that folder"
        )
    loaded = huggingface.load(folder)
    was, here = decisive(loaded.config), decisive(config.model)
    if was["padded_vocab_size"] == here["padded_vocab_size"]:
        # The "hf" layout tells the number of rows, and not how many of them stand for tokens.
        for name in ("vocab_multiple", "vocab_size") if loaded.layout == "hf" else ("vocab_multiple",):
            was[name] = here[name]
    differences = [
        f"model.{name} was {short(was.get(name))}, here {short(here.get(name))}"
        for name in dict.fromkeys([*was, *here])
        if was.get(name) != here.get(name)
    ]
    differences += _other_tokenizer(tokenizer_beside(folder), config.data.tokenizer)
    if differences:
        raise InputError(
            f"train.init_from {folder} holds another model, {loaded.config.num_layers} layers of width "
            f"{loaded.config.d_model}: {'; '.join(differences)}; make the config agree with it or take other weights"
        )
    return loaded.params


def decisive(config: ModelConfig) -> dict[str, Any]:
    """The fields of a model's config that decide what its weights mean, flat and by dotted name."""
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in _FREE}
    mixer = config.mixer
    if isinstance(mixer, MixerConfig):
        fields["mixer"] = mixer.decisive(config.d_model)
    else:
        units = [[one.decisive(config.d_model) for one in unit.mixers] for unit in mixer.units]
        fields["mixer"] = {"kind": mixer.kind, "units": units}
    fields["padded_vocab_size"] = config.padded_vocab_size
    return dict(nested_fields(fields))


def _other_tokenizer(stored: TokenizerConfig | None, own: TokenizerConfig) -> list[str]:
    """One sentence if the tokenizers give different ids, in a list; empty if not, or if none is stored."""
    if stored is None:
        return []
    was, here = make_tokenizer(stored), make_tokenizer(own)
    if was.end_of_document == here.end_of_document and _definition(was) == _definition(here):
        return []
    return [
        f"data.tokenizer was {stored.path} ({was.vocab_size} ids, end of document {was.end_of_document}), here "
        f"{own.path or 'bytes'} ({here.vocab_size} ids, end of document {here.end_of_document}), which gives other ids"
    ]


def _definition(tokenizer: Tokenizer) -> Any:
    return json.loads(tokenizer.to_json())
