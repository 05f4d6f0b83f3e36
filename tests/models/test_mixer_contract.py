"""What a mixer owes to models and training: one that the library does not know, alone and in hybrids, and others."""

import dataclasses
import functools
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
    AttentionConfig,
    CheckpointConfig,
    ExperimentConfig,
    Mamba1Config,
    Mamba2Config,
    MeshConfig,
    MlpConfig,
    ModelConfig,
    MoeConfig,
    RGLRUConfig,
    SharedBlockConfig,
    WithSharedConfig,
    from_json,
    to_json,
)
from mamba_jax.errors import InputError
from mamba_jax.export import huggingface
from mamba_jax.models.config import Hybrid, Unit
from mamba_jax.models.flops import flops_per_token
from mamba_jax.models.loss import next_token_loss
from mamba_jax.models.parameters import count, define, init
from mamba_jax.models.state import declare, init_state, reset_rows, with_room
from mamba_jax.models.storage.per_layer import stacked, unstacked
from mamba_jax.run.loop import train
from mamba_jax.sharding import Axis
from tests.runs import corpus, make_config
from tests.toys.mixer import EmaConfig
from tests.training.test_step import REORDERING, gradient, make_batch, relative_difference, run_steps

__all__ = ["corpus", "make_config"]

MAMBA = Mamba1Config(state_dim=4, dt_rank=2)
HEADS = Mamba2Config(state_dim=4, head_dim=8, num_groups=2)
GATED = RGLRUConfig(lru_width=32, num_heads=2)
BARE = dataclasses.replace(MAMBA, use_conv=False)
EXPERTS = MoeConfig(num_experts=4, hidden_dim=8, balance_weight=0.1, z_weight=0.01)
WINDOWED = AttentionConfig(num_heads=2, window=6, rotary_dims=4, conv_width=3, softmax_scale=0.3, use_qkv_bias=True)
SHARING = WithSharedConfig(
    inner=HEADS,
    shared=SharedBlockConfig(attention=AttentionConfig(num_heads=2), mlp=MlpConfig(hidden_dim=24)),
    adapter_rank=2,
)
MODELS = {
    "alone": {"mixer": EmaConfig(), "num_layers": 2},
    "unit": {"mixer": Hybrid(units=(Unit(mixers=(MAMBA, BARE, EmaConfig())),)), "num_layers": 6},
    "runs": {
        "mixer": Hybrid(units=(Unit(mixers=(MAMBA,), repeats=2), Unit(mixers=(EmaConfig(), MAMBA)))),
        "num_layers": 4,
    },
    "heads": {"mixer": dataclasses.replace(HEADS, step_implementation="xla"), "num_layers": 2},
    "attention": {"mixer": AttentionConfig(num_heads=4, num_kv_heads=2), "num_layers": 2},
    "windowed": {"mixer": Hybrid(units=(Unit(mixers=(EmaConfig(), WINDOWED)),)), "num_layers": 4},
    "tokens": {"mixer": Hybrid(units=(Unit(mixers=(MAMBA, MlpConfig(hidden_dim=24))),)), "num_layers": 4},
    "griffin": {"mixer": Hybrid(units=(Unit(mixers=(GATED, MlpConfig(activation="gelu_tanh"))),)), "num_layers": 4},
    "experts": {"mixer": Hybrid(units=(Unit(mixers=(MAMBA, EXPERTS)),)), "num_layers": 4},
    "shared": {"mixer": Hybrid.of_pattern("(MS)*2", M=HEADS, S=SHARING), "num_layers": 4},
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
        [("layers", "attention", 2)],
        [("layers_0", "ema", 2), ("layers_1", "attention", 2)],
        [("layers_0", "mamba1", 2), ("layers_1", "mlp", 2)],
        [("layers_0", "rg_lru", 2), ("layers_1", "mlp", 2)],
        [("layers_0", "mamba1", 2), ("layers_1", "moe", 2)],
        [("layers_0", "mamba2", 2), ("layers_1", "with_shared", 2)],
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
    with pytest.raises(InputError, match=r"mixer: .*'mean'.*'mamba1', 'mamba2', .*'ema'"):
        from_json(ModelConfig, text, origin="config.json")


def test_decoding_equals_the_full_forward_pass(model: dict[str, Any]) -> None:
    definition = define(small(**model))
    params = init(definition.config, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 29, (2, 9)).astype(np.int32)
    run = jax.jit(lambda params, tokens, state: definition.merge(params)(tokens, state))
    whole = run(params, tokens, None)
    output = run(params, tokens[:, :4], None)
    # From here on with an array for each layer, as a decoder has them.
    layers = definition.unstacked(params)
    state = with_room(definition.config, {name: unstacked(part) for name, part in output.state.items()}, 9)
    logits = [output.logits]
    for start, stop in ((4, 6), (6, 7), (7, 8), (8, 9)):
        output = run(layers, tokens[:, start:stop], state)
        logits, state = [*logits, output.logits], output.state
    # Sums over 32 channels, 4 states and 9 tokens, through up to 6 layers.
    bound = 6 * (32 + 4 + 9) * 2.0**-24 * float(np.max(np.abs(whole.logits)))
    np.testing.assert_allclose(np.concatenate(logits, axis=1), whole.logits, rtol=0, atol=bound)
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=bound)
    jax.tree.map(close, {name: stacked(part) for name, part in output.state.items()}, whole.state)


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
    start = init_state(config, 3, max_length=5)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), start
    )
    ones = jax.tree.map(jnp.ones_like, start)
    reset = reset_rows(config, ones, jnp.asarray([True, False, True]))
    for leaf, declared in zip(
        jax.tree.leaves(reset), jax.tree.leaves(declare(config, batch_size=3, max_length=5)), strict=True
    ):
        rows = np.moveaxis(np.asarray(leaf), declared.axes.index(Axis.BATCH), 0)
        assert np.all(rows[[0, 2]] == declared.initial)
        assert np.all(rows[1] == 1)


