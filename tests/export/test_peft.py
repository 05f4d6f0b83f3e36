"""Adapters in PEFT's files mean what they mean here, in every published layout, and anything else is refused."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

from mamba_jax.config import LoraConfig
from mamba_jax.errors import InputError
from mamba_jax.export import huggingface, peft
from mamba_jax.export.initial import initial_weights, model_of
from mamba_jax.export.load import LoadedCheckpoint, load_model
from mamba_jax.models.parameters import Params, define
from mamba_jax.models.storage.low_rank import adapted, merged, with_new_adapters
from mamba_jax.models.storage.matrix import LowRank
from tests.export.test_initial import experiment

GOLDEN = Path(__file__).parents[1] / "golden"
LORA = LoraConfig(rank=5, alpha=3.0)
MODELS = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))
# Differences of weights of order 0.1, in float32, over sums of at most 15 products: a few roundings.
SAME = {"rtol": 1e-4, "atol": 1e-6}


def adapters(model: LoadedCheckpoint, lora: LoraConfig = LORA) -> Params:
    """The parameters with adapters after some training."""
    definition = adapted(define(model.config), lora)
    fresh = with_new_adapters(definition, model.params, lora, jax.random.key(0))
    rng = np.random.default_rng(0)

    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, LowRank):
            return leaf
        return dataclasses.replace(leaf, lora_b=0.1 * jnp.asarray(rng.standard_normal(leaf.lora_b.shape, np.float32)))

    return jax.tree.map(moved, fresh, is_leaf=lambda leaf: isinstance(leaf, LowRank))


def save(folder: Path, model: LoadedCheckpoint, base: Path, lora: LoraConfig = LORA) -> Params:
    stored = adapters(model, lora)
    peft.save(folder, model.config, stored, lora=lora, base=str(base), companions={})
    return stored


@pytest.mark.parametrize("name", MODELS)
def test_modules_have_the_change_of_the_tensors_and_come_back(name: str, tmp_path: Path) -> None:
    model = load_model(GOLDEN / name)
    lora = dataclasses.replace(LORA, targets=("^layers.*(in|BC|dt|out)_proj|linear",) * (name == "zamba2_tiny"))
    stored = save(tmp_path / "adapter", model, GOLDEN / name, lora)
    whole, before = (
        huggingface.tensors_of(model.config, params, layout="hf") for params in (merged(stored), model.params)
    )
    content = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    tensors = safetensors.numpy.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    changed = {name for name in whole if not np.array_equal(whole[name], before[name])}
    assert {f"base_model.model.{name.removesuffix('.weight')}" for name in changed} == {
        name.partition(".lora_")[0] for name in tensors
    }
    for changed_name in sorted(changed):
        module = changed_name.removesuffix(".weight")
        inside = module.partition(".")[2]
        lora_a, lora_b = (tensors[f"base_model.model.{module}.lora_{letter}.weight"] for letter in "AB")
        rank = content["rank_pattern"].get(inside, content["r"])
        assert (lora_a.shape[0], lora_b.shape[1]) == (rank, rank)
        scale = content["alpha_pattern"].get(inside, content["lora_alpha"]) / rank
        np.testing.assert_allclose(scale * lora_b @ lora_a, whole[changed_name] - before[changed_name], **SAME)
    found = load_model(tmp_path / "adapter")
    assert found.config == model.config
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, **SAME), found.params, merged(stored))
    assert model_of(str(tmp_path / "adapter")) == model_of(str(GOLDEN / name))
    weights = initial_weights(experiment(tmp_path / "adapter", model=model_of(str(GOLDEN / name))))
    assert weights is not None
    jax.tree.map(np.testing.assert_array_equal, weights.params, found.params)


def test_one_a_of_a_joined_module_comes_back_with_its_rank(tmp_path: Path) -> None:
    """PEFT itself makes one A for all rows of Mamba-2's input projection, of which three of our matrices are made."""
    model = load_model(GOLDEN / "mamba2_tiny")
    modules = peft.modules_of(model.config, adapters(model, dataclasses.replace(LORA, targets=("in_proj|BC|dt",))))
    assert {pair[0].shape[0] for pair in modules.values()} == {15}
    stored = adapters(model)
    mixer = stored["layers"]["mixer"]
    for name in ("BC_proj", "dt_proj"):
        mixer[name]["kernel"] = dataclasses.replace(mixer[name]["kernel"], lora_a=mixer["in_proj"]["kernel"].lora_a)
    assert {pair[0].shape[0] for pair in peft.modules_of(model.config, stored).values()} == {5}


@pytest.mark.parametrize(
    ("targets", "modules"),
    [
        ((), ["dt_proj", "in_proj", "out_proj", "x_proj"]),
        (("in_proj", "x_proj"), ["in_proj", "x_proj"]),
    ],
)
def test_modules_are_named_by_their_last_word(targets: tuple[str, ...], modules: list[str], tmp_path: Path) -> None:
    model = load_model(GOLDEN / "mamba1_tiny")
    save(tmp_path / "adapter", model, GOLDEN / "mamba1_tiny", dataclasses.replace(LORA, targets=targets))
    content = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert content["target_modules"] == modules
    assert (content["r"], content["lora_alpha"], content["peft_type"], content["task_type"]) == (
        *(5, 3, "LORA"),
        "CAUSAL_LM",
    )


