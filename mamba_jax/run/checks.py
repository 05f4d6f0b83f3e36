"""What a config asks that no training can do here is refused before anything is computed."""

import dataclasses

import jax

from mamba_jax.config_base import nested_fields
from mamba_jax.data.tokenizer import Tokenizer
from mamba_jax.errors import InputError
from mamba_jax.experiment import ExperimentConfig
from mamba_jax.training.program import TrainProgram


def check_model(config: ExperimentConfig, tokenizer: Tokenizer) -> None:
    """Refuses models that cannot hold the tokenizer's ids, or that would train badly in their dtypes."""
    if tokenizer.vocab_size > config.model.vocab_size:
        raise InputError(
            f"model.vocab_size is {config.model.vocab_size} but the tokenizer has {tokenizer.vocab_size} ids: "
            f"set model.vocab_size to {tokenizer.vocab_size} or more"
        )
    if config.model.param_dtype != "float32":
        raise InputError(f"training needs model.param_dtype='float32', got {config.model.param_dtype!r}")
    if config.model.compute_dtype == "float16":
        raise InputError("model.compute_dtype='float16' would lose small gradients: choose 'bfloat16' or 'float32'")


def check_runs_here(program: TrainProgram) -> None:
    """Traces the step if the config names a kernel implementation, so that one that cannot run is refused early."""
    asked = {
        f"{name}={value!r}": None
        for stack in program.config.model.stacks
        for path, value in nested_fields(dataclasses.asdict(stack.mixer))
        if (name := path.rpartition(".")[2]).endswith("_implementation") and value is not None
    }
    if not asked:
        return
    try:
        with jax.set_mesh(program.mesh):
            program.step.trace(program.state, program.batch)
    except NotImplementedError as error:
        raise InputError(
            f"model.mixer.{', '.join(asked)} cannot run this: {error}; None lets the platform decide"
        ) from error