def test_counts(model: dict[str, Any]) -> None:
    config = small(**model)
    of_a_state = {"mamba1": 27, "mamba2": 15, "rg_lru": 3}
    own = sum(of_a_state.get(stack.mixer.kind, 0) * 32 * 4 * stack.repeats for stack in config.stacks)
    # A token passes two of four experts by, each of three matrices of 16 x 8.
    own -= sum(6 * 2 * 3 * 16 * 8 * stack.repeats for stack in config.stacks if stack.mixer.kind == "moe")
    own += sum(
        12 * 16 * min(8, stack.mixer.window or 8) * stack.repeats
        for stack in config.stacks
        if isinstance(stack.mixer, AttentionConfig)
    )
    if config.shared_blocks:
        # The block's parameters are counted in each of the two layers that use it, and so is its attention.
        shared = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(define(config).params["shared_shared"]))
        own += 2 * (15 * 32 * 4 + 12 * 16 * 8) + (2 - 1) * 6 * shared
    assert flops_per_token(config, length=8) == 6 * count(config) + own


CUTS = {
    "mesh": {"mesh": MeshConfig(data=2, sequence=2, tensor=2)},
    "other mesh": {"mesh": MeshConfig(data=1, fsdp=2, sequence=4)},
    "windows": {"accumulation_steps": 2, "windows": 3},
}
# The ones that every run of the tests checks; a penalty of experts is that of each part, see below.
CHECKED = {("unit", "mesh"), ("griffin", "windows"), ("windowed", "windows")}


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        pytest.param(name, cut, marks=() if (name, cut) in CHECKED else pytest.mark.slow)
        for name in ("unit", "shared", "griffin", "windowed", "attention", "heads", "tokens", "runs")
        for cut in CUTS
    ],
)
def test_training_does_not_depend_on_how_it_is_cut(make_config: MakeConfig, name: str, cut: str) -> None:
    whole_state, (whole,), _ = run_steps(make_config(**MODELS[name]), 1)
    state, (metrics,), _ = run_steps(make_config(**MODELS[name], **CUTS[cut]), 1)
    np.testing.assert_allclose(metrics.loss, whole.loss, rtol=REORDERING)
    assert relative_difference(gradient(state), gradient(whole_state)) < math.sqrt(6) * REORDERING


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(MeshConfig(data=1, expert=2, sequence=2, tensor=2), id="expert, sequence, tensor"),
        pytest.param(MeshConfig(data=1, fsdp=2, expert=4), id="fsdp, expert", marks=pytest.mark.slow),
        pytest.param(MeshConfig(data=2, sequence=2, tensor=2), id="data, sequence, tensor", marks=pytest.mark.slow),
    ],
)
def test_devices_may_share_out_experts(make_config: MakeConfig, mesh: MeshConfig) -> None:
    whole_state, (whole,), _ = run_steps(make_config(**MODELS["experts"]), 1)
    state, (cut,), _ = run_steps(make_config(**MODELS["experts"], mesh=mesh), 1)
    np.testing.assert_allclose(cut.loss, whole.loss, rtol=REORDERING)
    np.testing.assert_allclose(cut.balance_loss, whole.balance_loss, rtol=REORDERING)
    assert relative_difference(gradient(state), gradient(whole_state)) < math.sqrt(6) * REORDERING
    kernel = state.params["layers_1"]["mixer"]["experts"]["up_proj"]
    split = (1, mesh.expert, mesh.fsdp * mesh.sequence, 1, mesh.tensor)
    parts = tuple(size // parts for size, parts in zip(kernel.shape, split, strict=True))
    assert kernel.addressable_shards[0].data.shape == parts


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param({"accumulation_steps": 2}, id="microbatches"),
        pytest.param({"windows": 2}, id="windows", marks=pytest.mark.slow),
    ],
)
def test_the_loss_holds_the_mean_penalty_of_the_parts(make_config: MakeConfig, parts: dict[str, int]) -> None:
    config = make_config(**MODELS["experts"], clip_norm=1e6, **parts)
    state, (metrics,), _ = run_steps(config, 1)
    definition, batch = define(config.model), make_batch(config)
    segment_ids = np.asarray(batch.segment_ids)

    def reference(params: Any) -> tuple[jax.Array, jax.Array]:
        model, length = definition.merge(params), config.data.seq_len // config.train.windows
        penalties, before = [], None
        for first in range(config.train.accumulation_steps):
            rows = np.s_[first :: config.train.accumulation_steps]
            for start in range(0, config.data.seq_len, length):
                tokens, ids = (array[rows, start : start + length] for array in (batch.tokens, segment_ids))
                output = model.hidden(tokens, before if start else None, segment_ids=ids)
                before = output.state
                penalties.append(output.penalty)
        output = model.hidden(batch.tokens, segment_ids=batch.segment_ids)
        normalizer = jnp.asarray(batch.loss_mask.sum(), jnp.float32)
        kept = {"normalizer": normalizer, "z_loss": 0.0, "chunk": 24}
        loss = next_token_loss(output.hidden, model.head, batch.targets, batch.loss_mask, **kept)
        penalty = jnp.mean(jnp.stack(penalties))
        return loss.loss + penalty, penalty

    params = init(config.model, jax.random.key(config.seed))
    (loss, penalty), expected = jax.jit(jax.value_and_grad(reference, has_aux=True))(params)
    np.testing.assert_allclose(metrics.balance_loss, penalty, rtol=REORDERING)
    np.testing.assert_allclose(metrics.loss, loss, rtol=REORDERING)
    np.testing.assert_allclose(metrics.cross_entropy + metrics.balance_loss, metrics.loss, rtol=2**-22)
    unscaled = jax.tree.map(lambda moment: moment / (1 - config.optimizer.b1), gradient(state))
    assert relative_difference(unscaled, expected) < math.sqrt(6) * REORDERING


