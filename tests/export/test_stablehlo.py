"""Programs for any platform are the model, also where this library is not."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax._src.export import serialization

from mamba_jax.config import Hybrid, Mamba1Config, Mamba2Config, ModelConfig, TokenizerConfig
from mamba_jax.errors import InputError
from mamba_jax.export import __main__ as command
from mamba_jax.export import companions, huggingface
from mamba_jax.export.stablehlo import folder as stablehlo
from mamba_jax.export.stablehlo.programs import PART_LENGTH
from mamba_jax.export.stablehlo.run import Model
from mamba_jax.generation.generate import generate
from mamba_jax.generation.sampling import SamplingConfig
from mamba_jax.models import parameters
from mamba_jax.models.mixers import AttentionConfig, MlpConfig, MoeConfig, RGLRUConfig
from pallas_kernels.common.ahead_of_time import compile_for, tpu_devices
from tests.export.conftest import random_model

PROMPTS = ["My fellow citizens", "The"]
ATTENTION = AttentionConfig(num_heads=2)
MODELS: dict[str, dict[str, Any]] = {
    "mamba": {"mixer": Mamba1Config()},
    "mamba in bfloat16": {"mixer": Mamba1Config(), "compute_dtype": "bfloat16"},
    "mamba2": {"mixer": Mamba2Config(head_dim=8, state_dim=16)},
    "mamba2 from a learned state": {"mixer": Mamba2Config(head_dim=8, state_dim=16, learn_initial_state=True)},
    "recurrent": {"mixer": Hybrid.of_pattern("RF", R=RGLRUConfig(num_heads=2), F=MlpConfig())},
    "experts": {"mixer": Hybrid.of_pattern("ME", M=Mamba1Config(), E=MoeConfig(num_experts=4))},
    "window": {"mixer": Hybrid.of_pattern("MA", M=Mamba1Config(), A=dataclasses.replace(ATTENTION, window=20))},
    "attention": {"mixer": Hybrid.of_pattern("MA", M=Mamba2Config(head_dim=8), A=ATTENTION)},
}


def run_export(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["export", *arguments])
    command.main()


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of bytes in the hf layout, which has ids that no token has."""
    path = tmp_path_factory.mktemp("stablehlo") / "hf"
    config, params = random_model(vocab_size=257, embedding_std=1.0)
    tokenizer = TokenizerConfig()
    files = companions.written(tokenizer, config, layout="hf")
    huggingface.save(path, config, params, layout="hf", extra=companions.special_tokens(tokenizer), companions=files)
    return path


@pytest.fixture(scope="module")
def folder(published: Path) -> Path:
    """Its programs, exported by the command line."""
    with pytest.MonkeyPatch.context() as patch:
        run_export(patch, str(published), str(published.with_name("out")), "--layout", "stablehlo")
    return published.with_name("out")


