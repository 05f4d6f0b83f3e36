"""The training step of a config, compiled for a TPU pod that is not there: its memory, its exchanges, its time.

python train.py configs/mamba_2_8b.py --compile-only --topology v5p:8x8x8 --mesh.data 8 --mesh.fsdp 64
"""

import collections
import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.errors import JaxRuntimeError

from mamba_jax.config import ExperimentConfig
from mamba_jax.data.batch import LMBatch
from mamba_jax.errors import InputError
from mamba_jax.models.parameters import define
from mamba_jax.sharding import batch_sharding, batch_shards, check_batches, make_mesh
from mamba_jax.training.flops import PEAK_FLOPS, flops_per_token
from mamba_jax.training.optimizer import make_optimizer
from mamba_jax.training.step import make_train_step
from mamba_jax.training.train_state import TrainState, abstract_state
from pallas_kernels import ahead_of_time

GIB, MIB = 2**30, 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """Published figures of one device of a kind.

    Attributes:
        memory: bytes.
        clock_hz: of the cores.
        cores: that share the device's work.
        link_bytes_per_second: to all neighbours together, one way.
        kernel_cycles: of a core, by kernel, for a token and 1024 channels; from the committed static schedules.
    """

    memory: int
    clock_hz: float
    cores: int
    link_bytes_per_second: float
    kernel_cycles: dict[str, float]


KERNELS = (
    "selective_scan_pallas_tpu_forward",
    "selective_scan_pallas_tpu_backward",
    "causal_conv1d_pallas_tpu_forward",
    "causal_conv1d_pallas_tpu_backward",
)


def _cycles(*cycles: float) -> dict[str, float]:
    return dict(zip(KERNELS, cycles, strict=True))


# Kernels: benchmarks/results/tpu_static_2026-11-24.md.
CHIPS = {
    "TPU v4": Chip(
        memory=32 * GIB,
        clock_hz=1.05e9,
        cores=2,
        link_bytes_per_second=300e9,
        kernel_cycles=_cycles(152.9, 456.6, 13.5, 30.1),
    ),
    "TPU v5 lite": Chip(
        memory=16 * GIB,
        clock_hz=1.5e9,
        cores=1,
        link_bytes_per_second=200e9,
        kernel_cycles=_cycles(47.5, 140.8, 8.1, 17.3),
    ),
    "TPU v5": Chip(
        memory=95 * GIB,
        clock_hz=1.75e9,
        cores=2,
        link_bytes_per_second=600e9,
        kernel_cycles=_cycles(48.0, 143.0, 8.2, 17.8),
    ),
}
_COLLECTIVES = r"all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepReport:
    """What the compiler says about a training step; bytes and seconds are those of one device.

    Attributes:
        devices: how many.
        device_kind: their kind.
        memory: bytes by kind of use; "temporaries" are what the step needs besides its arguments and results.
        reused: bytes of results that take the memory of arguments.
        collectives: by kind, how often in a step, and the bytes that arrive at a device.
        collective_lines: the instructions, for a closer look.
        kernels: how often a step calls each Pallas kernel.
        matmul_seconds: model operations at the device's peak.
        operation_seconds: XLA's operations by the compiler's estimate of cycles, at the clock.
        kernel_seconds: kernels by their schedules.
    """

    devices: int
    device_kind: str
    memory: dict[str, int]
    reused: int
    collectives: dict[str, tuple[int, int]]
    collective_lines: tuple[str, ...]
    kernels: dict[str, int]
    matmul_seconds: float
    operation_seconds: float | None
    kernel_seconds: float | None

    @property
    def total_memory(self) -> int:
        return sum(self.memory.values())

    @property
    def capacity(self) -> int | None:
        """Bytes of a device; None if the kind is not known."""
        chip = CHIPS.get(self.device_kind)
        return None if chip is None else chip.memory

    @property
    def exchange_seconds(self) -> float | None:
        """The collectives' bytes at the speed of the links."""
        chip = CHIPS.get(self.device_kind)
        arrived = sum(size for _, size in self.collectives.values())
        return None if chip is None else arrived / chip.link_bytes_per_second

    def lines(self) -> list[str]:
        """The report for a terminal."""
        lines = [f"{self.devices} devices of kind {self.device_kind}", "memory of a device:"]
        lines += [f"  {kind:<16}{size / GIB:9.3f} GiB" for kind, size in self.memory.items()]
        capacity = "" if self.capacity is None else f" of {self.capacity / GIB:.0f} GiB"
        lines += [f"  {'total':<16}{self.total_memory / GIB:9.3f} GiB{capacity}", "exchanged in a step, by a device:"]
        lines += [
            f"  {kind:<20}{count:6d} times {size / MIB:10.1f} MiB" for kind, (count, size) in self.collectives.items()
        ]
        lines += ["kernels in a step:", *(f"  {name:<36}{count:6d} calls" for name, count in self.kernels.items())]
        lines += [f"time of a step: model operations at the peak {1e3 * self.matmul_seconds:.1f} ms"]
        if self.operation_seconds is not None and self.kernel_seconds is not None and self.exchange_seconds is not None:
            busy = self.operation_seconds + self.kernel_seconds
            least, most = max(busy, self.exchange_seconds), busy + self.exchange_seconds
            lines += [
                f"  XLA's operations by the compiler's estimate {1e3 * self.operation_seconds:.1f} ms, kernels by "
                f"their schedules {1e3 * self.kernel_seconds:.1f} ms,",
                f"  exchange at the speed of the links {1e3 * self.exchange_seconds:.1f} ms; expected between "
                f"{1e3 * least:.1f} and {1e3 * most:.1f} ms,",
                f"  model FLOPs utilisation at most {self.matmul_seconds / least:.1%}",
            ]
        return lines