@pytest.mark.parametrize(
    "name",
    ["unit", "windowed", *(pytest.param(name, marks=pytest.mark.slow) for name in ("griffin", "heads", "tokens"))],
)
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
    config = make_config(**MODELS["windowed"], num_steps=4, checkpoint=CheckpointConfig(every=2))
    run_dir = Path(config.train.run_dir)
    train(config, devices=jax.devices()[:1])
    whole = load_params(run_dir).params
    shutil.rmtree(run_dir / "checkpoints" / "4")
    assert train(config, devices=jax.devices()[:1]).step == 4
    jax.tree.map(np.testing.assert_array_equal, load_params(run_dir).params, whole)

    def changed(**fields: Any) -> ExperimentConfig:
        mixer = Hybrid(units=(Unit(mixers=(EmaConfig(), dataclasses.replace(WINDOWED, **fields))),))
        return dataclasses.replace(config, model=dataclasses.replace(config.model, mixer=mixer))

    assert train(changed(attention_implementation="xla"), devices=jax.devices()[:1]).step == 4
    with pytest.raises(InputError, match=r"model\.mixer\.units\.0\.mixers\.1\.window was 6, now 5\)"):
        train(changed(window=5), devices=jax.devices()[:1])
    with pytest.raises(InputError, match="no family of the layout 'hf' can express this model") as error:
        huggingface.save(tmp_path / "export", config.model, whole, layout="hf")
    assert "\n" not in str(error.value)


def test_the_page_shows_the_mixer() -> None:
    root = Path(__file__).parents[2]
    mixer = (root / "tests" / "toys" / "mixer.py").read_text()
    assert f"```python\n{mixer}```" in (root / "docs" / "add_a_mixer.md").read_text()
    assert mixer.count("\n") < 60
