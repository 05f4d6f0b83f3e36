"""Writes a checkpoint for other programs: python -m mamba_jax.export runs/quickstart runs/quickstart/export."""

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from mamba_jax.cli import one_line_errors, parse
from mamba_jax.errors import InputError
from mamba_jax.export import companions, huggingface, llama_cpp, peft
from mamba_jax.export.files import require_new_folder
from mamba_jax.export.initial import split_step
from mamba_jax.export.load import LoadedCheckpoint, load_model
from mamba_jax.export.published_config import formats
from mamba_jax.export.stablehlo import folder as stablehlo


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Writes a training run, or a safetensors folder, in a layout that other programs read.

    The tokenizer comes along as tokenizer.json and tokenizer_config.json, that of bytes too.

    Attributes:
        checkpoint: a training run's directory, or a folder with config.json and safetensors.
        out: the folder to write; it must not exist, or be empty.
        layout: "hf" for the class of transformers that has such layers, "original" for the names of the authors' code,
            "stablehlo" for compiled programs that run without this library, "gguf" for llama.cpp, "peft" for the
            adapters alone of a run with `lora.rank`, which all other layouts merge into the weights.
        step: which checkpoint of a training run; None is the newest.
        weights: those of the last update, or their average if the run keeps one.
        base: of "peft", the folder of the model that the adapters belong to; None is the run's `train.init_from`.
        max_length: of "stablehlo", most tokens of a row, prompt included; attention without a window needs it.
    """

    checkpoint: tyro.conf.Positional[str]
    out: tyro.conf.Positional[str]
    layout: str = "hf"
    step: int | None = None
    weights: Literal["weights", "average"] = "weights"
    base: str | None = None
    max_length: int | None = None


def main(prog: str = "python -m mamba_jax.export") -> None:
    """The command line: writes a checkpoint as a folder in some layout, with its tokenizer files.

    Args:
        prog: what it is called by.
    """
    with one_line_errors():
        arguments = parse(Arguments, prog=prog)
        layouts = {found.layout for found in formats()} | _WRITERS.keys()
        if arguments.layout not in layouts:
            choices = " or ".join(map(repr, sorted(layouts)))
            raise InputError(f"unknown layout {arguments.layout!r}: choose {choices}")
        require_new_folder(arguments.out)
        loaded = load_model(arguments.checkpoint, step=arguments.step, weights=arguments.weights)
        if loaded.experiment is not None and loaded.tokenizer is not None:
            files = companions.written(loaded.tokenizer, loaded.config, layout=arguments.layout)
        else:
            files = companions.copied(Path(arguments.checkpoint))
        if arguments.base is not None and arguments.layout != peft.LAYOUT:
            raise InputError(f"--base is of the layout {peft.LAYOUT!r}, not of {arguments.layout!r}: leave it out")
        names = ", ".join(_WRITERS.get(arguments.layout, _write_published)(arguments, loaded, files))
        print(f"wrote {names} ({arguments.layout} layout) to {arguments.out}")


def _write_published(arguments: Arguments, loaded: LoadedCheckpoint, files: dict[str, bytes]) -> tuple[str, ...]:
    """Writes the layout of a published checkpoint; returns the names of its files."""
    _refuse_max_length(arguments)
    ids = companions.special_tokens(loaded.tokenizer) if loaded.tokenizer is not None else {}
    huggingface.save(
        arguments.out,
        loaded.config,
        loaded.params,
        layout=arguments.layout,
        extra={**ids, **loaded.extra},
        companions=files,
    )
    return ("config.json", "model.safetensors", *files)


def _write_stablehlo(arguments: Arguments, loaded: LoadedCheckpoint, files: dict[str, bytes]) -> tuple[str, ...]:
    """Writes compiled programs; returns the names of their files."""
    tokenizer = None if loaded.tokenizer is None else companions.open_tokenizer(loaded.tokenizer)
    return stablehlo.save(
        arguments.out,
        loaded.config,
        loaded.params,
        max_length=arguments.max_length,
        vocab_size=None if tokenizer is None else tokenizer.vocab_size,
        end_of_document=None if tokenizer is None else tokenizer.end_of_document,
        companions=files,
    )


def _write_gguf(arguments: Arguments, loaded: LoadedCheckpoint, files: dict[str, bytes]) -> tuple[str, ...]:
    """Writes a GGUF file; returns the names of the files."""
    _refuse_max_length(arguments)
    tokenizer = None if loaded.tokenizer is None else companions.open_tokenizer(loaded.tokenizer)
    end = None if tokenizer is None else tokenizer.end_of_document
    names = llama_cpp.save(arguments.out, loaded.config, loaded.params, end_of_document=end, companions=files)
    if tokenizer is not None and llama_cpp.vocabulary(files["tokenizer.json"]) is None:
        print("llama.cpp has no tokenizer that gives the ids of this one: it will take and give ids alone")
    return names


def _write_peft(arguments: Arguments, loaded: LoadedCheckpoint, files: dict[str, bytes]) -> tuple[str, ...]:
    """Writes the adapters of a run; returns the names of the files."""
    _refuse_max_length(arguments)
    if loaded.experiment is None or loaded.stored is None or loaded.experiment.lora.rank is None:
        raise InputError(
            f"{arguments.checkpoint} is no training run with lora.rank, so it has no adapters: choose another layout"
        )
    source = loaded.experiment.train.init_from
    base = arguments.base or (None if source is None else str(split_step(source)[0]))
    if base is None:
        raise InputError(
            f"{arguments.checkpoint} does not tell what its adapters belong to: give the folder with --base"
        )
    names = peft.save(
        arguments.out, loaded.config, loaded.stored, lora=loaded.experiment.lora, base=base, companions=files
    )
    for limit in peft.limits(loaded.config, loaded.stored):
        print(limit)
    return names


def _refuse_max_length(arguments: Arguments) -> None:
    if arguments.max_length is not None:
        raise InputError(f"--max-length is of the layout 'stablehlo', not of {arguments.layout!r}: leave it out")


_WRITERS = {stablehlo.LAYOUT: _write_stablehlo, llama_cpp.LAYOUT: _write_gguf, peft.LAYOUT: _write_peft}


if __name__ == "__main__":
    main()
