"""A config takes its model from what it begins with, and its vocabulary may be larger than that was."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
import tokenizers

from mamba_jax.checkpoint import load_params
from mamba_jax.config import FROM_CHECKPOINT, ExperimentConfig, TokenizerConfig, to_json
from mamba_jax.config_files import load_config
from mamba_jax.data.tokenizer import make_tokenizer
from mamba_jax.errors import InputError
from mamba_jax.export.initial import model_for
from mamba_jax.run import loop

MakeConfig = Callable[..., ExperimentConfig]

pytestmark = pytest.mark.usefixtures("shared_step")


def train(config: ExperimentConfig, **options: Any) -> loop.TrainResult:
    return loop.train(config, devices=jax.devices()[:1], **options)


@pytest.fixture(scope="module")
def base(make_config: MakeConfig) -> ExperimentConfig:
    config = make_config(num_steps=2, norm_eps=1e-4)
    train(config)
    return config


@pytest.fixture
def config_file(base: ExperimentConfig, tmp_path: Path) -> Callable[..., str]:
    """Writes a config file that begins with a run and has another model, or that run's."""

    def write(model: str, **fields: Any) -> str:
        run = dataclasses.replace(base.train, run_dir=str(tmp_path / "run"), **fields)
        given = to_json(dataclasses.replace(base, train=run))
        path = tmp_path / "config.py"
        path.write_text(
            "import dataclasses\nfrom mamba_jax.config import *\n"
            f"config = from_json(ExperimentConfig, {given!r}, origin='inline')\n"
            f"def get_config():\n    return dataclasses.replace(config, model={model})\n"
        )
        return str(path)

    return write


def test_the_model_is_that_of_the_weights(base: ExperimentConfig, config_file: Callable[..., str]) -> None:
    source = base.train.run_dir
    path = config_file("FROM_CHECKPOINT")
    for flags in (["--train.init-from", source], [f"--train.init_from={source}@2"]):
        found = load_config(path, [*flags, "--model.remat", "block"], model_for=model_for)
        assert found.model == dataclasses.replace(base.model, remat="block")
    small = config_file("ModelConfig(vocab_size=300, d_model=8, num_layers=1)", init_from=source)
    assert load_config(small, [], model_for=model_for).model.d_model == 8
    assert load_config(small, ["--model", "from_checkpoint"], model_for=model_for).model == base.model
    assert load_config(small, ["--model=from_checkpoint"], model_for=model_for).model == base.model


def test_a_run_records_the_model_and_needs_its_source_no_more(
    base: ExperimentConfig, config_file: Callable[..., str], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(base.train.run_dir, source)
    path = config_file("'from_checkpoint'", init_from=str(source))
    config = load_config(path, [], model_for=model_for)
    assert train(config).is_complete
    recorded = json.loads((Path(config.train.run_dir) / "config.json").read_text())["model"]
    assert recorded == json.loads(to_json(base.model))
    shutil.rmtree(source)
    again = load_config(path, ["--train.num-steps", "2"], model_for=model_for)
    assert again == config
    assert train(again).is_complete
    # A config made in Python has the same.
    made = dataclasses.replace(
        config,
        model=FROM_CHECKPOINT,
        train=dataclasses.replace(config.train, run_dir=str(tmp_path / "made"), init_from=base.train.run_dir),
    )
    assert train(made).is_complete
    assert load_params(tmp_path / "made").config.model == base.model


def test_what_changes_shapes_is_refused_in_one_line(base: ExperimentConfig, config_file: Callable[..., str]) -> None:
    path = config_file("FROM_CHECKPOINT", init_from=base.train.run_dir)
    for flags, message in (
        (["--model.d-model", "32"], "holds another model, 2 layers of width 16: model.d_model was 16, here 32; "),
        (["--model.mixer.state-dim", "8"], "model.mixer.state_dim was 4, here 8"),
        (["--model.vocab-size", "300"], "model.vocab_size was 257, here 300"),
    ):
        with pytest.raises(InputError) as error:
            train(load_config(path, flags, model_for=model_for))
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    nothing = config_file("FROM_CHECKPOINT")
    with pytest.raises(
        InputError, match=r"^model='from_checkpoint' is the model of train.init_from: give --train.init"
    ):
        load_config(nothing, [], model_for=model_for)
    with pytest.raises(InputError, match=r"^--model large is no model: give from_checkpoint, or fields such as"):
        load_config(nothing, ["--model", "large"], model_for=model_for)
    with pytest.raises(InputError, match=r"no training run, and no folder with config\.json and weights"):
        load_config(nothing, ["--train.init-from", "nowhere"], model_for=model_for)


def test_a_run_with_more_tokens(base: ExperimentConfig, make_config: MakeConfig, tmp_path: Path) -> None:
    own = tokenizers.Tokenizer.from_str(make_tokenizer(TokenizerConfig()).to_json())
    own.add_tokens([f"<{number}>" for number in range(20)])
    own.save(str(tmp_path / "more.json"))
    tokenizer = TokenizerConfig(kind="hf_json", path=str(tmp_path / "more.json"), end_of_document="<|endoftext|>")
    fields = {"tokenizer": tokenizer, "init_from": base.train.run_dir, "num_steps": 2, "norm_eps": 1e-4}
    config = make_config(**fields, vocab_size=277)
    assert train(config).is_complete
    assert load_params(config.train.run_dir).params["embedding"]["table"].shape == (280, 16)
    lineage = json.loads((Path(config.train.run_dir) / "run.json").read_text())["lineage"]
    assert lineage["changes"][0] == "20 tokens were added, whose rows are the mean of the others"
    for changes, message in (
        ({"vocab_size": 257}, "model.vocab_size is 257 but the tokenizer has 277 ids: set model.vocab_size to 277"),
        ({"vocab_size": 277, "init_optimizer": True}, "has no moments for the 20 tokens that data.tokenizer adds"),
    ):
        with pytest.raises(InputError, match=message):
            train(make_config(**fields, **changes))
    with pytest.raises(InputError, match=r"277 ids, end of document 256\), here bytes \(257 ids.*gives other ids"):
        train(make_config(init_from=config.train.run_dir, num_steps=2, norm_eps=1e-4, vocab_size=277))
