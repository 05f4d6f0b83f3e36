"""The whole training step, compiled ahead of time for TPU pods that are not there."""

import concurrent.futures
import dataclasses
import importlib.util
import math
import multiprocessing
import re
from collections import Counter
from collections.abc import Sequence

import jax
import numpy as np
import pytest

from configs import mamba_2_8b, mamba_130m
from mamba_jax.config import (
    DataConfig,
    ExperimentConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TextFolderSource,
    TrainConfig,
)
from mamba_jax.data.batch import LMBatch
from mamba_jax.models.parameters import define
from mamba_jax.sharding import batch_sharding, make_mesh
from mamba_jax.training.optimizer import make_optimizer
from mamba_jax.training.step import make_train_step
from mamba_jax.training.train_state import TrainState, abstract_state
from pallas_kernels.ahead_of_time import tpu_devices

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed")

SMALL = ModelConfig(vocab_size=512, d_model=128, num_layers=2)
PUBLISHED_130M, PUBLISHED_2_8B = mamba_130m.get_config().model, mamba_2_8b.get_config().model
# Of a device, by the first part of a topology's name.
MEMORY = {"v5e": 16 * 2**30, "v6e": 32 * 2**30, "v5p": 95 * 2**30}
KERNELS = {"selective_scan_pallas_tpu_forward", "selective_scan_pallas_tpu_backward"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """What to compile, and for which pod."""

    topology: str
    mesh: MeshConfig
    model: ModelConfig
    length: int
    sequences_per_device: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledStep:
    """What the compiler says about a step; bytes are those of one device.

    Attributes:
        state_bytes: of the state, without the padding of its layout.
        alias_bytes: of arguments whose memory is that of results.
        peak_bytes: of everything that is alive during the step.
        collectives: how often each kind of operation occurs through which devices exchange arrays.
        scan_collectives: those within the selective scan.
        kernels: how often each kernel of the selective scan is called in the program's text.
    """

    state_bytes: int
    alias_bytes: int
    peak_bytes: int
    collectives: Counter[str]
    scan_collectives: list[str]
    kernels: Counter[str]


def lower_step(target: Target, devices: Sequence[jax.Device], platform: str) -> tuple[jax.stages.Lowered, TrainState]:
    """The step that `train` would run on the devices, from shapes and shardings alone; and the state's."""
    shape = (target.sequences_per_device * len(devices), target.length)
    config = ExperimentConfig(
        name="pod",
        model=target.model,
        data=DataConfig(train=TextFolderSource(path="none"), seq_len=shape[1], global_batch=shape[0]),
        optimizer=OptimizerConfig(peak_lr=1e-3),
        train=TrainConfig(num_steps=100, run_dir="none"),
        mesh=target.mesh,
    )
    mesh = make_mesh(config.mesh, devices)
    definition = define(config.model)
    optimizer = make_optimizer(config.optimizer, num_steps=config.train.num_steps, decay=definition.decay)
    state = abstract_state(definition, optimizer, mesh)
    tokens = jax.ShapeDtypeStruct(shape, np.int32, sharding=batch_sharding(mesh))
    mask = jax.ShapeDtypeStruct(shape, np.bool_, sharding=batch_sharding(mesh))
    batch = LMBatch(tokens=tokens, targets=tokens, loss_mask=mask, segment_ids=tokens)
    with jax.set_mesh(mesh):
        step = make_train_step(config, definition, optimizer, state)
        return step.trace(state, batch).lower(lowering_platforms=(platform,)), state


def compile_step(target: Target) -> CompiledStep:
    """Compiles the step for the target's pod."""
    jax.config.update("jax_platforms", "cpu")
    lowered, state = lower_step(target, tpu_devices(target.topology), "tpu")
    program = lowered.compile()
    memory = program.memory_analysis()
    text = program.as_text()
    found = re.findall(r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\((.*)", text)
    return CompiledStep(
        state_bytes=sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)
        ),
        alias_bytes=memory.alias_size_in_bytes,
        peak_bytes=memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
        collectives=Counter(kind for kind, _ in found),
        scan_collectives=[line for _, line in found if "selective_scan" in line],
        kernels=Counter(re.findall(r"tpu_custom_call.*?(selective_scan_pallas_tpu_\w+ward)", text)),
    )


def compile_apart(target: Target) -> CompiledStep:
    """In a process of its own: the compiler ends its process where it finds a defect of its own."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as process:
        return process.submit(compile_step, target).result()


FOUR_CHIPS = Target(
    topology="v5e:2x2", mesh=MeshConfig(data=2, fsdp=2), model=SMALL, length=128, sequences_per_device=2
)


@pytest.mark.parametrize(
    "target",
    [
        pytest.param(FOUR_CHIPS, id="v5e:2x2", marks=pytest.mark.slow),
        pytest.param(
            dataclasses.replace(FOUR_CHIPS, topology="v6e:2x2", mesh=MeshConfig(fsdp=2, tensor=2)),
            id="v6e:2x2, tensor",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            Target(
                topology="v5e:4x4",
                mesh=MeshConfig(data=1, fsdp=16),
                model=PUBLISHED_130M,
                length=2048,
                sequences_per_device=16,
            ),
            id="v5e:4x4, 130M",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            Target(
                topology="v5e:16x16",
                mesh=MeshConfig(fsdp=16),
                model=PUBLISHED_130M,
                length=2048,
                sequences_per_device=1,
            ),
            id="v5e:16x16, 130M",
            marks=pytest.mark.slow,
        ),
        *(
            pytest.param(
                Target(
                    topology=topology,
                    mesh=mesh,
                    model=model,
                    length=2048,
                    sequences_per_device=1,
                ),
                id=f"{topology}, {name}",
                marks=pytest.mark.slow,
            )
            for topology, mesh, name, model in (
                ("v5e:16x16", MeshConfig(fsdp=256), "2.8B", PUBLISHED_2_8B),
                ("v5p:8x8x8", MeshConfig(data=8, fsdp=64), "130M", PUBLISHED_130M),
                ("v5p:8x8x8", MeshConfig(data=8, fsdp=64), "2.8B", PUBLISHED_2_8B),
            )
        ),
    ],
)
def test_step_compiles_for_the_pod(target: Target) -> None:
    compiled = compile_apart(target)
    assert compiled.alias_bytes >= compiled.state_bytes
    assert compiled.peak_bytes < MEMORY[target.topology.split(":")[0]]
    # Gradients are summed and parameters gathered; an exchange in the scan would be one for every chunk of every layer.
    assert compiled.collectives["all-reduce"] + compiled.collectives["reduce-scatter"] > 0
    assert compiled.collectives["all-gather"] > 0
    assert not compiled.scan_collectives
    assert compiled.kernels.keys() == KERNELS


def test_replicas_exchange_gradients_only() -> None:
    compiled = compile_apart(dataclasses.replace(FOUR_CHIPS, mesh=MeshConfig(data=4)))
    assert compiled.alias_bytes >= compiled.state_bytes
    assert set(compiled.collectives) == {"all-reduce"}
    assert not compiled.scan_collectives
    assert compiled.kernels.keys() == KERNELS
