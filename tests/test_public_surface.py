"""`import mamba_jax`: what it gives, what it costs, and old names of modules."""

import importlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import mamba_jax
from mamba_jax import renamed
from mamba_jax.errors import InputError
from mamba_jax.export import huggingface
from mamba_jax.models.parameters import define, init
from tests.evaluation.conftest import SavedRun, saved_run

__all__ = ["saved_run"]
ROOT = Path(__file__).parents[1]


def test_the_import_loads_nothing_else() -> None:
    code = "import sys, mamba_jax; print(sorted({'jax', 'flax', 'orbax', 'numpy'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_name_is_there() -> None:
    assert 8 <= len(mamba_jax.__all__) <= 12
    for name in mamba_jax.__all__:
        assert callable(getattr(mamba_jax, name)), name
    with pytest.raises(AttributeError, match=r"no attribute 'laod'; it has .*load"):
        _ = mamba_jax.laod
    assert importlib.metadata.version("mamba-jax") == mamba_jax.__version__
    assert (Path(mamba_jax.__file__).parent / "py.typed").is_file()


def test_a_run_is_loaded_and_called(saved_run: SavedRun) -> None:
    model = mamba_jax.load(saved_run.folder)
    tokens = [list(b"The rest")]
    output = model(tokens)
    expected = define(model.config).merge(saved_run.params)(jnp.asarray(tokens))
    np.testing.assert_allclose(output.logits, expected.logits, rtol=0, atol=1e-6)
    head = model(tokens[0:1], None)
    rest = model([[ord("s")]], head.state)
    assert rest.logits.shape == (1, 1, model.config.padded_vocab_size)
    text = model.complete("what", num_tokens=4, sampling=mamba_jax.SamplingConfig(temperature=0.0))
    assert text.startswith("what")
    greedy = mamba_jax.SamplingConfig(temperature=0.0)
    assert model.generate(tokens, num_tokens=3, sampling=greedy).shape == (1, 3)


def test_a_folder_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    config = mamba_jax.ModelConfig(vocab_size=24, d_model=8, num_layers=1, compute_dtype="float32")
    import jax

    huggingface.save(tmp_path / "model", config, init(config, jax.random.key(0)), layout="hf")
    model = mamba_jax.load(tmp_path / "model", compute_dtype="bfloat16")
    assert model([[1, 2, 3]]).logits.shape == (1, 3, 24)
    assert model.config.compute_dtype == "bfloat16"
    with pytest.raises(InputError, match="has no tokenizer: give token ids"):
        model.complete("text")


@pytest.mark.parametrize("old", [*renamed._MOVED, "models.mamba1"])
def test_old_names_are_the_modules_that_moved(old: str) -> None:
    new = renamed.new_name(f"mamba_jax.{old}")
    assert new is not None
    assert importlib.import_module(f"mamba_jax.{old}") is importlib.import_module(new)
