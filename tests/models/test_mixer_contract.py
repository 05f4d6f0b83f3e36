"""What a mixer owes to models and training: one that the library does not know, alone and in hybrids, and Mamba-2."""

import dataclasses
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax.checkpoint import load_params
from mamba_jax.config import (
    CheckpointConfig,
    ExperimentConfig,
    Mamba1Config,
    Mamba2Config,
    MeshConfig,
    ModelConfig,
    from_json,
    to_json,
)
from mamba_jax.errors import InputError
from mamba_jax.export import huggingface
from mamba_jax.models.config import Hybrid, Unit
from mamba_jax.models.flops import flops_per_token
from mamba_jax.models.parameters import count, define, init
from mamba_jax.models.state import init_state, reset_rows, state_axes
from mamba_jax.run.loop import train
from mamba_jax.sharding import Axis
from tests.runs import corpus, make_config
from tests.toys.mixer import EmaConfig
from tests.training.test_step import REORDERING, gradient, make_batch, relative_difference, run_steps

__all__ = ["corpus", "make_config"]

MAMBA = Mamba1Config(state_dim=4, dt_rank=2)
HEADS = Mamba2Config(state_dim=4, head_dim=8, num_groups=2)
BARE = dataclasses.replace(MAMBA, use_conv=False)
MODELS = {
    "alone": {"mixer": EmaConfig(), "num_layers": 2},
    "unit": {"mixer": Hybrid(units=(Unit(mixers=(MAMBA, BARE, EmaConfig())),)), "num_layers": 6},
    "runs": {
        "mixer": Hybrid(units=(Unit(mixers=(MAMBA,), repeats=2), Unit(mixers=(EmaConfig(), MAMBA)))),
        "num_layers": 4,
    },
    "heads": {"mixer": HEADS, "num_layers": 2},
}
MakeConfig = Callable[..., ExperimentConfig]


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> dict[str, Any]:
    return MODELS[request.param]


def small(**fields: Any) -> ModelConfig:
    defaults: dict[str, Any] = {"vocab_size": 29, "d_model": 16, "compute_dtype": "float32", "remat": "none"}
    return ModelConfig(**defaults | fields)


def test_names_of_stacks_and_their_repeats() -> None:
    names = [[(stack.name, stack.mixer.kind, stack.repeats) for stack in small(**MODELS[m]).stacks] for m in MODELS]
    assert names == [
        [("layers", "ema", 2)],
        [("layers_0", "mamba1", 2), ("layers_1", "mamba1", 2), ("layers_2", "ema", 2)],
        [("layers_0", "mamba1", 2), ("layers_1", "ema", 1), ("layers_2", "mamba1", 1)],
        [("layers", "mamba2", 2)],
    ]


def test_json_keeps_the_mixers(model: dict[str, Any]) -> None:
    config = small(**model)
    assert from_json(ModelConfig, to_json(config), origin="here") == config


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: small(mixer=MODELS["unit"]["mixer"], num_layers=5), "num_layers is 5, but .* make 3 blocks"),
        (lambda: small(mixer=MODELS["runs"]["mixer"], num_layers=2), "num_layers is 2, but .* make 2 blocks"),
        (lambda: Hybrid(units=()), "Hybrid.units is empty"),
        (lambda: Unit(mixers=()), "Unit.mixers is empty"),
        (lambda: Unit(mixers=(MAMBA,), repeats=0), "Unit.repeats must be positive, got 0"),
        (lambda: Hybrid(units=(Unit(mixers=(MAMBA,)), Unit(mixers=(BARE,)))), "several leave their repeats"),
    ],
)
def test_units_that_do_not_fit_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_an_unknown_kind_is_refused() -> None:
    text = to_json(small(**MODELS["alone"])).replace('"ema"', '"mean"')
    with pytest.raises(InputError, match=r"mixer: .*'mean'.*'mamba1', 'mamba2', 'ema'"):
        from_json(ModelConfig, text, origin="config.json")


def test_decoding_equals_the_full_forward_pass(model: dict[str, Any]) -> None:
    definition = define(small(**model))
    params = init(definition.config, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 29, (2, 9)).astype(np.int32)
    run = jax.jit(lambda tokens, state: definition.merge(params)(tokens, state))
    whole = run(tokens, None)
    output = run(tokens[:, :5], None)
    logits = [output.logits]
    for index in range(5, 9):
        output = run(tokens[:, index : index + 1], output.state)
        logits.append(output.logits)
    # Sums over 32 channels, 4 states and 9 tokens, through up to 6 layers.
    bound = 6 * (32 + 4 + 9) * 2.0**-24 * float(np.max(np.abs(whole.logits)))
    np.testing.assert_allclose(np.concatenate(logits, axis=1), whole.logits, rtol=0, atol=bound)
    for value, reference in zip(jax.tree.leaves(output.state), jax.tree.leaves(whole.state), strict=True):
        np.testing.assert_allclose(value, reference, rtol=0, atol=bound)


