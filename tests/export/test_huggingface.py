"""Published layouts: exact numbers against an independent implementation, exact round trips, one line per damage."""

import dataclasses
import json
import pickle
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mamba_jax.config import (
    Mamba1Config,
)
from mamba_jax.errors import InputError
from mamba_jax.export import huggingface
from mamba_jax.export import published_config as configs
from mamba_jax.generation.generate import generate
from mamba_jax.generation.sampling import SamplingConfig
from mamba_jax.models import parameters
from tests.export.conftest import random_model

GOLDEN = Path("tests/golden/mamba1_tiny")


# By how much more than in the first ones a relative change of 2^-24 in every weight moves logits and gradients.
# (Measured: of the largest logit 5e-7 in mamba2_tiny, 2e-6 in llama_tiny and bamba_tiny, 3.8e-5 in jamba_tiny, 2.5e-5
# in zamba2_tiny; in numbers, 9e-6 in mamba2_tiny and 1.9e-4 in jamba_tiny. Of a gradient's largest element 5e-6 in
# mamba2_tiny, 1.7e-4 in jamba_tiny, for a D of zamba2_tiny 2.8e-4.)
SENSITIVITY = {
    "mamba1_tiny": (1, 1),
    "mamba2_tiny": (1, 1),
    "llama_tiny": (2, 2),
    "bamba_tiny": (2, 2),
    "jamba_tiny": (20, 40),
    "zamba2_tiny": (10, 40),
    "nemotron_h_tiny": (2, 20),
    "recurrent_gemma_tiny": (2, 2),
}


@pytest.fixture(scope="module", params=SENSITIVITY)
def golden_folder(request: pytest.FixtureRequest) -> Path:
    """A small checkpoint with what an independent implementation makes of it."""
    return GOLDEN.parent / request.param


@pytest.fixture(scope="module")
def golden(golden_folder: Path):
    """Loss, logits and gradients of the golden checkpoint as this library computes them, and as expected."""
    loaded = huggingface.load(golden_folder)
    config = dataclasses.replace(loaded.config, compute_dtype="float32")
    definition = parameters.define(config)
    expected = load_file(golden_folder / "expected.safetensors")
    ids = jnp.asarray(expected["input_ids"], jnp.int32)

    def loss(params):
        logits = definition.merge(params)(ids).logits
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], axis=-1)
        return -jnp.mean(picked), logits

    (value, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(loaded.params)
    return config, value, logits, gradient, expected


def test_golden_loss_and_logits(golden, golden_folder: Path) -> None:
    _, value, logits, _, expected = golden
    np.testing.assert_allclose(value, np.ravel(expected["loss"])[0], rtol=1e-6 * SENSITIVITY[golden_folder.name][0])
    # Logits reach 20, where a float32 rounding is 1e-6: the absolute part alone is ten of them.
    bound = 1e-5 * SENSITIVITY[golden_folder.name][0]
    np.testing.assert_allclose(logits, expected["logits"], rtol=bound, atol=bound)


def test_golden_gradients(golden, golden_folder: Path, tmp_path: Path) -> None:
    bound = 5e-6 * SENSITIVITY[golden_folder.name][1]
    config, _, _, gradient, expected = golden
    huggingface.save(tmp_path / "gradient", config, gradient, layout="hf")
    tensors = load_file(tmp_path / "gradient" / "model.safetensors")
    assert {f"grad.{name}" for name in tensors} == {name for name in expected if name.startswith("grad.")}
    for name, tensor in tensors.items():
        reference = expected[f"grad.{name}"]
        # Both sides are float32: some twenty roundings of 6e-8 on the way through two layers and back.
        assert np.abs(tensor - reference).max() < bound * np.abs(reference).max(), name


def test_golden_greedy_continuation(golden, golden_folder: Path) -> None:
    config, _, _, _, expected = golden
    loaded = huggingface.load(golden_folder)
    sequence = expected["greedy_from_13"]
    tokens = generate(
        parameters.define(config),
        loaded.params,
        jnp.asarray(sequence[:, :13], jnp.int32),
        num_tokens=sequence.shape[1] - 13,
        key=jax.random.key(0),
        sampling=SamplingConfig(temperature=0.0),
    )
    np.testing.assert_array_equal(tokens, sequence[:, 13:])


def test_golden_is_written_back_byte_for_byte(golden_folder: Path, tmp_path: Path) -> None:
    loaded = huggingface.load(golden_folder)
    huggingface.save(tmp_path / "again", loaded.config, loaded.params, layout="hf", extra=loaded.extra)
    again, there = tmp_path / "again", golden_folder
    assert (again / "model.safetensors").read_bytes() == (there / "model.safetensors").read_bytes()
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (again, there))
    assert ours == theirs


