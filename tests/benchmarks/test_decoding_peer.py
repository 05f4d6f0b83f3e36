"""The benchmark of generation compares with transformers on one and the same model."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import harness
import run_decode
from decoding import peer
from mamba_jax.config import Mamba1Config
from mamba_jax.errors import InputError
from mamba_jax.generation.generate import generate
from mamba_jax.generation.sampling import SamplingConfig


def test_transformers_reads_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its place a program that answers as it does, with the right tokens and with others, or that fails."""
    monkeypatch.setattr(run_decode, "SIZES", {"small": (16, 1, Mamba1Config(state_dim=4))})
    python = tmp_path / "python"
    options = run_decode.Options(models=("small",))
    job = peer.Job(batches=(2,), num_tokens=4, prompts=(1,), prompt_length=8, seconds=0.1)
    definition = run_decode.definition_of(run_decode.cases(options)[0], options)
    params, greedy = run_decode.random_params(definition), SamplingConfig(temperature=0.0)
    prompt, key = jnp.full((1, 4), 5), jax.random.key(0)
    tokens = generate(definition, params, prompt, num_tokens=8, key=key, sampling=greedy)[0].tolist()
    python.touch(mode=0o700)
    results = harness.Results(tmp_path, harness.setting_here("a machine", libraries=()))

    def answers(tokens: list[int]) -> None:
        lines = (
            {"what": "decoding", "batch": 2, "seconds": 0.5, "tokens": tokens, "name": "transformers"},
            {"what": "reading prompts", "batch": 1, "seconds": 0.25, "name": "transformers"},
        )
        python.write_text("#!/bin/sh\ncat <<END\n" + "\n".join(map(json.dumps, lines)) + "\nEND\n")
        peer.measure(results, "small", python, job, definition=definition, params=params)

    answers(tokens)
    with pytest.raises(InputError, match=r"but this library by .*: not one model"):
        answers([token + 1 for token in tokens])
    python.write_text("#!/bin/sh\necho no torch >&2; exit 1\n")
    with pytest.raises(InputError, match=r"not timed by .*: no torch"):
        peer.measure(results, "small", python, job, definition=definition, params=params)
    found = harness.read(tmp_path / harness.FILE_NAME)
    assert [(row.op, row.workload, row.figures["tokens per second"]) for row in found] == [
        ("decoding", "small, batch 2", 4.0),
        ("reading prompts", "small, batch 1, prompts of 8", 32.0),
    ]
