"""Schedules against their formulas, one AdamW update by hand, Muon against the singular values it must give."""

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mamba_jax.config import (
    CosineSchedule,
    Mamba1Config,
    MeshConfig,
    ModelConfig,
    MoeConfig,
    OptimizerConfig,
    WarmupStableDecaySchedule,
)
from mamba_jax.models import parameters
from mamba_jax.models.parameters import ModelDefinition, Params
from mamba_jax.sharding import Axis, make_mesh, put_batch
from mamba_jax.training.config import ProgramConfig
from mamba_jax.training.optimizer import learning_rate, make_optimizer, matrix_dimensions
from mamba_jax.training.program import TrainProgram
from tests.training.test_step import make_batch

# A schedule is some ten float32 operations on values below the peak.
RTOL = 10 * 2.0**-24


CONSTANT = CosineSchedule(warmup_fraction=0.0, final_lr=0.1)
MODEL = ModelConfig(
    vocab_size=24, d_model=16, num_layers=3, mixer=Mamba1Config(state_dim=4, dt_rank=2), tie_embeddings=False
)


# Rounding of an orthogonalised matrix in float64, u = 2**-53, of up to 16 by 32 elements. A product of k = 32 terms a
# sum rounds by k u times the Frobenius norms of its factors, at most 1.21 sqrt(16) = 4.84 =: f. A step has one product
# of X with X^T, one of A with A, one of B with X: 2 * 4.775 f^3 + 4 * 2.0315 f^5 < 23000. The quintic's steepest slope
# on 0 .. 1.21 is below 4.25, so five steps add up to (4.25^5 - 1) / 3.25 = 426 of these.
ROUNDING = 426 * 23_000 * 32 * 2.0**-53


def muon(**fields: Any) -> OptimizerConfig:
    """A learning rate of 0.1 throughout, no decay and no clipping."""
    defaults: dict[str, Any] = {"peak_lr": 0.1, "schedule": CONSTANT, "weight_decay": 0.0, "clip_norm": 1e18}
    return OptimizerConfig(algorithm="muon", **{**defaults, **fields})


def define(params: Params, *, axes: Params | None = None, decay: Params | None = None) -> ModelDefinition:
    """The definition of these parameters; without `axes` they are no matrices, without `decay` all decay."""
    return ModelDefinition(
        config=MODEL,
        params=params,
        axes=axes or jax.tree.map(lambda leaf: (Axis.CONV,) * leaf.ndim, params),
        decay=decay or jax.tree.map(lambda _: True, params),
        trained=jax.tree.map(lambda _: True, params),
        summed={},
        _graph=None,
        _state=None,
    )


def random_gradient(definition: ModelDefinition, *, seed: int) -> Params:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), definition.params)


def first_update(config: OptimizerConfig, definition: ModelDefinition, gradient: Params, params: Params) -> Params:
    optimizer = make_optimizer(config, num_steps=10, definition=definition)
    return jax.jit(optimizer.update)(gradient, optimizer.init(params), params)[0]


def by_name(tree: Any, **options: Any) -> dict[str, Any]:
    leaves = jax.tree.leaves_with_path(tree, **options)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def test_cosine() -> None:
    config = OptimizerConfig(peak_lr=3e-3, schedule=CosineSchedule(warmup_fraction=0.1, final_lr=1e-5))
    rates = np.array([learning_rate(config, 100)(step) for step in range(100)])
    np.testing.assert_allclose(rates[:10], 3e-3 * np.arange(1, 11) / 10, atol=3e-3 * RTOL)
    cosine = 0.5 * (1 + np.cos(np.pi * np.arange(91) / 90))
    np.testing.assert_allclose(rates[9:], 1e-5 + (3e-3 - 1e-5) * cosine, rtol=RTOL, atol=3e-3 * RTOL)
    assert rates[-1] == pytest.approx(1e-5, rel=1e-4)


def test_warmup_stable_decay() -> None:
    schedule = WarmupStableDecaySchedule(warmup_fraction=0.1, decay_fraction=0.2, final_lr=1e-4)
    rates = np.array([learning_rate(OptimizerConfig(peak_lr=1e-2, schedule=schedule), 50)(step) for step in range(50)])
    np.testing.assert_allclose(rates[:5], 1e-2 * np.arange(1, 6) / 5, atol=1e-2 * RTOL)
    np.testing.assert_allclose(rates[5:40], 1e-2, rtol=RTOL)
    np.testing.assert_allclose(rates[39:], np.linspace(1e-2, 1e-4, 11), rtol=RTOL, atol=1e-2 * RTOL)
    counted = dataclasses.replace(schedule, warmup_fraction=0.5, warmup_steps=5, decay_fraction=0.0, decay_steps=10)
    same = learning_rate(OptimizerConfig(peak_lr=1e-2, schedule=counted), 50)(jnp.arange(50))
    np.testing.assert_array_equal(
        same, learning_rate(OptimizerConfig(peak_lr=1e-2, schedule=schedule), 50)(jnp.arange(50))
    )


