"""A run starts from weights of its own model, whatever shapes may hide, or names every field that differs."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers

from mamba_jax.config import (
    DataConfig,
    ExperimentConfig,
    Mamba1Config,
    ModelConfig,
    OptimizerConfig,
    TextFolderSource,
    TokenizerConfig,
    TrainConfig,
)
from mamba_jax.data.tokenizer import make_tokenizer
from mamba_jax.errors import InputError
from mamba_jax.export import companions, huggingface
from mamba_jax.export.initial import initial_weights, model_of
from mamba_jax.models import parameters

MODEL = ModelConfig(vocab_size=257, d_model=16, num_layers=1, mixer=Mamba1Config(state_dim=2))


@pytest.fixture(scope="module")
def params() -> parameters.Params:
    return jax.device_get(jax.jit(parameters.init, static_argnums=0)(MODEL, jax.random.key(0)))


@pytest.fixture(scope="module", params=["hf", "original"])
def weights(
    request: pytest.FixtureRequest, params: parameters.Params, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("initial") / request.param
    huggingface.save(folder, MODEL, params, layout=request.param)
    return folder


def experiment(
    folder: Path, tokenizer: TokenizerConfig | None = None, *, model: ModelConfig = MODEL, **changes: Any
) -> ExperimentConfig:
    return ExperimentConfig(
        name="test",
        model=dataclasses.replace(model, **changes),
        data=DataConfig(
            train=TextFolderSource(path="text"), seq_len=8, global_batch=1, tokenizer=tokenizer or TokenizerConfig()
        ),
        optimizer=OptimizerConfig(peak_lr=1e-3),
        train=TrainConfig(num_steps=1, run_dir="run", init_from=str(folder)),
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"embedding_std": 1.0, "rescale_residual": False, "compute_dtype": "float16", "remat": "none"},
        {"mixer": Mamba1Config(state_dim=2, dt_rank=1, dt_init="constant", dt_max=1.0, a_init="random")},
        {"vocab_multiple": 24},
    ],
    ids=str,
)
def test_what_no_weight_depends_on_may_differ(
    weights: Path, params: parameters.Params, changes: dict[str, Any]
) -> None:
    found = initial_weights(experiment(weights, **changes))
    assert found is not None
    jax.tree.map(np.testing.assert_array_equal, found.params, params)


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"norm_eps": 1e-2}, ["model.norm_eps was 1e-05, here 0.01"]),
        ({"tie_embeddings": False}, ["model.tie_embeddings was True, here False"]),
        (
            {"mixer": Mamba1Config(state_dim=2, discretization="zoh", selective=("dt",))},
            ["model.mixer.discretization was 'euler', here 'zoh'", "model.mixer.selective was ('dt', 'B', 'C'), here"],
        ),
        (
            {"mixer": Mamba1Config(state_dim=3, expand=1, dt_rank=4)},
            ["mixer.state_dim was 2, here 3", "mixer.expand was 2, here 1", "mixer.dt_rank was 1, here 4"],
        ),
        ({"vocab_multiple": 16}, ["model.vocab_multiple was", "here 16", "model.padded_vocab_size was 264, here 272"]),
        ({"d_model": 32, "num_layers": 2}, ["model.d_model was 16, here 32", "model.num_layers was 1, here 2"]),
    ],
    ids=str,
)
def test_every_difference_is_named(weights: Path, changes: dict[str, Any], messages: list[str]) -> None:
    with pytest.raises(InputError, match=r"holds another model, 1 layers of width 16") as error:
        initial_weights(experiment(weights, **changes))
    for message in messages:
        assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_only_the_original_layout_tells_how_many_rows_are_tokens(weights: Path) -> None:
    config = experiment(weights, vocab_size=260)
    if weights.name == "hf":
        assert initial_weights(config) is not None
    else:
        with pytest.raises(InputError, match=r"model\.vocab_size was 257, here 260"):
            initial_weights(config)


def test_epsilon_of_the_original_layout_is_read(params: parameters.Params, tmp_path: Path) -> None:
    huggingface.save(tmp_path / "weights", MODEL, params, layout="original")
    content = json.loads((tmp_path / "weights" / "config.json").read_text())
    (tmp_path / "weights" / "config.json").write_text(json.dumps(content | {"norm_epsilon": 1e-6}))
    with pytest.raises(InputError, match=r"model\.norm_eps was 1e-06, here 1e-05"):
        initial_weights(experiment(tmp_path / "weights"))
    assert initial_weights(experiment(tmp_path / "weights", norm_eps=1e-6)) is not None


@pytest.mark.parametrize("layout", ["hf", "original"])
def test_tokenizer_in_the_folder(
    tokenizer_configs: dict[str, TokenizerConfig], params: parameters.Params, tmp_path: Path, layout: str
) -> None:
    """Compared by what it does to text, so the export of a run agrees with the run that wrote it."""
    for kind in ("bytes", "wordpiece"):
        config = tokenizer_configs[kind]
        files = companions.written(config, MODEL, layout=layout)
        huggingface.save(tmp_path / kind, MODEL, params, layout=layout, companions=files)
        assert initial_weights(experiment(tmp_path / kind, config)) is not None
    with pytest.raises(
        InputError, match=r"data\.tokenizer was .*tokenizer\.json \(72 ids, end of document 2\), here by"
    ):
        initial_weights(experiment(tmp_path / "wordpiece"))
    other = dataclasses.replace(tokenizer_configs["wordpiece"], end_of_document="[CLS]")
    with pytest.raises(InputError, match=r"end of document 2\), here .*end of document 1\), which gives other ids"):
        initial_weights(experiment(tmp_path / "wordpiece", other))


def test_only_a_training_run_has_steps_and_an_average(weights: Path) -> None:
    with pytest.raises(InputError, match="is not a training run, so it has no step 7: leave that out"):
        initial_weights(experiment(Path(f"{weights}@7")))
    config = experiment(weights)
    averaged = dataclasses.replace(config, train=dataclasses.replace(config.train, init_weights="average"))
    with pytest.raises(InputError, match=r"has no average of the weights \(train\.init_weights\)"):
        initial_weights(averaged)
    none = dataclasses.replace(config, train=dataclasses.replace(config.train, init_from=None))
    assert initial_weights(none) is None


def test_model_of_a_folder_takes_its_weights(weights: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(experiment(weights), model=model_of(str(weights)))
    assert initial_weights(config) is not None
    for source in (f"{weights}@3", str(tmp_path / "nowhere")):
        with pytest.raises(InputError, match="is no training run, and no folder with config"):
            model_of(source)


def added_to(path: Path, config: TokenizerConfig, *tokens: str) -> TokenizerConfig:
    """A tokenizer with further tokens behind its own."""
    tokenizer = tokenizers.Tokenizer.from_str(make_tokenizer(config).to_json())
    tokenizer.add_tokens(list(tokens))
    tokenizer.save(str(path))
    return TokenizerConfig(kind="hf_json", path=str(path), end_of_document="<|endoftext|>")


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("layout", ["hf", "original"])
def test_a_tokenizer_with_more_tokens_grows_the_tables(tmp_path: Path, layout: str, is_tied: bool) -> None:
    model = dataclasses.replace(MODEL, tie_embeddings=is_tied)
    params = jax.device_get(jax.jit(parameters.init, static_argnums=0)(model, jax.random.key(0)))
    files = companions.written(TokenizerConfig(), model, layout=layout)
    huggingface.save(tmp_path / "weights", model, params, layout=layout, companions=files)
    grown = added_to(tmp_path / "grown.json", TokenizerConfig(), "<user>", "<bot>", *map(str, range(100, 108)))
    sizes: dict[str, Any] = {"vocab_size": 267, "vocab_multiple": 16, "tie_embeddings": is_tied}
    found = initial_weights(experiment(tmp_path / "weights", grown, **sizes))
    assert found is not None
    assert found.added == 10
    for name in ("embedding",) if is_tied else ("embedding", "lm_head"):
        before, after = (np.asarray(tree[name]["table"]) for tree in (params, found.params))
        assert after.shape == (272, 16)
        np.testing.assert_array_equal(after[:257], before[:257])
        # The mean of 257 values below 1 in float32.
        np.testing.assert_allclose(after[257:], np.tile(before[:257].mean(0, dtype=np.float64), (15, 1)), atol=1e-7)
    rest = {name: value for name, value in params.items() if name not in ("embedding", "lm_head")}
    jax.tree.map(np.testing.assert_array_equal, {name: found.params[name] for name in rest}, rest)


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    params = jax.device_get(jax.jit(parameters.init, static_argnums=0)(MODEL, jax.random.key(0)))
    grown = added_to(tmp_path / "grown.json", TokenizerConfig(), "<user>", "<bot>")
    other = added_to(tmp_path / "other.json", TokenizerConfig(), "<user>", "<robot>", "<third>")
    files = companions.written(grown, MODEL, layout="original")
    huggingface.save(
        tmp_path / "weights", dataclasses.replace(MODEL, vocab_size=259), params, layout="original", companions=files
    )
    for tokenizer, message in (
        (TokenizerConfig(), "here bytes (257 ids, end of document 256), which gives other ids"),
        (other, "other.json (260 ids, end of document 256), which gives other ids"),
    ):
        with pytest.raises(InputError) as error:
            initial_weights(experiment(tmp_path / "weights", tokenizer, vocab_size=260))
        assert "holds another model" in str(error.value)
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    # What is added does not excuse what else differs.
    more = added_to(tmp_path / "more.json", grown, "<third>")
    assert initial_weights(experiment(tmp_path / "weights", more, vocab_size=260)) is not None
    with pytest.raises(InputError, match=r"model\.norm_eps was 1e-05, here 0\.1"):
        initial_weights(experiment(tmp_path / "weights", more, vocab_size=260, norm_eps=0.1))