def test_modules_are_named_in_full_where_their_last_word_has_others(tmp_path: Path) -> None:
    model = load_model(GOLDEN / "jamba_tiny")
    path = next(
        "/".join(key)
        for key in traverse_util.flatten_dict(adapters(model))
        if key[-2] == "up_proj" and key[-1] == "kernel"
    )
    one = dataclasses.replace(LORA, targets=(f"^{path.removesuffix('/kernel')}$",))
    save(tmp_path / "adapter", model, GOLDEN / "jamba_tiny", one)
    named = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"]
    tensors = safetensors.numpy.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {f"base_model.model.model.{name}" for name in named} == {name.partition(".lora_")[0] for name in tensors}


def test_adapters_of_a_shared_block_are_refused(tmp_path: Path) -> None:
    model = load_model(GOLDEN / "zamba2_tiny")
    for targets in (("shared_.*q_proj",), ("adapter_up",)):
        lora = dataclasses.replace(LORA, targets=targets)
        with pytest.raises(
            InputError, match=r"^PEFT would adapt a block that layers share in one of them alone \(model"
        ):
            save(tmp_path / "adapter", model, GOLDEN / "zamba2_tiny", lora)


def test_limits_of_the_library_are_told() -> None:
    for name, words in (
        ("mamba2_tiny", "PEFT refuses adapters of out_proj in models of the type 'mamba2'"),
        ("jamba_tiny", "transformers reads the weights of dt_proj past its adapter in models of the type 'jamba'"),
        ("bamba_tiny", ""),
    ):
        model = load_model(GOLDEN / name)
        assert "; ".join(peft.limits(model.config, adapters(model))).startswith(words)


def test_scales_of_other_programs(tmp_path: Path) -> None:
    """Rank-stabilised adapters have alpha / sqrt(r), and a module's own alpha counts before that of all."""
    model = load_model(GOLDEN / "mamba1_tiny")
    save(tmp_path / "adapter", model, GOLDEN / "mamba1_tiny")
    path = tmp_path / "adapter" / "adapter_config.json"
    content = json.loads(path.read_text())

    def change() -> np.ndarray:
        params = load_model(tmp_path / "adapter").params["layers"]["mixer"]
        return params["in_proj"]["kernel"] - model.params["layers"]["mixer"]["in_proj"]["kernel"]

    before = change()
    path.write_text(json.dumps({**content, "use_rslora": True}))
    np.testing.assert_allclose(change(), before * 5**0.5, **SAME)
    path.write_text(json.dumps({**content, "alpha_pattern": {"in_proj": 6.0}}))
    np.testing.assert_allclose(change(), before * 2, **SAME)


def _config(**fields: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return spoil


def _tensors(edit: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        safetensors.numpy.save_file(edit(safetensors.numpy.load_file(path)), path)

    return spoil


NAME = "base_model.model.backbone.layers.0.mixer.in_proj.lora_{}.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_config(peft_type="IA3"), "adapter_config.json: peft_type='IA3' is not supported, only 'LORA'"),
        (_config(use_dora=True), "adapter_config.json: use_dora=True is not supported, only False"),
        (_config(bias="all"), "adapter_config.json: bias='all' is not supported, only 'none'"),
        (
            _config(base_model_name_or_path="state-spaces/mamba-130m-hf"),
            "adapter_config.json: base_model_name_or_path='state-spaces/mamba-130m-hf' is no folder of a model here: "
            "write that of the model which the adapter belongs to",
        ),
        (_config(lora_alpha="8"), "adapter_config.json: lora_alpha='8' is not a number"),
        (
            _tensors(lambda found: {**found, "base_model.model.lm_head.weight": np.zeros((1, 1), np.float32)}),
            "holds 'base_model.model.lm_head.weight', which is no lora_A or lora_B of a linear layer",
        ),
        (
            _tensors(lambda found: {name: value for name, value in found.items() if name != NAME.format("B")}),
            "adapter_model.safetensors holds only lora_A of 'layers.0.mixer.in_proj': fetch it again",
        ),
        (
            _tensors(lambda found: {**found, NAME.format("A"): np.zeros((5, 3), np.float32)}),
            "is of another model than its base: layers.0.mixer.in_proj has lora_A (5, 3) and lora_B",
        ),
        (
            _tensors(lambda found: {name.replace("layers.0.", "layers.99."): value for name, value in found.items()}),
            "is of another model than its base, which has no layers.99.mixer.dt_proj; ",
        ),
        (
            _tensors(lambda found: {**found, NAME.format("A"): np.full_like(found[NAME.format("A")], np.nan)}),
            "the adapter of layers.0.mixer.in_proj has values that are not finite: fetch it again",
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_other_adapters_are_refused_in_one_line(spoil: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    model = load_model(GOLDEN / "mamba1_tiny")
    save(tmp_path / "adapter", model, GOLDEN / "mamba1_tiny")
    spoil(tmp_path / "adapter")
    with pytest.raises(InputError) as error:
        load_model(tmp_path / "adapter")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