@pytest.mark.parametrize("schedule", [CosineSchedule(warmup_fraction=0.0), CosineSchedule(warmup_fraction=1.0)])
def test_extreme_warmup(schedule: CosineSchedule) -> None:
    config = OptimizerConfig(peak_lr=1.0, schedule=schedule)
    rates = np.array([learning_rate(config, 4)(step) for step in range(4)])
    assert np.all((rates > 0) & (rates <= 1))


def test_first_update_is_adamw() -> None:
    """After one update from zero moments the bias-corrected step is g / (|g| + eps) with g clipped, plus the decay."""
    config = OptimizerConfig(peak_lr=0.1, schedule=CosineSchedule(warmup_fraction=0.0), weight_decay=0.3, clip_norm=1.0)
    params = {"kernel": jnp.array([1.0, -2.0, 3.0]), "bias": jnp.array([0.5])}
    decay = {"kernel": True, "bias": False}
    gradient = {"kernel": jnp.array([3.0, 0.0, -4.0]), "bias": jnp.array([12.0])}
    optimizer = make_optimizer(config, num_steps=10, definition=define(params, decay=decay))
    updates, state = optimizer.update(gradient, optimizer.init(params), params)
    norm = 13.0
    rate = float(jnp.asarray(learning_rate(config, 10)(0)))
    for name, decayed in decay.items():
        g = np.asarray(gradient[name]) / norm
        expected = -rate * (g / (np.abs(g) + config.eps) + decayed * config.weight_decay * np.asarray(params[name]))
        # The bias correction computes 1 - b^1, which loses log2(1 / 0.05) of the 24 bits.
        np.testing.assert_allclose(by_name(updates)[name], expected, rtol=40 * 2.0**-24)
        moment = optax.tree_utils.tree_get(state, "mu")[name]
        np.testing.assert_allclose(moment, (1 - config.b1) * g, rtol=20 * 2.0**-24)


def test_small_gradients_are_not_clipped() -> None:
    config = OptimizerConfig(peak_lr=0.1, clip_norm=1.0)
    params = {"w": jnp.ones(4)}
    optimizer = make_optimizer(config, num_steps=10, definition=define(params))
    _, state = optimizer.update({"w": jnp.full(4, 0.25)}, optimizer.init(params), params)
    np.testing.assert_allclose(optax.tree_utils.tree_get(state, "mu")["w"], 0.1 * 0.25, rtol=20 * 2.0**-24)


def test_moments_are_float32() -> None:
    params = {"w": jnp.ones(3)}
    optimizer = make_optimizer(OptimizerConfig(peak_lr=1e-3), num_steps=10, definition=define(params))
    state = optimizer.init(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim} == {jnp.dtype("float32")}
    assert math.isclose(sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim), 6)


def test_which_parameters_muon_updates() -> None:
    """Dimensions of input and output by name; the rest, all of it, is AdamW's."""
    definition = parameters.define(MODEL)
    found = by_name(matrix_dimensions(definition), is_leaf=lambda node: isinstance(node, tuple))
    assert found.keys() == by_name(definition.params).keys()
    matrices = {name: tuple(dims) for name, dims in found.items() if not isinstance(dims, optax.MaskedNode)}
    assert matrices == {
        "layers/mixer/in_proj/kernel": (1, 3),
        "layers/mixer/x_proj/kernel": (1, 2),
        "layers/mixer/dt_proj/kernel": (1, 2),
        "layers/mixer/out_proj/kernel": (1, 2),
    }


def test_every_expert_is_a_matrix_of_its_own() -> None:
    mixer = MoeConfig(num_experts=2, hidden_dim=8)
    dims = matrix_dimensions(parameters.define(ModelConfig(vocab_size=24, d_model=16, num_layers=2, mixer=mixer)))
    found = by_name(dims, is_leaf=lambda node: isinstance(node, tuple))
    assert {name: tuple(dims) for name, dims in found.items() if not isinstance(dims, optax.MaskedNode)} == {
        "layers/mixer/router/kernel": (1, 2),
        "layers/mixer/experts/up_proj": (2, 4),
        "layers/mixer/experts/down_proj": (2, 3),
    }


