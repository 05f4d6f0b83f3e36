"""GGUF files have the tensors, by name, dtype and value, that llama.cpp's converter makes of the hf layout."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax.config import Hybrid, Mamba1Config, Mamba2Config, ModelConfig, TokenizerConfig
from mamba_jax.errors import InputError
from mamba_jax.export import __main__ as command
from mamba_jax.export import companions, huggingface, llama_cpp
from mamba_jax.export.weights import open_weights
from mamba_jax.models import parameters
from mamba_jax.models.config import DType
from mamba_jax.models.mixers import MlpConfig
from tests.export.conftest import random_model
from tests.export.torch_environment import environment, torch_python

__all__ = ["torch_python"]

MLP = MlpConfig(activation="relu_squared", gated=False)
MAMBA2 = Mamba2Config(head_dim=4, state_dim=8)
MODELS: dict[str, dict[str, Any]] = {
    "mamba": {"mixer": Mamba1Config(state_dim=3, conv_width=3, dt_rank=5)},
    "mamba in bfloat16": {"mixer": Mamba1Config(dt_rank=5), "param_dtype": "bfloat16", "tie_embeddings": True},
    "falcon mamba": {"mixer": Mamba1Config(dt_rank=5, selection_norm_eps=1e-5)},
    "mamba2": {"mixer": MAMBA2, "tie_embeddings": True},
    "mamba2 in float16": {"mixer": MAMBA2, "param_dtype": "float16"},
}


def exported(folder: Path, **changes: Any) -> gguf.GGUFReader:
    config, params = random_model(**changes)
    llama_cpp.save(folder / "out", config, params)
    huggingface.save(folder / "hf", config, params, layout="hf")
    return gguf.GGUFReader(folder / "out" / "model.gguf")


def value_of(reader: gguf.GGUFReader, name: str) -> Any:
    field = reader.get_field(name)
    assert field is not None, name
    return field.contents()


@pytest.mark.parametrize("name", MODELS)
def test_tensors(name: str, tmp_path: Path) -> None:
    reader = exported(tmp_path, **MODELS[name])
    stored = open_weights(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    is_mamba2 = config["model_type"] == "mamba2"
    architecture = gguf.MODEL_ARCH.MAMBA2 if is_mamba2 else gguf.MODEL_ARCH.MAMBA
    assert value_of(reader, "general.architecture") == gguf.MODEL_ARCH_NAMES[architecture]
    names = gguf.get_tensor_name_map(architecture, 3)
    written = {tensor.name: tensor for tensor in reader.tensors}
    # Every name is in the map, and a head of its own is there only if the model has one.
    expected = {
        str(names.get_name(key.replace("dt_bias", "dt_proj.bias"), try_suffixes=(".weight", ".bias"))): key
        for key in stored
    }
    assert written.keys() == expected.keys()
    assert ("output.weight" in written) == (not MODELS[name].get("tie_embeddings", False))
    for theirs, key in expected.items():
        tensor, value = written[theirs], stored[key].read().astype(np.float32)
        if key.endswith("A_log"):
            value = -np.exp(value)
        values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(value.shape)
        np.testing.assert_array_equal(values, value)
        # Sizes are listed with the fastest first. A matrix has two: of Mamba-2's numbers for a head one is 1.
        sizes = tensor.shape.tolist()
        is_row = key.endswith((".D", ".A_log")) and is_mamba2
        if key.endswith("mixer.norm.weight"):
            assert sizes == [value.size, 1]
        else:
            assert sizes == ([1, value.size] if is_row else [size for size in value.shape[::-1] if size != 1])
        is_matrix = theirs.endswith(".weight") and value.ndim == 2
        kind = {"bfloat16": "BF16", "float16": "F16"}.get(MODELS[name].get("param_dtype", ""), "F32")
        assert tensor.tensor_type.name == (kind if is_matrix else "F32"), theirs


def test_what_it_says_of_a_network(tmp_path: Path) -> None:
    reader = exported(tmp_path, mixer=MAMBA2)
    facts = {
        "mamba2.embedding_length": 8,
        "mamba2.vocab_size": 32,
        "mamba2.block_count": 3,
        "mamba2.ssm.conv_kernel": 4,
        "mamba2.ssm.inner_size": 16,
        "mamba2.ssm.state_size": 8,
        "mamba2.ssm.time_step_rank": 4,
        "mamba2.ssm.group_count": 1,
        "tokenizer.ggml.model": "none",
    }
    assert {name: value_of(reader, name) for name in facts} == facts
    assert value_of(reader, "mamba2.attention.layer_norm_rms_epsilon") == pytest.approx(1e-5)


def test_a_vocabulary_of_byte_pairs(tmp_path: Path, tokenizer_configs: dict[str, TokenizerConfig], monkeypatch) -> None:
    tokenizer = tokenizer_configs["byte-level"]
    size = companions.open_tokenizer(tokenizer).vocab_size
    config, params = random_model(vocab_size=size, mixer=Mamba1Config(), vocab_multiple=64)
    files = companions.written(tokenizer, config, layout="hf")
    ids = companions.special_tokens(tokenizer)
    huggingface.save(tmp_path / "hf", config, params, layout="hf", extra=ids, companions=files)
    monkeypatch.setattr("sys.argv", ["export", str(tmp_path / "hf"), str(tmp_path / "out"), "--layout", "gguf"])
    command.main()
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    model = json.loads(files["tokenizer.json"])["model"]
    tokens = value_of(reader, "tokenizer.ggml.tokens")
    assert tokens[:size] == sorted(model["vocab"], key=model["vocab"].get)
    assert tokens[size:] == [f"[PAD{row}]" for row in range(size, config.padded_vocab_size)]
    kinds = np.asarray(value_of(reader, "tokenizer.ggml.token_type"))
    assert kinds[ids["eos_token_id"]] == gguf.TokenType.CONTROL
    assert (kinds[size:] == gguf.TokenType.UNUSED).all()
    assert value_of(reader, "tokenizer.ggml.merges") == [" ".join(pair) for pair in model["merges"]]
    assert value_of(reader, "tokenizer.ggml.eos_token_id") == ids["eos_token_id"]


def test_bytes_are_left_to_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    config, params = random_model(vocab_size=257, mixer=Mamba1Config(dt_rank=5))
    files = companions.written(TokenizerConfig(), config, layout="hf")
    huggingface.save(tmp_path / "hf", config, params, layout="hf", companions=files)
    monkeypatch.setattr("sys.argv", ["export", str(tmp_path / "hf"), str(tmp_path / "out"), "--layout", "gguf"])
    command.main()
    said = "llama.cpp has no tokenizer that gives the ids of this one: it will take and give ids alone"
    assert said in capsys.readouterr().out
    assert value_of(gguf.GGUFReader(tmp_path / "out" / "model.gguf"), "tokenizer.ggml.model") == "none"


def test_other_tokenizers_are_left_out(tokenizer_configs: dict[str, TokenizerConfig]) -> None:
    config, _ = random_model()
    for name, tokenizer in tokenizer_configs.items():
        files = companions.written(tokenizer, config, layout="gguf")
        assert (llama_cpp.vocabulary(files["tokenizer.json"]) is not None) == (name == "byte-level"), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixer": Mamba1Config(expand=3)}, "only with an inner width of twice d_model: export another layout"),
        ({"mixer": Mamba1Config(use_bias=True)}, "only with no bias in projections"),
        ({"mixer": Mamba1Config(selection_norm_eps=1e-6)}, "only with one epsilon for all norms"),
        ({"mixer": Mamba2Config(head_dim=4, num_groups=2)}, "only with one group"),
        ({"mixer": Mamba2Config(head_dim=4, dt_lower_limit=0.1)}, "only with no limits of the step size"),
        ({"mixer": Hybrid.of_pattern("MFF", M=MAMBA2, F=MLP)}, "for Mamba-1 and Mamba-2 alone"),
    ],
)
def test_what_llama_cpp_does_not_compute(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    config = ModelConfig(vocab_size=31, d_model=8, num_layers=3, **changes)
    with pytest.raises(InputError, match=message):
        llama_cpp.save(tmp_path / "out", config, {})
    assert not (tmp_path / "out").exists()


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"pip install 'mamba-jax\[gguf\]'"):
        llama_cpp.save(tmp_path / "out", ModelConfig(vocab_size=31, d_model=8, num_layers=3), {})


_READ = """
import sys
import numpy, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf").eval()
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
ids = tokenizer(sys.argv[2], add_special_tokens=False, return_tensors="pt").input_ids
with torch.no_grad():
    numpy.savez(folder + "/answer.npz", ids=ids.numpy(), logits=model(ids).logits.float().numpy())
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_reader_of_such_files(
    tmp_path: Path, torch_python: str, tokenizer_configs: dict[str, TokenizerConfig], dtype: DType
) -> None:
    """`transformers` reads files of Mamba-1; llama.cpp itself is no Python package."""
    tokenizer = tokenizer_configs["byte-level"]
    vocab_size = companions.open_tokenizer(tokenizer).vocab_size
    mixer = Mamba1Config()
    config = ModelConfig(
        vocab_size=vocab_size, d_model=64, num_layers=5, mixer=mixer, param_dtype=dtype, compute_dtype="float32"
    )
    params = parameters.init(config, jax.random.key(0))
    files = companions.written(tokenizer, config, layout="gguf")
    llama_cpp.save(tmp_path / "out", config, params, companions={"tokenizer.json": files["tokenizer.json"]})
    text = "naïve Füße don't  walk"
    command = [torch_python, "-c", _READ, str(tmp_path / "out"), text]
    subprocess.run(command, env=environment(), check=True, capture_output=True)
    answer = np.load(tmp_path / "out" / "answer.npz")
    assert answer["ids"].tolist() == [companions.open_tokenizer(tokenizer).encode_batch([text])[0].tolist()]
    ours = parameters.define(config).merge(params)(jnp.asarray(answer["ids"])).logits
    # Both are float32: five layers of some twenty roundings of 6e-8 each.
    np.testing.assert_allclose(answer["logits"], ours, rtol=0, atol=1e-5 * np.abs(ours).max())
