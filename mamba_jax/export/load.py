"""Loads any checkpoint that this project can read, given its path: a training run or a safetensors folder."""

import dataclasses
from os.path import isdir, lexists
from pathlib import Path
from typing import Any, Literal

from mamba_jax.checkpoint import load_params
from mamba_jax.data.config import TokenizerConfig
from mamba_jax.errors import InputError
from mamba_jax.experiment import ExperimentConfig
from mamba_jax.export import huggingface, peft
from mamba_jax.export.companions import tokenizer_beside, tokenizer_of_run
from mamba_jax.models.config import ModelConfig
from mamba_jax.models.parameters import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedCheckpoint:
    """A model out of a training run or a safetensors folder.

    Attributes:
        config: config of the model.
        params: its parameters.
        experiment: the training run's config; None for a safetensors folder.
        step: updates done; None for a safetensors folder.
        extra: see `mamba_jax.export.huggingface.LoadedModel`; empty for a training run.
        tokenizer: the one that lies in the folder, else that of the training run; None for a folder without one.
        layout: of a safetensors folder; None for a training run.
        stored: of a training run, the parameters as it stores them, with a `LowRank` where there is an adapter.
    """

    config: ModelConfig
    params: Params
    experiment: ExperimentConfig | None
    step: int | None
    extra: dict[str, Any]
    tokenizer: TokenizerConfig | None
    layout: str | None = None
    stored: Params | None = None


def load_model(
    path: str | Path, *, step: int | None = None, weights: Literal["weights", "average"] = "weights"
) -> LoadedCheckpoint:
    """Reads a training run's directory, a folder with `config.json` and safetensors, or an adapter in PEFT's layout.

    Adapters are merged into the weights that they belong to.

    Args:
        path: the folder.
        step: which checkpoint of a training run; None is the newest.
        weights: of a training run, "weights" for those of the last update or "average" for their moving average.

    Raises:
        InputError: the folder is neither, is damaged, or has no such step.
    """
    path = Path(path)
    if not isdir(path):
        raise InputError(f"no checkpoint folder {path}")
    if isdir(path / "checkpoints"):
        run = load_params(path, step, weights=weights)
        return LoadedCheckpoint(
            config=run.config.model,
            params=run.params,
            experiment=run.config,
            step=run.step,
            extra={},
            tokenizer=tokenizer_of_run(path, run.config.data.tokenizer),
            stored=run.stored,
        )
    is_adapter = peft.is_adapter(path)
    if not is_adapter and not lexists(path / "config.json"):
        raise InputError(f"{path} is neither a training run (no folder 'checkpoints') nor a model (no 'config.json')")
    if step is not None:
        raise InputError(f"{path} is not a training run, so it has no step {step}: leave the step out")
    if weights == "average":
        raise InputError(f"{path} is not a training run, so it keeps no average of the weights: leave --weights out")
    if is_adapter:
        base = load_model(peft.base_of(path))
        params = peft.merge(path, base.config, base.params)
        return dataclasses.replace(
            base,
            params=params,
            experiment=None,
            step=None,
            stored=None,
            tokenizer=tokenizer_beside(path) or base.tokenizer,
        )
    model = huggingface.load(path)
    return LoadedCheckpoint(
        config=model.config,
        params=model.params,
        experiment=None,
        step=None,
        extra=model.extra,
        tokenizer=tokenizer_beside(path),
        layout=model.layout,
    )