def test_ablations_leave_constants_to_adamw() -> None:
    mixer = Mamba1Config(state_dim=4, dt_rank=2, selective=(), use_bias=True, use_gate=False)
    dims = matrix_dimensions(parameters.define(ModelConfig(vocab_size=24, d_model=16, num_layers=2, mixer=mixer)))
    assert by_name(dims).keys() == {
        f"layers/mixer/{name}/kernel/{field}"
        for name in ("in_proj", "out_proj")
        for field in ("reduction_axis", "output_axis")
    }


def newton_schulz(singular_values: np.ndarray) -> np.ndarray:
    """What five steps of the published quintic make of the singular values of a matrix."""
    x = singular_values / np.sqrt(np.sum(singular_values**2))
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    return x


@pytest.mark.parametrize("shape", [(16, 2, 32), (32, 16), (2, 32), (32, 10), (16, 16)])
def test_muon_brings_singular_values_to_one(shape: tuple[int, ...]) -> None:
    """Every matrix of a stack of layers: same singular vectors, singular values as the quintic makes them."""
    rng = np.random.default_rng(0)
    layers, (rows, *parts, columns) = 3, shape
    count, rank = layers * math.prod(parts), min(rows, columns)
    left = np.linalg.qr(rng.normal(size=(count, rows, rank)))[0]
    right = np.linalg.qr(rng.normal(size=(count, columns, rank)))[0]
    values = rng.uniform(0.05, 1, size=(count, rank))
    expected = np.stack([newton_schulz(row) for row in values])
    # The quintic's band, once all singular values are above 0.005 of the norm: 0.05 / sqrt(16) is.
    assert 0.68 < expected.min() <= expected.max() < 1.16

    def stack(values: np.ndarray) -> np.ndarray:
        matrices = np.einsum("nir,nr,nor->nio", left, values, right).reshape(layers, *parts, rows, columns)
        return np.moveaxis(matrices, -2, 1)

    axes = {"w": (Axis.LAYERS, Axis.EMBED, *(None,) * len(parts), Axis.INNER)}
    with jax.enable_x64(True):
        # Large enough that the 1e-8 which keeps the norm from zero is not seen.
        gradient = {"w": jnp.asarray(1e8 * stack(values))}
        update = np.asarray(first_update(muon(), define(gradient, axes=axes), gradient, gradient)["w"])
    scale = -0.1 * 0.2 * math.sqrt(max(rows, columns))
    np.testing.assert_allclose(update / scale, stack(expected), rtol=0, atol=ROUNDING)
    # The rank is the smaller dimension, so the root mean square is that of the singular values times 0.2 lr.
    assert 0.1 * 0.2 * 0.68 < np.sqrt(np.mean(update**2)) < 0.1 * 0.2 * 1.16


def test_matrices_are_updated_as_if_they_were_alone() -> None:
    """Each layer, and x and z of the input projection."""
    axes = {"w": parameters.define(MODEL).axes["layers"]["mixer"]["in_proj"]["kernel"]}
    with jax.enable_x64(True):
        stacked = np.random.default_rng(1).normal(size=(3, 16, 2, 32)) * np.array([1, 100, 1e-3])[:, None, None, None]

        def update(part: np.ndarray) -> np.ndarray:
            tree = {"w": jnp.asarray(part)}
            return np.asarray(first_update(muon(), define(tree, axes=axes), tree, tree)["w"])

        together = update(stacked)
        for layer, half in itertools.product(range(3), range(2)):
            rows, columns = slice(layer, layer + 1), slice(half, half + 1)
            alone = update(stacked[rows, :, columns])
            scale = 0.1 * 0.2 * math.sqrt(32)
            np.testing.assert_allclose(together[rows, :, columns], alone, rtol=0, atol=2 * scale * ROUNDING)


def test_muon_shares_decay_and_learning_rate_with_adamw() -> None:
    """A zero gradient leaves only the decay, of matrices and embeddings but of no vector; AdamW's share is AdamW's."""
    definition = parameters.define(MODEL)
    params = parameters.init(MODEL, jax.random.key(0))
    updates = first_update(muon(weight_decay=0.3), definition, jax.tree.map(jnp.zeros_like, params), params)
    for name, update in by_name(updates).items():
        decayed = by_name(definition.decay)[name]
        expected = -0.1 * 0.3 * decayed * np.asarray(by_name(params)[name], np.float64)
        # On top of the learning rate's own error: 0.3 in float32, and two products.
        np.testing.assert_allclose(update, expected, rtol=RTOL + 3 * 2.0**-24, err_msg=name)
    gradient = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), random_gradient(definition, seed=2))
    ours = by_name(first_update(muon(weight_decay=0.3), definition, gradient, params))
    adamw = dataclasses.replace(muon(weight_decay=0.3), algorithm="adamw")
    theirs = by_name(first_update(adamw, definition, gradient, params))
    for name in ours:
        is_matrix = name.startswith("layers/mixer/") and name.endswith("proj/kernel")
        assert np.array_equal(ours[name], theirs[name]) != is_matrix, name


