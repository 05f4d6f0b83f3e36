"""The whole training step, compiled ahead of time for TPU pods that are not there."""

import dataclasses
import importlib.util
import math
import re
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import topologies

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
from mamba_jax.training.train_state import abstract_state

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed")

SMALL = ModelConfig(vocab_size=512, d_model=128, num_layers=2)
PUBLISHED_130M = ModelConfig(vocab_size=50277, d_model=768, num_layers=24)
V5E_MEMORY = 16 * 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledStep:
    """A compiled step, and how many bytes of the state one device holds."""

    program: jax.stages.Compiled
    state_bytes: int

    @property
    def memory(self) -> Any:
        return self.program.memory_analysis()

    @property
    def collectives(self) -> set[str]:
        """Kinds of operations through which devices exchange arrays."""
        kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
        return set(re.findall(rf"\b({kinds})(?:-start)?\(", self.program.as_text()))


def compile_step(
    topology: str, model: ModelConfig, mesh_config: MeshConfig, *, length: int, sequences_per_device: int
) -> CompiledStep:
    """Compiles the step that `train` would run there, from shapes and shardings alone."""
    with pytest.MonkeyPatch.context() as patch:
        # The compiler needs no TPU of its own, so other processes may have it loaded as well.
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    config = ExperimentConfig(
        name="pod",
        model=model,
        data=DataConfig(
            train=TextFolderSource(path="none"), seq_len=length, global_batch=sequences_per_device * len(devices)
        ),
        optimizer=OptimizerConfig(peak_lr=1e-3),
        train=TrainConfig(num_steps=100, run_dir="none"),
        mesh=mesh_config,
    )
    mesh = make_mesh(config.mesh, devices)
    definition = define(model)
    optimizer = make_optimizer(config.optimizer, num_steps=config.train.num_steps, decay=definition.decay)
    state = abstract_state(definition, optimizer, mesh)
    rows = {
        dtype: jax.ShapeDtypeStruct((config.data.global_batch, length), dtype, sharding=batch_sharding(mesh))
        for dtype in (np.int32, np.bool_)
    }
    batch = LMBatch(tokens=rows[np.int32], targets=rows[np.int32], loss_mask=rows[np.bool_], segment_ids=rows[np.int32])
    with jax.set_mesh(mesh):
        step = make_train_step(config, definition, optimizer, state)
        program = step.trace(state, batch).lower(lowering_platforms=("tpu",)).compile()
    state_bytes = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)
    )
    return CompiledStep(program=program, state_bytes=state_bytes)
