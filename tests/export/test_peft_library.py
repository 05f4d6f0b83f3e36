"""PEFT and `transformers` compute with an adapter, and with its merged export, what this library does.

`TORCH_PYTHON=/path/to/python` names the interpreter of an environment with torch, transformers and PEFT; without it one
is made where that can be done.
"""

import dataclasses
import json
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax.config import LoraConfig
from mamba_jax.export import huggingface
from mamba_jax.export.load import LoadedCheckpoint, load_model
from mamba_jax.models.parameters import Params, define
from mamba_jax.models.storage.low_rank import adapted, merged
from tests.export.test_peft import GOLDEN, LORA, MODELS, save
from tests.export.torch_environment import environment, torch_python

__all__ = ["torch_python"]

pytestmark = pytest.mark.slow

IDS = np.random.default_rng(0).integers(0, 60, (2, 20))
# PEFT refuses the output projections of the first three and has no blocks that layers share; `transformers` passes the
# step size's adapter by in Mamba and Jamba until it is merged, as is tested with the second.
TARGETS = {
    "mamba1_tiny": "in_proj|x_proj",
    "mamba2_tiny": "(in|BC|dt)_proj",
    "nemotron_h_tiny": "(in|BC|dt|up|q|k|v)_proj",
    "zamba2_tiny": "^layers.*(in|BC|dt|out)_proj|linear",
}


def lora(name: str) -> LoraConfig:
    return dataclasses.replace(LORA, targets=(TARGETS[name],) if name in TARGETS else ())


@pytest.fixture(scope="module")
def theirs(
    torch_python: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, LoadedCheckpoint, Params]]:
    folder = tmp_path_factory.mktemp("peft")
    found = {}
    for name in MODELS:
        model = load_model(GOLDEN / name)
        stored = save(folder / name / "adapter", model, GOLDEN / name, lora(name))
        huggingface.save(folder / name / "merged", model.config, merged(stored), layout="hf", extra=model.extra)
        found[name] = folder / name, model, stored
    models = [{"base": str(GOLDEN / name), "out": str(folder / name)} for name in MODELS]
    (folder / "job.json").write_text(json.dumps({"ids": IDS.tolist(), "models": models}))
    worker = Path(__file__).with_name("peft_worker.py")
    subprocess.run([torch_python, str(worker), str(folder / "job.json")], env=environment(), check=True)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_logits(name: str, theirs: dict[str, tuple[Path, LoadedCheckpoint, Params]]) -> None:
    folder, model, stored = theirs[name]
    config = dataclasses.replace(model.config, compute_dtype="float32", param_dtype="float32")
    plain = define(config)

    def logits(definition, params: Params) -> np.ndarray:
        return np.asarray(jax.jit(lambda params: definition.merge(params)(jnp.asarray(IDS)).logits)(params))

    before, unmerged = logits(plain, model.params), logits(adapted(plain, lora(name)), stored)
    largest = np.abs(unmerged).max()
    assert np.abs(unmerged - before).max() > 0.01 * largest
    # Both are float32: a few layers of some twenty roundings of 6e-8 each.
    for file in ("adapter",) * (name != "jamba_tiny") + ("adapter_merged", "merged"):
        np.testing.assert_allclose(np.load(folder / f"{file}.npy"), unmerged, rtol=0, atol=1e-4 * largest)
    # An adapter that PEFT has made.
    found = load_model(folder / "theirs")
    ours = logits(plain, found.params)
    np.testing.assert_allclose(np.load(folder / "theirs.npy"), ours, rtol=0, atol=1e-4 * np.abs(ours).max())
    assert np.abs(ours - before).max() > 0.01 * largest
