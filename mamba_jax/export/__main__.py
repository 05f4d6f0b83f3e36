"""Writes a checkpoint as safetensors: python -m mamba_jax.export runs/quickstart runs/quickstart/export."""

import dataclasses
import shutil
from pathlib import Path

import tyro

from mamba_jax.cli import one_line_errors, parse
from mamba_jax.data.tokenizer import make_tokenizer
from mamba_jax.export import huggingface
from mamba_jax.export.configs import Layout
from mamba_jax.export.load import LoadedCheckpoint, load_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Writes a training run, or a safetensors folder of another layout, as config.json and model.safetensors.

    The `tokenizers` JSON file that a run was trained with comes along as tokenizer.json.

    Attributes:
        checkpoint: a training run's directory, or a folder with config.json and safetensors.
        out: the folder to write; it must not exist, or be empty.
        layout: "hf" for transformers' MambaForCausalLM, "original" for the names of the authors' code.
        step: which checkpoint of a training run; None is the newest.
    """

    checkpoint: tyro.conf.Positional[str]
    out: tyro.conf.Positional[str]
    layout: Layout = "hf"
    step: int | None = None


def main() -> None:
    with one_line_errors():
        arguments = parse(Arguments, prog="python -m mamba_jax.export")
        huggingface.require_new_folder(arguments.out)
        loaded = load_model(arguments.checkpoint, step=arguments.step)
        extra = {**_special_tokens(loaded), **loaded.extra}
        huggingface.save(arguments.out, loaded.config, loaded.params, layout=arguments.layout, extra=extra)
        files = ["config.json", "model.safetensors"]
        if loaded.experiment is not None and loaded.experiment.data.tokenizer.path is not None:
            shutil.copyfile(loaded.experiment.data.tokenizer.path, Path(arguments.out) / "tokenizer.json")
            files.append("tokenizer.json")
    print(f"wrote {', '.join(files)} ({arguments.layout} layout) to {arguments.out}")


def _special_tokens(loaded: LoadedCheckpoint) -> dict[str, int]:
    """Ids that `transformers` would otherwise take to be 0, which for bytes or words is an ordinary token."""
    if loaded.experiment is None:
        return {}
    end_of_document = make_tokenizer(loaded.experiment.data.tokenizer).end_of_document
    return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end_of_document)


if __name__ == "__main__":
    main()
