"""Serves a checkpoint over HTTP: python -m mamba_jax.serve runs/quickstart."""

import dataclasses
import os
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mamba_jax import cli
from mamba_jax.cli import one_line_errors
from mamba_jax.errors import InputError
from mamba_jax.generation.weights import Weights
from mamba_jax.generator import Generator, GeneratorConfig
from mamba_jax.loaded import load
from mamba_jax.models.mixers.declaration import DType
from mamba_jax.serve.limits import Limits
from mamba_jax.serve.service import Service
from mamba_jax.serve.warm_up import warm_up
from mamba_jax.sharding.config import MeshConfig

_KEY = "MAMBA_JAX_API_KEY"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Serves a checkpoint over HTTP, to clients of OpenAI's completions.

    If the environment variable MAMBA_JAX_API_KEY is set, clients must send what it holds as their API key.

    Attributes:
        checkpoint: a training run's directory, or a folder with config.json and safetensors.
        host: the address to listen at; 0.0.0.0 is all of this machine's.
        port: the port; 0 takes a free one.
        name: what clients call the model; None is the name of the folder.
        rows: continuations that the model works on together.
        max_length: most tokens of a prompt and its continuation; None is any number.
        weights: "exact", or "int8" for matrices that are rounded to 8 bits.
        state_dtype: what recurrent states are kept in from token to token.
        mesh: how weights and rows are split over devices.
        step: which checkpoint of a training run; None is the newest.
        average: the moving average of a training run's weights.
        compute_dtype: dtype of matrix products and activations; None takes that of the checkpoint.
        warm_up: prompts of up to so many tokens need not wait for a program to be compiled; it takes longer to start.
        limits: what clients may do.
    """

    checkpoint: tyro.conf.Positional[str]
    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    rows: int = 16
    max_length: int | None = 4096
    weights: Weights = "exact"
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    mesh: MeshConfig = dataclasses.field(default_factory=lambda: MeshConfig(data=1))
    step: int | None = None
    average: bool = False
    compute_dtype: DType | None = None
    warm_up: int = 16
    limits: Annotated[Limits, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Limits)


def main(prog: str = "python -m mamba_jax.serve") -> None:
    """Reads the command line and serves what it names.

    Args:
        prog: what it is called by.
    """
    with one_line_errors():
        arguments = cli.parse(Arguments, prog=prog)
        try:
            from mamba_jax.serve.server import Server, bind
        except ImportError as error:
            package = (error.name or "").partition(".")[0]
            if package not in ("starlette", "uvicorn"):
                raise
            raise InputError(f"a server needs the package {package}: pip install 'mamba-jax[serve]'") from None
        api_key = os.environ.get(_KEY)
        if api_key == "":
            raise InputError(f"{_KEY} is empty: give a key, or unset it to let all clients in")
        with bind(arguments.host, arguments.port) as bound:
            generator = _generator(arguments)
            name = arguments.name or Path(arguments.checkpoint).resolve().name
            service = Service(generator, name=name, limits=arguments.limits, api_key=api_key)
            warm_up(generator, arguments.warm_up)
            host, port = bound.getsockname()[:2]
            ready = f"serving {name} at {host} port {port}, {arguments.rows} rows"
            status = Server(service, bound, ready=ready).run()
        if not service.stop(timeout=0):
            # The thread waits for a program that cannot be interrupted, and would crash without an interpreter.
            os._exit(status)
        if status:
            raise SystemExit(status)


def _generator(arguments: Arguments) -> Generator:
    """The checkpoint, ready to write."""
    weights = "average" if arguments.average else "weights"
    model = load(arguments.checkpoint, step=arguments.step, weights=weights, compute_dtype=arguments.compute_dtype)
    names = ("rows", "max_length", "weights", "state_dtype", "mesh")
    return Generator(model, GeneratorConfig(**{name: getattr(arguments, name) for name in names}))


if __name__ == "__main__":
    main()
