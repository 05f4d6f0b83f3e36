"""What `transformers` makes of the models that the benchmark of generation times, on the same weights."""

import dataclasses
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from harness import Results
from mamba_jax.errors import InputError
from mamba_jax.export import huggingface
from mamba_jax.generation.generate import generate
from mamba_jax.generation.sampling import SamplingConfig
from mamba_jax.models.parameters import ModelDefinition


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What to time.

    Attributes:
        batches: rows of the decoding programs.
        num_tokens: their tokens.
        prompts: batches of prompts to read.
        prompt_length: their tokens.
        seconds: time to spend on each measurement.
    """

    batches: tuple[int, ...]
    num_tokens: int
    prompts: tuple[int, ...]
    prompt_length: int
    seconds: float


def measure(results: Results, model: str, python: Path, job: Job, *, definition: ModelDefinition, params: Any) -> None:
    """Adds a row for every program, by a folder that this library exports; the first greedy tokens have to be ours.

    Args:
        results: where rows are added.
        model: its name there.
        python: an interpreter with torch and transformers.
        job: what to time.
        definition: the model.
        params: its parameters, stacked.

    Raises:
        InputError: the interpreter fails, or continues by other tokens.
    """
    with tempfile.TemporaryDirectory() as folder:
        place, path = Path(folder) / "model", Path(folder) / "job.json"
        huggingface.save(place, definition.config, params, layout="hf")
        path.write_text(json.dumps(dataclasses.asdict(job) | {"folder": str(place), "threads": os.cpu_count()}))
        worker = Path(__file__).parent / "peer_worker.py"
        done = subprocess.run([python, worker, path], check=False, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"not timed by {python}: {done.stderr.strip().splitlines()[-1]}")
    greedy, key = SamplingConfig(temperature=0.0), jax.random.key(0)
    ours = generate(definition, params, jnp.full((1, 4), 5), num_tokens=8, key=key, sampling=greedy)[0].tolist()
    for line in map(json.loads, done.stdout.splitlines()):
        is_decoding = line["what"] == "decoding"
        if is_decoding and line["tokens"] != ours:
            raise InputError(f"transformers continues by {line['tokens']} but this library by {ours}: not one model")
        results.add(
            line["what"],
            f"{model}, batch {line['batch']}" + ("" if is_decoding else f", prompts of {job.prompt_length}"),
            implementation=line["name"],
            direction="forward",
            milliseconds=1e3 * line["seconds"],
            tokens_per_second=line["batch"] * (1 if is_decoding else job.prompt_length) / line["seconds"],
        )