def lower_step(
    config: ExperimentConfig, devices: Sequence[jax.Device], platform: str
) -> tuple[jax.stages.Lowered, TrainState]:
    """The step that `train` would run on the devices, from shapes and shardings alone; and the state's.

    Raises:
        InputError: the mesh does not fit the devices, or the batch or a parameter the mesh.
    """
    mesh = make_mesh(config.mesh, devices)
    check_batches(config, batch_shards(mesh))
    definition = define(config.model)
    optimizer = make_optimizer(config.optimizer, num_steps=config.train.num_steps, decay=definition.decay)
    state = abstract_state(definition, optimizer, mesh)
    shape = config.data.global_batch, config.data.seq_len
    tokens: Any = jax.ShapeDtypeStruct(shape, np.int32, sharding=batch_sharding(mesh))
    mask: Any = jax.ShapeDtypeStruct(shape, np.bool_, sharding=batch_sharding(mesh))
    batch = LMBatch(tokens=tokens, targets=tokens, loss_mask=mask, segment_ids=tokens)
    with jax.set_mesh(mesh):
        step = make_train_step(config, definition, optimizer, state)
        return step.trace(state, batch).lower(lowering_platforms=(platform,)), state


def compile_step(config: ExperimentConfig, topology: str) -> StepReport:
    """Compiles the training step for every device of a TPU topology such as "v5e:16x16".

    Raises:
        InputError: the topology is not known, the config does not fit it, or the step not into the devices' memory.
    """
    try:
        devices = ahead_of_time.tpu_devices(topology)
    except (JaxRuntimeError, ValueError) as error:
        raise InputError(
            f"no TPU topology {topology!r}: expected a generation and the chips along its axes, such as v5e:4x4, "
            f"v5p:4x4x4 or v6e:16x16 ({str(error).splitlines()[0]})"
        ) from None
    lowered, state = lower_step(config, devices, "tpu")
    try:
        program = lowered.compile()
    except JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", str(error))
        needs = f"needs {used[1]} of {used[2]} a device" if used else "needs more memory than a device has"
        raise InputError(f"the step does not fit {topology}: it {needs}; {_advice(config)}") from None
    return _report(config, devices, state, program)


def _advice(config: ExperimentConfig) -> str:
    """What would make a step smaller."""
    advice = ["a larger mesh.fsdp", "a smaller data.global_batch", "a larger train.accumulation_steps"]
    if config.model.remat != "block":
        advice.append("model.remat block")
    return "try " + ", ".join(advice[:-1]) + f" or {advice[-1]}"


def _report(
    config: ExperimentConfig, devices: Sequence[jax.Device], state: TrainState, program: jax.stages.Compiled
) -> StepReport:
    memory = program.memory_analysis()
    assert memory is not None, "the TPU compiler reports memory"
    parameters, optimizer = (_shard_bytes(tree) for tree in (state.params, state.opt_state))
    counts: collections.Counter[str] = collections.Counter()
    sizes: collections.Counter[str] = collections.Counter()
    kernels: collections.Counter[str] = collections.Counter()
    kind = devices[0].device_kind
    chip = CHIPS.get(kind)
    lines, cycles, kernel_cycles = [], 0.0, 0.0
    for line, times in ahead_of_time.compiled_instructions(program.as_text() or ""):
        if estimate := re.search(r'"estimated_cycles":"(\d+)"', line):
            cycles += times * int(estimate[1])
        if found := re.search(rf" = (.*?) ({_COLLECTIVES})(-done)?\(", line):
            counts[found[2]] += times
            sizes[found[2]] += times * _arriving_bytes(found[2], found[1], line)
            lines.append(line.strip())
        if found := re.search(rf"%({'|'.join(KERNELS)})[.\w]* = \(?(.*?) custom-call\(", line):
            kernels[found[1]] += times
            batch, length, channels = (int(size) for size in re.findall(r"\[([\d,]+)\]", found[2])[0].split(","))
            if chip is not None:
                kernel_cycles += times * chip.kernel_cycles[found[1]] * batch * length * channels / 1024
    tokens = config.data.global_batch * config.data.seq_len / len(devices)
    return StepReport(
        devices=len(devices),
        device_kind=kind,
        memory={
            "parameters": parameters,
            "optimizer state": optimizer,
            "batch": max(0, memory.argument_size_in_bytes - parameters - optimizer),
            "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
        },
        reused=memory.alias_size_in_bytes,
        collectives={kind: (counts[kind], sizes[kind]) for kind in sorted(counts)},
        collective_lines=tuple(lines),
        kernels=dict(kernels),
        matmul_seconds=tokens * flops_per_token(config.model) / PEAK_FLOPS.get(kind, math.inf),
        operation_seconds=None if chip is None else cycles / chip.clock_hz,
        kernel_seconds=None if chip is None else kernel_cycles / chip.cores / chip.clock_hz,
    )


def _shard_bytes(tree) -> int:
    """Bytes of a device's part of a tree of arrays, without the padding of its layout."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _arriving_bytes(kind: str, result: str, line: str) -> int:
    """Bytes that a device receives in a collective with a result of the given type, at the least."""
    size = sum(
        (8 if dtype == "pred" else int(bits)) // 8 * math.prod(int(dim) for dim in dims.split(",") if dim)
        for dtype, bits, dims in re.findall(r"([a-z]+(\d*)\w*)\[([\d,]*)\]", result)
    )
    if kind == "reduce-scatter" and (groups := re.search(r"replica_groups=\[\d+,(\d+)\]", line)):
        return size * int(groups[1])
    return 2 * size if kind == "all-reduce" else size