def test_a_packed_document_is_as_it_is_alone(model: dict[str, Any]) -> None:
    definition = define(small(**model))
    params = init(definition.config, jax.random.key(0))
    tokens = np.random.default_rng(1).integers(0, 29, (1, 12)).astype(np.int32)
    run = jax.jit(lambda tokens, ids: definition.merge(params)(tokens, segment_ids=ids).logits)
    ids = np.repeat([[0, 1]], [5, 7], axis=1).astype(np.int32)
    packed = run(tokens, ids)
    alone = run(tokens[:, 5:], np.zeros((1, 7), np.int32))
    # In a row of another length a prefix may be added up in another order.
    np.testing.assert_allclose(packed[:, 5:], alone, rtol=0, atol=6 * 45 * 2.0**-24 * float(np.max(np.abs(alone))))


def test_declared_states_are_those_that_come_out(model: dict[str, Any]) -> None:
    config = small(**model)
    definition = define(config)
    state = jax.eval_shape(
        lambda params: definition.merge(params)(jnp.zeros((3, 5), jnp.int32)).state, definition.params
    )
    start = init_state(config, 3)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), start
    )
    ones = jax.tree.map(jnp.ones_like, start)
    reset = reset_rows(config, ones, jnp.asarray([True, False, True]))
    for leaf, axes in zip(jax.tree.leaves(reset), jax.tree.leaves(state_axes(config), is_leaf=_is_axes), strict=True):
        rows = np.moveaxis(np.asarray(leaf), axes.index(Axis.BATCH), 0)
        assert not rows[[0, 2]].any()
        assert rows[1].all()


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple) and len(node) > 0


def test_counts(model: dict[str, Any]) -> None:
    config = small(**model)
    of_a_state = {"mamba1": 27, "mamba2": 15, "ema": 0}
    own = sum(of_a_state[stack.mixer.kind] * 32 * 4 * stack.repeats for stack in config.stacks)
    assert flops_per_token(config, length=8) == 6 * count(config) + own


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"mesh": MeshConfig(data=2, sequence=2, tensor=2)}, id="data, sequence, tensor"),
        pytest.param({"mesh": MeshConfig(data=1, fsdp=2, sequence=4)}, id="fsdp, sequence", marks=pytest.mark.slow),
        pytest.param({"accumulation_steps": 2, "windows": 3}, id="microbatches of windows"),
    ],
)
@pytest.mark.parametrize("name", ["unit", "heads", pytest.param("runs", marks=pytest.mark.slow)])
def test_training_does_not_depend_on_how_it_is_cut(make_config: MakeConfig, name: str, changes: dict) -> None:
    whole_state, (whole,), _ = run_steps(make_config(**MODELS[name]), 1)
    state, (cut,), _ = run_steps(make_config(**MODELS[name], **changes), 1)
    np.testing.assert_allclose(cut.loss, whole.loss, rtol=REORDERING)
    assert relative_difference(gradient(state), gradient(whole_state)) < math.sqrt(6) * REORDERING


@pytest.mark.parametrize("name", ["unit", "heads"])
def test_streams_carry_every_state(make_config: MakeConfig, name: str) -> None:
    config = make_config(**MODELS[name], order="streams", accumulation_steps=2)
    shape = (config.data.global_batch, config.data.seq_len)
    batch = dataclasses.replace(make_batch(config), segment_ids=np.zeros(shape, np.int32))
    from tests.training.test_long_sequences import forward_state, one_step, streams

    state, _ = one_step(config, streams(config, batch))
    fresh = make_config(**MODELS[name], order="streams")
    params = init(fresh.model, jax.random.key(fresh.seed))
    assert relative_difference(forward_state(fresh, params, batch), state.recurrent) < REORDERING


def test_a_run_resumes_and_an_export_is_refused_in_one_line(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(**MODELS["runs"], num_steps=4, checkpoint=CheckpointConfig(every=2))
    run_dir = Path(config.train.run_dir)
    train(config, devices=jax.devices()[:1])
    whole = load_params(run_dir).params
    shutil.rmtree(run_dir / "checkpoints" / "4")
    assert train(config, devices=jax.devices()[:1]).step == 4
    jax.tree.map(np.testing.assert_array_equal, load_params(run_dir).params, whole)
    with pytest.raises(InputError, match="have no published names") as error:
        huggingface.save(tmp_path / "export", config.model, whole, layout="hf")
    assert "\n" not in str(error.value)


def test_the_page_shows_the_mixer() -> None:
    root = Path(__file__).parents[2]
    mixer = (root / "tests" / "toys" / "mixer.py").read_text()
    assert f"```python\n{mixer}```" in (root / "docs" / "add_a_mixer.md").read_text()
    assert mixer.count("\n") < 60
