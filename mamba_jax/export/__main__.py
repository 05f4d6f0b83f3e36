"""Writes a checkpoint as safetensors: python -m mamba_jax.export runs/quickstart runs/quickstart/export."""

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from mamba_jax.cli import one_line_errors, parse
from mamba_jax.export import companions, huggingface
from mamba_jax.export.files import require_new_folder
from mamba_jax.export.load import load_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Writes a training run, or a safetensors folder of another layout, as config.json and model.safetensors.

    The tokenizer comes along as tokenizer.json and tokenizer_config.json, that of bytes too.

    Attributes:
        checkpoint: a training run's directory, or a folder with config.json and safetensors.
        out: the folder to write; it must not exist, or be empty.
        layout: "hf" for the class of transformers that has such layers, "original" for the names of the authors' code.
        step: which checkpoint of a training run; None is the newest.
        weights: those of the last update, or their average if the run keeps one.
    """

    checkpoint: tyro.conf.Positional[str]
    out: tyro.conf.Positional[str]
    layout: str = "hf"
    step: int | None = None
    weights: Literal["weights", "average"] = "weights"


def main() -> None:
    """The command line: writes a checkpoint as a folder in a published layout, with its tokenizer files."""
    with one_line_errors():
        arguments = parse(Arguments, prog="python -m mamba_jax.export")
        require_new_folder(arguments.out)
        loaded = load_model(arguments.checkpoint, step=arguments.step, weights=arguments.weights)
        if loaded.experiment is not None and loaded.tokenizer is not None:
            files = companions.written(loaded.tokenizer, loaded.config, layout=arguments.layout)
        else:
            files = companions.copied(Path(arguments.checkpoint))
        ids = companions.special_tokens(loaded.tokenizer) if loaded.tokenizer is not None else {}
        huggingface.save(
            arguments.out,
            loaded.config,
            loaded.params,
            layout=arguments.layout,
            extra={**ids, **loaded.extra},
            companions=files,
        )
        names = ", ".join(["config.json", "model.safetensors", *files])
        print(f"wrote {names} ({arguments.layout} layout) to {arguments.out}")


if __name__ == "__main__":
    main()