@pytest.mark.parametrize("layout", ["hf", "original"])
@pytest.mark.parametrize(
    "changes", [{}, {"tie_embeddings": True}, {"mixer": Mamba1Config(use_conv_bias=False, expand=3)}], ids=str
)
def test_round_trip_is_exact(tmp_path, layout: str, changes) -> None:
    config, params = random_model(**changes)
    huggingface.save(tmp_path / "model", config, params, layout=layout)
    loaded = huggingface.load(tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    read, written = loaded.config.mixer, config.mixer
    assert isinstance(read, Mamba1Config)
    assert isinstance(written, Mamba1Config)
    assert read == dataclasses.replace(written, dt_rank=read.dt_rank)
    assert read.rank(config.d_model) == written.rank(config.d_model)
    assert loaded.config.padded_vocab_size == config.padded_vocab_size
    if layout == "original":
        assert loaded.config.vocab_size == config.vocab_size
        names = load_file(tmp_path / "model" / "model.safetensors").keys()
        assert {"backbone.embedding.weight", "lm_head.weight"} <= names


def test_falcon_mamba_round_trip(tmp_path) -> None:
    config, params = random_model(mixer=Mamba1Config(selection_norm_eps=1e-3))
    huggingface.save(tmp_path / "model", config, params, layout="hf")
    content = json.loads((tmp_path / "model" / "config.json").read_text())
    assert content["model_type"] == "falcon_mamba"
    loaded = huggingface.load(tmp_path / "model")
    assert isinstance(config.mixer, Mamba1Config)
    assert loaded.config.mixer == dataclasses.replace(config.mixer, dt_rank=1)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    with pytest.raises(InputError, match=r"model\.mixer\.selection_norm_eps=0\.001"):
        huggingface.save(tmp_path / "original", config, params, layout="original")


def test_sharded_and_bfloat16_files_are_read(tmp_path) -> None:
    config, params = random_model()
    half = jax.tree.map(lambda value: value.astype(jnp.bfloat16), params)
    huggingface.save(tmp_path / "model", config, half, layout="hf")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    names = sorted(tensors)
    files = {"a.safetensors": names[:7], "b.safetensors": names[7:]}
    for file, members in files.items():
        save_file({name: tensors[name] for name in members}, tmp_path / "model" / file)
    (tmp_path / "model" / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, members in files.items() for name in members}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = huggingface.load(tmp_path / "model")
    assert loaded.config.param_dtype == "bfloat16"
    jax.tree.map(np.testing.assert_array_equal, loaded.params, half)
    (tmp_path / "model" / "b.safetensors").unlink()
    with pytest.raises(InputError, match=r"b\.safetensors is missing although the index names it"):
        huggingface.load(tmp_path / "model")


def _edit_config(**changes):
    def edit(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return edit


def _edit_tensors(change):
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE = {
    "truncated": (_truncate, "model.safetensors is damaged"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds no model.safetensors"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no file"),
    "config is not JSON": (lambda folder: (folder / "config.json").write_text("{"), "is not JSON"),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), "expected a JSON object"),
    "config lacks a key": (_edit_config(hidden_size=None), "lacks the key 'hidden_size'"),
    "other model": (_edit_config(model_type="gpt2"), "model_type='gpt2' is not supported"),
    "other activation": (_edit_config(hidden_act="gelu"), "hidden_act='gelu' is not supported"),
    "odd width": (_edit_config(intermediate_size=65), "intermediate_size=65 is not supported"),
    "text for a number": (_edit_config(hidden_size="32"), "d_model: Input should be a valid integer, got '32'"),
    "no layers": (_edit_config(num_hidden_layers=0), "num_layers must be positive"),
    "more layers": (_edit_config(num_hidden_layers=3), "missing backbone.layers.2.norm.weight"),
    "fewer layers": (_edit_config(num_hidden_layers=1), "unexpected backbone.layers.1.mixer.A_log"),
    "missing tensor": (_edit_tensors(lambda t: t.pop("backbone.norm_f.weight")), "missing backbone.norm_f.weight"),
    "extra tensor": (_edit_tensors(lambda t: t.update(extra=np.zeros(3, np.float32))), "unexpected extra"),
    "wrong shape": (
        _edit_tensors(lambda t: t.update({"backbone.norm_f.weight": np.zeros(3, np.float32)})),
        "backbone.norm_f.weight has shape (3,), expected (32,)",
    ),
    "integers": (
        _edit_tensors(lambda t: t.update({"backbone.norm_f.weight": np.ones(32, np.int32)})),
        "backbone.norm_f.weight has dtype int32, expected float32",
    ),
    "index of nothing": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
        "has no 'weight_map'",
    ),
    "index that leaves the folder": (
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../x"}}'),
        "has no 'weight_map'",
    ),
    "untied head": (
        _edit_tensors(lambda t: t.update({"lm_head.weight": np.zeros((96, 32), np.float32)})),
        "lm_head.weight differs from the embedding",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_gets_one_line_that_names_it(tmp_path, kind: str) -> None:
    damage, expected = DAMAGE[kind]
    shutil.copytree(GOLDEN, tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(InputError) as raised:
        huggingface.load(tmp_path / "model")
    assert expected in str(raised.value)
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_all_missing_tensors_are_named(tmp_path) -> None:
    shutil.copytree(GOLDEN, tmp_path / "model")
    _edit_tensors(lambda t: [t.pop(name) for name in list(t) if ".D" in name])(tmp_path / "model")
    with pytest.raises(
        InputError, match=r"missing backbone\.layers\.0\.mixer\.D; missing backbone\.layers\.1\.mixer\.D"
    ):
        huggingface.load(tmp_path / "model")


@pytest.mark.parametrize(
    "mixer", [{"use_gate": False}, {"use_conv": False}, {"selective": ("dt",)}, {"discretization": "zoh"}], ids=str
)
@pytest.mark.parametrize("layout", ["hf", "original"])
def test_models_the_layouts_cannot_express_are_refused(tmp_path, mixer, layout: str) -> None:
    config, params = random_model(mixer=Mamba1Config(**mixer))
    with pytest.raises(InputError, match=f"model.mixer.{next(iter(mixer))}="):
        huggingface.save(tmp_path / "model", config, params, layout=layout)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("change", [{"logit_cap": 30.0}, {"embedding_scale": 2.0}, {"norm_offset": 1.0}], ids=str)
@pytest.mark.parametrize("layout", ["hf", "original"])
def test_scales_of_other_families_are_refused(change, layout: str) -> None:
    config, _ = random_model()
    (name,) = change
    with pytest.raises(InputError, match=f"cannot express model.{name}={change[name]}"):
        configs.to_json(dataclasses.replace(config, **change), layout=layout, extra={})


def test_nothing_is_overwritten(tmp_path) -> None:
    loaded = huggingface.load(GOLDEN)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not an empty folder"):
        huggingface.save(tmp_path / "out", loaded.config, loaded.params, layout="hf")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_original_config_refuses_what_is_unknown(tmp_path) -> None:
    loaded = huggingface.load(GOLDEN)
    content = configs.to_json(loaded.config, layout="original", extra={})
    for change, expected in (
        ({"ssm_cfg": {"layer": "Mamba3"}}, "ssm_cfg.layer='Mamba3'"),
        ({"ssm_cfg": {"headdim": 64}}, "ssm_cfg keys headdim"),
        ({"ssm_cfg": "Mamba1"}, "ssm_cfg='Mamba1' is not a JSON object"),
        ({"rms_norm": False}, "rms_norm=False"),
    ):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(content | change))
        with pytest.raises(InputError, match=expected):
            configs.read(path)


def test_mixed_precision_is_widened(tmp_path) -> None:
    config, params = random_model()
    params["norm_f"]["scale"] = params["norm_f"]["scale"].astype(np.float16)
    huggingface.save(tmp_path / "model", config, params, layout="hf")
    loaded = huggingface.load(tmp_path / "model")
    assert loaded.config.param_dtype == "float32"
    assert loaded.params["norm_f"]["scale"].dtype == np.float32


class FakeTensor:
    """As much of a torch tensor as the import uses."""

    def __init__(self, value: np.ndarray) -> None:
        self.value = value

    def float(self) -> Self:
        return self

    def numpy(self) -> np.ndarray:
        return self.value


def test_pytorch_files_are_read_through_torch_alone(tmp_path, monkeypatch) -> None:
    config, params = random_model()
    folder = tmp_path / "model"
    huggingface.save(folder, config, params, layout="original")
    state: dict[str, Any] = {name: FakeTensor(value) for name, value in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match="needs PyTorch"):
        huggingface.load(folder)

    def load(path: Path, *, map_location: str, weights_only: bool):
        assert weights_only, "anything else runs code out of the file"
        return state

    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(load=load))
    jax.tree.map(np.testing.assert_array_equal, huggingface.load(folder).params, params)
    state["backbone.norm_f.weight"] = "no tensor"
    with pytest.raises(InputError, match=r"pytorch_model\.bin is damaged"):
        huggingface.load(folder)

    def refuse(path: Path, *, map_location: str, weights_only: bool) -> None:
        raise pickle.UnpicklingError("Weights only load failed: set `weights_only` to `False`")

    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(load=refuse))
    with pytest.raises(InputError, match=r"asks for something else than tensors, which is not done: fetch it again"):
        huggingface.load(folder)


@pytest.mark.parametrize("layout", ["hf", "original"])
def test_finished_weights_are_not_scaled_again(tmp_path, layout: str) -> None:
    """`transformers` divides what it has loaded where the option is true; other fields only draw random weights."""
    config, params = random_model(rescale_residual=True)
    huggingface.save(tmp_path / "model", config, params, layout=layout)
    content = json.loads((tmp_path / "model" / "config.json").read_text())
    assert content.get("rescale_prenorm_residual", False) is False
    if layout == "hf":
        (tmp_path / "model" / "config.json").write_text(json.dumps(content | {"rescale_prenorm_residual": True}))
    loaded = huggingface.load(tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    huggingface.save(tmp_path / "again", loaded.config, loaded.params, layout="hf", extra=loaded.extra)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["rescale_prenorm_residual"] is False


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_folder_computes_in_the_dtype_of_its_weights(tmp_path, dtype: str) -> None:
    config, params = random_model()
    huggingface.save(tmp_path / "model", config, jax.tree.map(lambda leaf: leaf.astype(dtype), params), layout="hf")
    loaded = huggingface.load(tmp_path / "model")
    assert (loaded.config.param_dtype, loaded.config.compute_dtype) == (dtype, dtype)