def test_a_process_without_the_library_writes_the_same_text(published: Path, folder: Path) -> None:
    code = f"""
import json, sys
sys.modules.update(dict.fromkeys(["mamba_jax", "pallas_kernels", "flax", "jaxtyping"]))
sys.path[:0] = [{str(folder)!r}]
import run
print(json.dumps(run.Model({str(folder)!r}).greedy({[list(text.encode()) for text in PROMPTS]}, 16)))
sys.argv = ["run.py", {PROMPTS[0]!r}, "--num-tokens", "16"]
run.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=folder)
    tokens, text = done.stdout.split(b"\n", 1)
    loaded = huggingface.load(published)
    lengths = np.asarray([len(text) for text in PROMPTS])
    rows = np.stack([np.frombuffer(text.ljust(lengths.max()).encode(), np.uint8) for text in PROMPTS])
    ours = generate(
        parameters.define(loaded.config),
        loaded.params,
        jnp.asarray(rows, jnp.int32),
        lengths=lengths,
        num_tokens=16,
        key=jax.random.key(0),
        sampling=SamplingConfig(temperature=0.0),
        allowed=np.arange(264) < 257,
    )
    assert json.loads(tokens) == ours.tolist()
    first = ours[0].tolist()
    ended = first.index(256) if 256 in first else len(first)
    assert text == bytes(first[:ended]).decode(errors="replace").encode() + b"\n"


def test_what_is_in_the_folder(folder: Path) -> None:
    about = json.loads((folder / "stablehlo.json").read_text())
    assert (about["vocab_size"], about["end_of_document"], about["max_length"]) == (257, 256, None)
    names = {path.name for path in folder.iterdir()}
    files = {program["file"] for program in about["programs"].values()}
    assert names == files | {
        "stablehlo.json", "run.py", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "generation_config.json",
    }  # fmt: skip
    stored = huggingface.open_weights(folder)
    for program in about["programs"].values():
        loaded = export.deserialize(bytearray((folder / program["file"]).read_bytes()))
        assert loaded.platforms == ("cpu", "cuda", "tpu")
        # Those that JAX keeps working for whoever reads old artefacts, and no kernel of ours.
        calls = set(re.findall(r"custom_call @([\w.$]+)", loaded.mlir_module()))
        assert calls <= {"shape_assertion", "stablehlo.dynamic_reduce_window"}
        weights = program["inputs"]["weights"]
        assert {name: (tuple(array["shape"]), array["dtype"]) for name, array in weights.items()} == {
            name: (tensor.shape, tensor.dtype) for name, tensor in stored.items()
        }
    step = about["programs"]["decode_step"]
    assert step["inputs"]["state"] == step["outputs"]["state"] == about["programs"]["prefill"]["outputs"]["state"]
    assert step["inputs"]["state"]["layers.2.ssm"] == {"shape": ["b", 16, 3], "dtype": "float32"}


def test_a_damaged_program_is_refused(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    program = tmp_path / "decode_step.jax_export"
    program.write_bytes(program.read_bytes()[:-1] + b"\1")
    with pytest.raises(ValueError, match=r"decode_step.jax_export is damaged: export it again"):
        Model(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--layout", "hf", "--max-length", "9"), "--max-length is of the layout 'stablehlo', not of 'hf'"),
        (("--layout", "stablehlo", "--max-length", "0"), "max_length is 0: give the most tokens of a row"),
    ],
)
def test_bad_input(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_export(monkeypatch, str(published), str(tmp_path / "out"), *arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_room_for_attention(tmp_path: Path) -> None:
    config, params = random_model(num_layers=2, **MODELS["attention"])
    with pytest.raises(InputError, match="its state needs room for every token: give the most tokens of a row"):
        stablehlo.save(tmp_path / "out", config, params)
    assert not (tmp_path / "out").exists()


def test_without_flatbuffers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError

    monkeypatch.setattr(serialization, "serialize", missing)
    with pytest.raises(InputError, match=r"pip install 'mamba-jax\[stablehlo\]'"):
        stablehlo.save(tmp_path / "out", *random_model())
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_programs_are_the_model(name: str, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"vocab_size": 61, "d_model": 16, "num_layers": 2, "compute_dtype": "float32"}
    config = ModelConfig(**fields | MODELS[name])
    definition, params = parameters.define(config), parameters.init(config, jax.random.key(0))
    most = 2 * PART_LENGTH + 30
    stablehlo.save(tmp_path / "out", config, params, max_length=most if name == "attention" else None)
    model = Model(tmp_path / "out")
    whole = jax.jit(lambda params, tokens: definition.merge(params)(tokens).logits)
    # Of float32 sums in another order over at most 286 tokens; bfloat16 rounds each activation to 2^-9 of itself.
    tolerance = 5e-2 if config.compute_dtype == "bfloat16" else 1e-5
    for batch, length in ((1, 1), (2, 13), (3, most)):
        tokens = np.random.default_rng(0).integers(0, 61, (batch, length), np.int32)
        expected = whole(params, tokens)[..., :61]
        np.testing.assert_allclose(model.forward(model.weights, tokens), expected, rtol=0, atol=tolerance)
        # Rows of different lengths, and the rest of each token by token.
        lengths = np.asarray([max(1, length - 2 * row) for row in range(batch)], np.int32)
        logits, state = model.prefill(model.weights, tokens, lengths)
        for row, last in enumerate(lengths):
            np.testing.assert_allclose(logits[row], expected[row, last - 1], rtol=0, atol=tolerance)
        logits, state = model.prefill(model.weights, tokens, lengths - (lengths > 2) * 2)
        for back in (1, 0) if lengths.min() > 2 else ():
            taken = tokens[np.arange(batch), lengths - 1 - back]
            logits, state = model.decode_step(model.weights, taken, state)
            for row, last in enumerate(lengths):
                np.testing.assert_allclose(logits[row], expected[row, last - 1 - back], rtol=0, atol=tolerance)


@pytest.mark.slow
def test_named_backends_are_left_out(tmp_path: Path) -> None:
    config, params = random_model(mixer=Mamba1Config(scan_implementation="pallas_tpu", step_implementation="triton"))
    stablehlo.save(tmp_path / "out", config, params)
    program = export.deserialize(bytearray((tmp_path / "out" / "prefill.jax_export").read_bytes()))
    assert "tpu_custom_call" not in program.mlir_module()


@pytest.mark.slow
def test_programs_compile_for_a_tpu(folder: Path) -> None:
    """No TPU is there; those lowered on this machine are what its compiler takes."""
    device = tpu_devices("v5e:2x2")[0]
    about = json.loads((folder / "stablehlo.json").read_text())["programs"]["decode_step"]
    weights, tokens, state = (
        jax.tree.map(
            lambda given: jax.ShapeDtypeStruct([2 if size == "b" else size for size in given["shape"]], given["dtype"]),
            about["inputs"][name],
            is_leaf=lambda node: "shape" in node,
        )
        for name in ("weights", "tokens", "state")
    )
    step = export.deserialize(bytearray((folder / about["file"]).read_bytes()))
    text = compile_for(device, step.call, weights, tokens, state).as_text()
    assert text is not None
    assert "tpu_custom_call" not in text


@pytest.mark.slow
def test_rows_on_several_devices(folder: Path) -> None:
    model = Model(folder)
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    tokens, lengths = np.random.default_rng(0).integers(0, 257, (4, 21), np.int32), np.full(4, 21, np.int32)
    alone, _ = model.prefill(model.weights, tokens, lengths)
    split = jax.NamedSharding(mesh, jax.P("rows"))
    weights = jax.device_put(model.weights, jax.NamedSharding(mesh, jax.P()))
    logits, state = model.prefill(weights, *jax.device_put((tokens, lengths), split))
    assert logits.sharding == state["layers.0.ssm"].sharding == split
    # Of float32 sums in another order.
    np.testing.assert_allclose(np.asarray(logits), np.asarray(alone), rtol=0, atol=1e-5)