PROGRAM = ProgramConfig(
    model=dataclasses.replace(MODEL, compute_dtype="float32", remat="none"),
    optimizer=muon(weight_decay=0.1, clip_norm=1.0),
    num_steps=10,
    seq_len=8,
    global_batch=8,
)


def sharded(mesh: MeshConfig, config: ProgramConfig = PROGRAM) -> TrainProgram:
    """The program on eight devices."""
    return TrainProgram(config, make_mesh(mesh))


def test_moments_are_laid_out_as_their_parameters() -> None:
    abstract = sharded(MeshConfig(data=2, fsdp=2, tensor=2)).state
    params = by_name(abstract.params)
    moments: dict[str, list[str]] = {name: [] for name in params}
    for path, leaf in by_name(abstract.opt_state).items():
        owner = next((name for name in params if path.endswith(f"/{name}")), None)
        if owner is None:
            assert leaf.shape in ((), (3,)), path
            continue
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (params[owner].shape, jnp.float32, params[owner].sharding)
        moments[owner].append(path.split("/" + owner)[0].rsplit("/", 1)[-1])
    for name, kinds in moments.items():
        is_matrix = name.startswith("layers/mixer/") and name.endswith("proj/kernel")
        assert kinds == (["mu"] if is_matrix else ["mu", "nu"]), name
    kernel = abstract.params["layers"]["mixer"]["in_proj"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (3, 8, 2, 16)


def test_the_update_does_not_depend_on_the_mesh() -> None:
    """Two updates in float64 of parameters split over fsdp and tensor, against those of one device."""
    program = sharded(MeshConfig(data=2, fsdp=2, tensor=2))
    abstract, optimizer = program.state, program.optimizer
    definition = program.definition
    layout = jax.tree.map(lambda leaf: leaf.sharding, (abstract.params, abstract.opt_state))

    def two_updates(params: Params, first: Params, second: Params) -> tuple[Any, Any]:
        _, state = optimizer.update(first, optimizer.init(params), params)
        return optimizer.update(second, state, params)

    with jax.enable_x64(True):
        trees = [random_gradient(definition, seed=seed) for seed in range(3)]
        one, _ = jax.jit(two_updates)(*trees)
        many, state = jax.jit(two_updates, out_shardings=layout)(*jax.device_put(trees, [layout[0]] * 3))
        assert {leaf.dtype for leaf in jax.tree.leaves(many)} == {jnp.dtype("float64")}
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == layout[1]
    for name, update in by_name(one).items():
        # AdamW's updates, and the scale of Muon's, are at most the learning rate 0.1 times 2, decay included.
        np.testing.assert_allclose(by_name(many)[name], update, rtol=0, atol=2 * 0.2 * ROUNDING, err_msg=name)


def test_one_layer_is_gathered_at_a_time() -> None:
    """A layer more costs its shards, which the loop over layers copies, and not its whole matrices."""
    mesh = MeshConfig(data=1, fsdp=8)

    def temporaries(num_layers: int) -> int:
        model = dataclasses.replace(PROGRAM.model, d_model=128, num_layers=num_layers)
        program = sharded(mesh, dataclasses.replace(PROGRAM, model=model))
        abstract, optimizer = program.state, program.optimizer
        layout = jax.tree.map(lambda leaf: leaf.sharding, (abstract.params, abstract.opt_state))
        update = jax.jit(optimizer.update, out_shardings=layout, donate_argnums=(0, 1))
        memory = update.lower(abstract.params, abstract.opt_state, abstract.params).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    layer = parameters.define(dataclasses.replace(MODEL, d_model=128, num_layers=1)).params["layers"]
    layer_bytes = sum(leaf.size * 4 for leaf in jax.tree.leaves(layer))
    growth = (temporaries(12) - temporaries(4)) / 8
    # Clipped gradients, momentum and updates: three shards.
    assert growth < 3 * layer_bytes / 8
    assert growth < layer_bytes / 2


def test_muon_trains() -> None:
    """Random tokens seen again and again: ten updates on eight devices learn more than half of them."""
    optimizer = dataclasses.replace(PROGRAM.optimizer, peak_lr=0.05)
    program = sharded(MeshConfig(data=2, fsdp=2, tensor=2), dataclasses.replace(PROGRAM, optimizer=optimizer))
    state = program.initialize()
    losses = []
    with jax.set_mesh(program.mesh):
        for _ in range(10):
            state, metrics = program.step(state, put_batch(program.mesh, make_batch(program.config)))
            losses.append(float(metrics.loss))
    assert losses[-1] < 0.5 * losses[0]
