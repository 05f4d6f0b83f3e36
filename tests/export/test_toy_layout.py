"""A layout in one file, registered by one line, is written, read and refused like any other."""

import dataclasses
import inspect
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mamba_jax.config import Mamba1Config, ModelConfig
from mamba_jax.errors import InputError
from mamba_jax.export import huggingface
from mamba_jax.export.load import load_model
from mamba_jax.models.config import Hybrid, Unit
from mamba_jax.models.parameters import init
from tests.toys import layout as toy
from tests.toys.mixer import EmaConfig

PAGE = Path(__file__).resolve().parents[2] / "docs" / "add_a_layout.md"
CONFIG = ModelConfig(
    vocab_size=24, vocab_multiple=1, d_model=8, num_layers=3, mixer=EmaConfig(rate=0.5), compute_dtype="float32"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "model"
    huggingface.save(folder, CONFIG, init(CONFIG, jax.random.key(0)), layout="toy")
    return folder


def copied(folder: Path, target: Path, **changes: object) -> Path:
    target.mkdir()
    content = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**content, **changes}))
    (target / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    return target


def test_the_page_shows_this_layout() -> None:
    (shown,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    source = inspect.getsource(toy)
    assert shown == source
    assert source.count("\n") <= 60
    assert source.count("FORMATS.append") == 1


def test_a_model_goes_there_and_back(folder: Path) -> None:
    loaded = load_model(folder)
    assert loaded.config.mixer == CONFIG.mixer
    jax.tree.map(np.testing.assert_array_equal, loaded.params, init(CONFIG, jax.random.key(0)))
    assert "layer2.mixer.rate" in load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version=2 is not supported, only 1"),
        ({"width": "8"}, "d_model: Input should be a valid integer"),
        ({"depth": 4}, r"missing layer3\.norm\.scale"),
        ({"width": 16}, "has shape .*, expected"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(folder: Path, tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_model(copied(folder, tmp_path / "changed", **changes))


def test_a_strange_tensor_is_refused(folder: Path, tmp_path: Path) -> None:
    target = copied(folder, tmp_path / "changed")
    tensors = load_file(target / "model.safetensors")
    save_file({**tensors, "layer0.gate": np.zeros(3, np.float32)}, target / "model.safetensors")
    with pytest.raises(InputError, match=r"unexpected layer0\.gate"):
        load_model(target)


@pytest.mark.parametrize(
    ("mixer", "layout", "message"),
    [
        (Mamba1Config(), "toy", "unknown layout 'toy': choose 'hf' or 'original'"),
        (EmaConfig(), "hf", "unknown layout 'hf': choose 'toy'"),
        (
            Hybrid(units=(Unit(mixers=(EmaConfig(), EmaConfig())),)),
            "hf",
            "LlamaForCausalLM: block 0 is 'ema', not Attention",
        ),
    ],
)
def test_a_layout_without_names_for_the_model_is_refused(
    tmp_path: Path, mixer: EmaConfig | Mamba1Config | Hybrid, layout: str, message: str
) -> None:
    config = dataclasses.replace(CONFIG, mixer=mixer, num_layers=2)
    with pytest.raises(InputError, match=message):
        huggingface.save(tmp_path / "model", config, {}, layout=layout)
    assert not (tmp_path / "model").exists()
