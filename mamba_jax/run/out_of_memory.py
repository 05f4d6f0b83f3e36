"""Turns running out of memory into one line that says which settings need less of it."""

import contextlib
from collections.abc import Iterator

import jax

from mamba_jax.errors import InputError
from mamba_jax.experiment import ExperimentConfig
from mamba_jax.models.config import ModelConfig
from mamba_jax.run.watchdog import Watchdog

_SIGNS = ("resource_exhausted", "out of memory")
_MOST_CHARACTERS = 200


def advice(model: ModelConfig) -> str:
    """Which settings of the config make a training step take less memory, for an error message."""
    ways = ["a larger mesh.fsdp or mesh.sequence", "a smaller data.global_batch"]
    ways += ["a larger train.accumulation_steps or train.windows"]
    if model.remat != "block":
        ways.append("model.remat block")
    return "try " + ", ".join(ways[:-1]) + f" or {ways[-1]}"


@contextlib.contextmanager
def out_of_memory_in_one_line(config: ExperimentConfig, watchdog: Watchdog) -> Iterator[None]:
    """Turns the out-of-memory errors of XLA and of Python into one `InputError`.

    Args:
        config: the message suggests which of its fields to change.
        watchdog: its field `doing` says what the run was doing, for the message.

    Raises:
        InputError: a device or the host had no memory left.
    """
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        text = " ".join(str(error).split())
        if not isinstance(error, MemoryError) and not any(sign in text.lower() for sign in _SIGNS):
            raise
        raise InputError(
            f"out of memory while {watchdog.doing} ({text[:_MOST_CHARACTERS] or type(error).__name__}): "
            f"{advice(config.model)} (docs/training.md, Memory)"
        ) from error
