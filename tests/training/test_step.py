"""The compiled step: accumulation, sharding, donation, one compilation."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from mamba_jax.config import ExperimentConfig, Mamba1Config, MeshConfig
from mamba_jax.data.batch import LMBatch
from mamba_jax.sharding import make_mesh, put_batch
from mamba_jax.training.config import ProgramConfig
from mamba_jax.training.program import TrainProgram
from mamba_jax.training.step import StepMetrics, abstract_batch
from mamba_jax.training.train_state import TrainState

ALL_AXES = MeshConfig(data=2, fsdp=2, tensor=2)


def make_batch(config: ExperimentConfig | ProgramConfig, *, seed: int = 0) -> LMBatch:
    """Random tokens whose rows count different numbers of positions and hold two documents."""
    if isinstance(config, ExperimentConfig):
        config = config.program
    rng = np.random.default_rng(seed)
    shape = (config.global_batch, config.seq_len)
    tokens = rng.integers(0, config.model.vocab_size, (shape[0], shape[1] + 1)).astype(np.int32)
    return LMBatch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        loss_mask=np.arange(shape[1]) < rng.integers(1, shape[1] + 1, (shape[0], 1)),
        segment_ids=np.broadcast_to(np.arange(shape[1]) // 15, shape).astype(np.int32),
    )


@functools.cache
def program_of(config: ProgramConfig, mesh: MeshConfig) -> TrainProgram:
    """The program on the first devices; one that was traced is not traced again."""
    return TrainProgram(config, make_mesh(mesh, jax.devices()[: math.prod(dataclasses.astuple(mesh))]))


@functools.cache
def _initial(config: ProgramConfig, mesh: MeshConfig) -> Any:
    return jax.device_get(program_of(config, mesh).initialize())


def set_up(config: ExperimentConfig) -> tuple[Mesh, TrainState, Any]:
    program = program_of(config.program, config.mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, program.state)
    return program.mesh, jax.device_put(_initial(config.program, config.mesh), shardings), program.step


def run_steps(config: ExperimentConfig, num_steps: int) -> tuple[TrainState, list[StepMetrics], Any]:
    mesh, state, step = set_up(config)
    history = []
    with jax.set_mesh(mesh):
        for index in range(num_steps):
            state, metrics = step(state, put_batch(mesh, make_batch(config, seed=index)))
            history.append(jax.device_get(metrics))
    return state, history, step


def relative_difference(tree: Any, other: Any) -> float:
    """Norm of the difference over the norm, over all leaves together."""
    difference = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - np.asarray(b, np.float64), tree, other)
    return float(optax.tree.norm(difference) / optax.tree.norm(tree))


def gradient(state: TrainState) -> Any:
    """After one step the first moment is (1 - b1) times the clipped gradient."""
    return optax.tree_utils.tree_get(state.opt_state, "mu")


# Sums of float32 terms in another order: the longest are over 8 x 24 positions and 24 time steps of a recurrence, so
# about 200 roundings of 2^-24, each of which may be amplified by the layers above; random signs leave their root.
REORDERING = 200 * 2.0**-24


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(MeshConfig(data=1), id="one device"),
        pytest.param(ALL_AXES, id="eight devices", marks=pytest.mark.slow),
    ],
)
def test_accumulation_equals_the_large_batch(make_config: Callable[..., ExperimentConfig], mesh: MeshConfig) -> None:
    whole_state, (whole,), _ = run_steps(make_config(mesh=mesh), 1)
    state, (metrics,), _ = run_steps(make_config(mesh=mesh, accumulation_steps=2), 1)
    for name in ("loss", "cross_entropy", "z_loss", "grad_norm"):
        np.testing.assert_allclose(getattr(metrics, name), getattr(whole, name), rtol=REORDERING)
    assert relative_difference(gradient(state), gradient(whole_state)) < REORDERING


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(ALL_AXES, id="data, fsdp, tensor"),
        pytest.param(MeshConfig(data=2, sequence=4), id="data, sequence"),
        pytest.param(MeshConfig(data=1, fsdp=2, sequence=2, tensor=2), id="fsdp, sequence, tensor"),
    ],
)
def test_mesh_does_not_change_the_losses(make_config: Callable[..., ExperimentConfig], mesh: MeshConfig) -> None:
    one_state, one, _ = run_steps(make_config(), 12)
    eight_state, eight, step = run_steps(make_config(mesh=mesh), 12)
    first_ratio = abs(float(eight[0].grad_norm) / float(one[0].grad_norm) - 1)
    assert first_ratio < REORDERING
    # A loss is a sum of some 100 counted tokens: as many roundings by up to half a unit in the last place of the sum,
    # of random sign, are 3 units (uniform errors: sqrt(100 / 12)) in each of two orders. The weights' own differences
    # are far below that, and stay there.
    units = [
        abs(np.float32(a.cross_entropy).view(np.int32) - np.float32(b.cross_entropy).view(np.int32))
        for a, b in zip(one, eight, strict=True)
    ]
    assert max(units) <= 4, units
    assert int(eight_state.step) == int(one_state.step) == 12
    assert step._cache_size() == 1


def test_state_is_split_over_the_mesh(make_config: Callable[..., ExperimentConfig]) -> None:
    state, _, _ = run_steps(make_config(mesh=ALL_AXES), 1)
    moments = [optax.tree_utils.tree_get(state.opt_state, name) for name in ("mu", "nu")]
    for tree in (state.params, *moments):
        in_proj = tree["layers"]["mixer"]["in_proj"]["kernel"]
        layers, d_model, halves, inner = in_proj.shape
        assert in_proj.addressable_shards[0].data.shape == (layers, d_model // 2, halves, inner // 2)
        table = tree["embedding"]["table"]
        assert table.addressable_shards[0].data.shape == (table.shape[0] // 2, table.shape[1] // 2)
    for moment in moments:
        assert jax.tree.map(lambda m: m.sharding, moment) == jax.tree.map(lambda p: p.sharding, state.params)
        assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(moment))


@pytest.mark.parametrize("mesh", [MeshConfig(data=1), ALL_AXES], ids=["one device", "eight devices"])
def test_state_is_donated_and_reductions_stay_outside_the_loss(
    make_config: Callable[..., ExperimentConfig], mesh: MeshConfig
) -> None:
    config = make_config(mesh=mesh)
    device_mesh, state, step = set_up(config)
    with jax.set_mesh(device_mesh):
        compiled = step.lower(state, put_batch(device_mesh, make_batch(config))).compile()
    state_bytes = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    assert compiled.memory_analysis().alias_size_in_bytes == state_bytes
    # The gradient of the head, (vocabulary / tensor, width), crosses the devices once a step, not once a chunk.
    head = f"{config.model.padded_vocab_size // mesh.tensor},"
    entry = compiled.as_text().index("ENTRY")
    reductions = [
        m.start() for m in re.finditer(rf"= [^=\n]*f32\[(?:1,)?{head}[^=\n]* all-reduce\(", compiled.as_text())
    ]
    assert all(position > entry for position in reductions)
    assert bool(reductions) == (mesh == ALL_AXES)


def test_metrics(make_config: Callable[..., ExperimentConfig]) -> None:
    config = make_config()
    _, history, _ = run_steps(config, 2)
    for metrics in history:
        np.testing.assert_allclose(metrics.cross_entropy + metrics.z_loss, metrics.loss, rtol=2**-23)
        assert metrics.z_loss > 0
        # Before training every token has about the same probability.
        assert abs(float(metrics.cross_entropy) - np.log(257)) < 0.5
    assert history[0].learning_rate == np.float32(config.optimizer.peak_lr)
    assert history[1].learning_rate < history[0].learning_rate


def test_on_gpus_no_sum_is_taken_in_a_free_order(make_config: Callable[..., ExperimentConfig]) -> None:
    """A scatter on a GPU adds with atomic operations, unless no two of its places are the same."""
    config = make_config(mesh=ALL_AXES, accumulation_steps=2, order="streams")
    assert isinstance(config.model.mixer, Mamba1Config)
    mixer = dataclasses.replace(config.model.mixer, scan_implementation="xla")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, mixer=mixer))
    device_mesh, state, step = set_up(config)
    with jax.set_mesh(device_mesh):
        traced = step.trace(state, abstract_batch(config.program, device_mesh))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    scatters = re.findall(r'"stablehlo\.(?:select_and_)?scatter"\(.*?\}\) :', text, re.DOTALL)
    assert scatters
    assert not [scatter for scatter in scatters if "unique_indices = true" not in scatter]
