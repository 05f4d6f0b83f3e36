"""Compiles the training step of a config for a TPU pod that is not present, and estimates memory, exchanges and time.

python train.py configs/mamba_2_8b.py --compile-only --topology v5p:8x8x8 --num-slices 2 --mesh.data 16 --mesh.fsdp 64
"""

import dataclasses
import math
import re
from collections.abc import Sequence

import jax
from jax.errors import JaxRuntimeError

from mamba_jax.chips import CHIPS
from mamba_jax.cli import print_result
from mamba_jax.errors import InputError
from mamba_jax.experiment import ExperimentConfig
from mamba_jax.models.flops import flops_per_token
from mamba_jax.pods.breakdown import instruction_times
from mamba_jax.pods.estimate import StepEstimate
from mamba_jax.pods.hlo import count_instructions
from mamba_jax.run.out_of_memory import advice
from mamba_jax.sharding import make_mesh
from mamba_jax.sharding.config import MeshConfig
from mamba_jax.training.config import ProgramConfig
from mamba_jax.training.program import TrainProgram
from pallas_kernels.common import ahead_of_time


def compile_step(config: ProgramConfig, mesh: MeshConfig, topology: str, *, num_slices: int = 1) -> StepEstimate:
    """Compiles the training step for every device of a TPU topology such as "v5e:16x16", or of several of them.

    Args:
        config: everything that the step depends on.
        mesh: sizes of the mesh axes.
        topology: TPU generation and the number of chips along each axis of a slice.
        num_slices: number of such slices, connected by the data-centre network.

    Raises:
        InputError: the topology is not known, the mesh does not fit it, or the step does not fit into the memory.
    """
    if num_slices < 1:
        raise InputError(f"num_slices must be positive, got {num_slices}: pass the number of slices of the pod")
    try:
        devices = ahead_of_time.tpu_devices(topology, num_slices)
    except (JaxRuntimeError, ValueError) as error:
        raise InputError(
            f"no TPU topology {topology!r}: expected a generation and the chips along its axes, such as v5e:4x4, "
            f"v5p:4x4x4 or v6e:16x16 ({str(error).splitlines()[0]})"
        ) from None
    program = TrainProgram(config, make_mesh(mesh, devices))
    lowered = program.lower(("tpu",))
    try:
        compiled = ahead_of_time.compile_lowered(lowered)
    except JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", str(error))
        needs = f"needs {used[1]} of {used[2]} a device" if used else "needs more memory than a device has"
        raise InputError(f"the step does not fit {topology}: it {needs}; {advice(config.model)}") from None
    return _estimate(program, devices, num_slices, compiled)


def print_report(config: ExperimentConfig, topology: str | None, num_slices: str, *, largest: int = 0) -> int:
    """Compiles the step and prints the estimate, for `train.py --compile-only`; returns the exit status.

    Args:
        config: the resolved experiment.
        topology: value of the flag --topology; None if it was not given.
        num_slices: value of the flag --num-slices, not checked yet.
        largest: how many of the instructions that take most time to list.

    Raises:
        InputError: a flag is missing or not a number; or see `compile_step`.
    """
    if topology is None:
        raise InputError("--compile-only needs --topology, such as --topology v5e:4x4")
    if not num_slices.isdecimal():
        raise InputError(f"--num-slices {num_slices} is not a whole number from 1 on")
    jax.config.update("jax_platforms", "cpu")
    estimate = compile_step(config.program, config.mesh, topology, num_slices=int(num_slices))
    print_result("\n".join(estimate.lines(largest=largest)))
    return 0


def _estimate(
    program: TrainProgram, devices: Sequence[jax.Device], num_slices: int, compiled: jax.stages.Compiled
) -> StepEstimate:
    """What the compiled step needs on each device: memory and exchange in bytes, calls, and seconds on known chips."""
    config, state = program.config, program.state
    memory = compiled.memory_analysis()
    assert memory is not None, "the TPU compiler reports memory"
    parameters, optimizer = (_shard_bytes(tree) for tree in (state.params, state.opt_state))
    text = compiled.as_text() or ""
    counts = count_instructions(text, num_slices)
    chip = CHIPS.get(devices[0].device_kind)
    cores = None if chip is None else chip.cores
    tokens = config.global_batch * config.seq_len / len(devices)
    estimate = StepEstimate(
        devices=len(devices),
        num_slices=num_slices,
        device_kind=devices[0].device_kind,
        memory={
            "parameters": parameters,
            "optimizer state": optimizer,
            "batch": max(0, memory.argument_size_in_bytes - parameters - optimizer),
            "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
        },
        reused=memory.alias_size_in_bytes,
        collectives={kind: (counts.calls[kind], counts.arrived[kind]) for kind in sorted(counts.arrived)},
        collective_lines=tuple(counts.collective_lines),
        between_slices={kind: (counts.transfers[kind], counts.received[kind]) for kind in sorted(counts.received)},
        kernels={name: counts.calls[name] for name in counts.kernel_elements} | dict(counts.other_kernels),
        flops=tokens * flops_per_token(config.model, length=config.seq_len, definition=program.definition),
        operation_seconds=None if cores is None else counts.cycles / cores.clock_hz,
        kernel_seconds=None if cores is None or counts.other_kernels else cores.kernel_seconds(counts.kernel_elements),
    )
    if chip is None or estimate.expected_seconds is None:
        return estimate
    return dataclasses.replace(estimate, times=tuple(instruction_times(text, chip, num_slices)))


def _shard_bytes(tree) -> int:
    """Bytes of a device's part of a tree of arrays, without the padding of its layout."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
