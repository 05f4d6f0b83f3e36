"""Weights that a training run starts from, out of another run or a folder, if they belong to exactly the same model."""

import dataclasses
import json
import re
from os.path import isdir
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tokenizers

from mamba_jax.checkpoint import FOLDER, load_params, stored_run, stored_step
from mamba_jax.config_base import nested_fields
from mamba_jax.data.config import TokenizerConfig
from mamba_jax.data.tokenizer import Tokenizer, make_tokenizer
from mamba_jax.errors import InputError, short
from mamba_jax.experiment import ExperimentConfig
from mamba_jax.export import peft, published_config
from mamba_jax.export.companions import tokenizer_of_run
from mamba_jax.export.load import load_model
from mamba_jax.models.config import ModelConfig
from mamba_jax.models.mixers.declaration import MixerConfig
from mamba_jax.models.parameters import Params
from mamba_jax.training.config import TrainConfig

# Fields that say how random weights are drawn, or how and in which precision a step is computed.
_FREE = {
    "remat",
    "unroll",
    "embedding_std",
    "rescale_residual",
    "param_dtype",
    "compute_dtype",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitialWeights:
    """Weights that a run starts from.

    Attributes:
        params: the parameters, of the config's model.
        experiment: config of the run that made them; None if they come out of a folder, which does not tell.
        step: updates that run had done; None as well.
        run: id of that run; None as well.
        added: tokens that the config's tokenizer has beyond theirs, whose rows are the mean of the others.
    """

    params: Params
    experiment: ExperimentConfig | None = None
    step: int | None = None
    run: str | None = None
    added: int = 0


def split_step(text: str) -> tuple[Path, int | None]:
    """Folder and step of `RUN@STEP`; the step is None where none is given, as in the name of a folder with an @."""
    found = re.fullmatch(r"(.+)@(\d{1,10})", text, re.ASCII)
    if found is None or isdir(text):
        return Path(text), None
    return Path(found[1]), int(found[2])


def model_of(source: str) -> ModelConfig:
    """The model that the weights of `train.init_from` belong to, for a config file; reads no weights.

    Args:
        source: a training run, RUN or RUN@STEP, or a folder with config.json and weights.

    Returns:
        Its config, as training can take it: with parameters in float32. A folder does not tell the dtype of products,
        which is the default of `ModelConfig`.

    Raises:
        InputError: there is no such folder or step, or it is damaged.

    Example:
        ExperimentConfig(model=model_of("runs/first"), train=TrainConfig(init_from="runs/first", ...), ...)
    """
    folder, step = split_step(source)
    if isdir(folder / FOLDER):
        run = stored_run(folder) if step is None else stored_step(folder, step)
        if run is None:
            raise InputError(f"{folder} has no complete checkpoint yet")
        return run.config.model
    if step is not None or not isdir(folder):
        raise InputError(f"{source!r} is no training run, and no folder with config.json and weights")
    if peft.is_adapter(folder):
        return model_of(str(peft.base_of(folder)))
    return dataclasses.replace(published_config.read(folder / "config.json").config, param_dtype="float32")


def model_for(train: TrainConfig) -> ModelConfig:
    """The model of what a run begins with, as `model_of` gives it, for a config with the model "from_checkpoint".

    Args:
        train: the config of the loop; of a run that has begun, whose source may be gone, the run itself counts then.

    Raises:
        InputError: the config names nothing to begin with, or that cannot be read.
    """
    source = train.init_from or train.branch_from
    if source is None:
        raise InputError(
            "model='from_checkpoint' is the model of train.init_from: give --train.init-from RUN or a folder"
        )
    is_gone = not isdir(split_step(source)[0])
    return model_of(train.run_dir if is_gone and isdir(Path(train.run_dir) / FOLDER) else source)


def initial_weights(config: ExperimentConfig) -> InitialWeights | None:
    """The weights that `config.train.init_from` and `init_weights` name; None if none are given.

    If the config's tokenizer has the tokens of theirs and more, the embedding gets a row for each, and so does a head
    of its own: the mean of the rows of all tokens before.

    Raises:
        InputError: there is no such folder or step, it is damaged, or its model computes something else, which shapes
            need not show; the message names each field that differs, and the tokenizer if the weights have another one.
    """
    source = config.train.init_from
    if source is None:
        return None
    folder, step = split_step(source)
    if not isdir(folder):
        raise InputError(
            f"train.init_from: no folder {str(folder)!r}; give a training run, or a folder with config.json and weights"
        )
    if isdir(folder / FOLDER):
        run = load_params(folder, step, weights=config.train.init_weights)
        is_padded = False
        stored: TokenizerConfig | None = tokenizer_of_run(folder, run.config.data.tokenizer)
        # From the host each process puts its own part on its devices.
        params = jax.device_get(run.params)
        found = InitialWeights(params=params, experiment=run.config, step=run.step, run=run.run)
        model = run.config.model
    else:
        asked = {
            f"step {step}": step is not None,
            "average of the weights (train.init_weights)": config.train.init_weights == "average",
            "moments of an optimizer (train.init_optimizer)": config.train.init_optimizer,
        }
        if missing := next((name for name, is_asked in asked.items() if is_asked), None):
            raise InputError(f"train.init_from {folder} is not a training run, so it has no {missing}: leave that out")
        loaded = load_model(folder)
        is_padded = loaded.layout == "hf"
        stored, model = loaded.tokenizer, loaded.config
        found = InitialWeights(params=loaded.params)
    added = _added_tokens(stored, config)
    if stored is not None and added:
        known = make_tokenizer(stored).vocab_size
        found = dataclasses.replace(found, params=_grown(found.params, known, config.model), added=added)
        sizes = {"vocab_size": config.model.vocab_size, "vocab_multiple": config.model.vocab_multiple}
        differences = model_differences(dataclasses.replace(model, **sizes), config.model)
    else:
        differences = model_differences(model, config.model, is_padded=is_padded)
        differences += tokenizer_differences(stored, config.data.tokenizer)
    if differences:
        raise InputError(
            f"train.init_from {folder} holds another model, {model.num_layers} layers of width {model.d_model}: "
            f"{'; '.join(differences)}; make the config agree with it or take other weights"
        )
    return found


def model_differences(stored: ModelConfig, own: ModelConfig, *, is_padded: bool = False) -> list[str]:
    """A phrase for each field that makes weights of one model mean something else in the other.

    Args:
        stored: config of the model that the weights belong to.
        own: config of the model that is to take them.
        is_padded: the vocabulary of `stored` is its number of rows, as in the "hf" layout, which does not tell how many
            of them stand for tokens.
    """
    was, here = decisive(stored), decisive(own)
    if was["padded_vocab_size"] == here["padded_vocab_size"]:
        for name in ("vocab_multiple", "vocab_size") if is_padded else ("vocab_multiple",):
            was[name] = here[name]
    return [
        f"model.{name} was {short(was.get(name))}, here {short(here.get(name))}"
        for name in dict.fromkeys([*was, *here])
        if was.get(name) != here.get(name)
    ]


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


def tokenizer_differences(stored: TokenizerConfig | None, own: TokenizerConfig) -> list[str]:
    """One phrase if the tokenizers give different ids, in a list; empty if not, or if none is stored."""
    if stored is None or stored == own:
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


def _added_tokens(stored: TokenizerConfig | None, config: ExperimentConfig) -> int:
    """How many tokens a config's tokenizer has beyond a stored one; 0 if it is not that one with more at the end."""
    own = config.data.tokenizer
    if stored is None or stored == own:
        return 0
    was, here = make_tokenizer(stored), make_tokenizer(own)
    added = here.vocab_size - was.vocab_size
    if added <= 0 or config.model.vocab_size < here.vocab_size or was.end_of_document != here.end_of_document:
        return 0
    old, new = _definition(was), _definition(here)
    merges = [definition["model"].get("merges") or [] for definition in (old, new)]
    goes_on = merges[1][: len(merges[0])] == merges[0] and _beside_tokens(old) == _beside_tokens(new)
    before, after = (tokenizers.Tokenizer.from_str(one.to_json()).get_vocab() for one in (was, here))
    return added if goes_on and all(after.get(token) == number for token, number in before.items()) else 0


def _beside_tokens(definition: dict[str, Any]) -> dict[str, Any]:
    """What a tokenizer does to text before it looks for tokens, and after."""
    of_tokens = {"added_tokens": None, "model": {**definition["model"], "vocab": None, "merges": None}}
    return definition | of_tokens


def _grown(params: Params, known: int, model: ModelConfig) -> Params:
    """Parameters with as many rows in every table as a model has; from `known` on they are the mean of those before."""

    def grow(table: Any) -> np.ndarray:
        rows = np.asarray(table)[:known]
        mean = rows.mean(axis=0, dtype=np.float32).astype(rows.dtype)
        return np.concatenate([rows, np.broadcast_to(mean, (model.padded_vocab_size - known, rows.shape[1]))])

    tables = {name: {"table": grow(params[name]["table"])} for name in ("embedding", "lm_head") if name in params}
    return {**params, **tables}
