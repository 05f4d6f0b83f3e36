"""The training step of a config, compiled for a TPU pod that is not there: its memory, its exchanges, its time.

python train.py configs/mamba_2_8b.py --compile-only --topology v5p:8x8x8 --num-slices 2 --mesh.data 16 --mesh.fsdp 64
"""

import collections
import itertools
import math
import re
from collections.abc import Sequence

import jax
from jax.errors import JaxRuntimeError

from mamba_jax.cli import print_result
from mamba_jax.errors import InputError
from mamba_jax.experiment import ExperimentConfig
from mamba_jax.models.flops import flops_per_token
from mamba_jax.pods import hlo
from mamba_jax.pods.estimate import CORES, KERNELS, StepReport
from mamba_jax.run.out_of_memory import advice
from mamba_jax.sharding import make_mesh
from mamba_jax.sharding.config import MeshConfig
from mamba_jax.training.config import ProgramConfig
from mamba_jax.training.program import TrainProgram
from pallas_kernels.common import ahead_of_time

_COLLECTIVES = r"all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


def compile_step(config: ProgramConfig, mesh: MeshConfig, topology: str, *, num_slices: int = 1) -> StepReport:
    """Compiles the training step for every device of a TPU topology such as "v5e:16x16", or of several of them.

    Args:
        config: what the step depends on.
        mesh: how the devices are arranged.
        topology: generation and chips along the axes of a slice.
        num_slices: slices of that shape, joined by the data-centre network.

    Raises:
        InputError: the topology is not known, the config does not fit it, or the step not into the devices' memory.
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
    return _report(program, devices, num_slices, compiled)


def print_report(config: ExperimentConfig, topology: str | None, num_slices: str) -> int:
    """What `train.py --compile-only` does; returns its exit status.

    Args:
        config: of the run.
        topology: as given; None if it was not.
        num_slices: as given.

    Raises:
        InputError: as `compile_step`, or there is no topology or number.
    """
    if topology is None:
        raise InputError("--compile-only needs --topology, such as --topology v5e:4x4")
    if not num_slices.isdecimal():
        raise InputError(f"--num-slices {num_slices} is not a whole number from 1 on")
    jax.config.update("jax_platforms", "cpu")
    print_result("\n".join(compile_step(config.program, config.mesh, topology, num_slices=int(num_slices)).lines()))
    return 0


def _report(
    program: TrainProgram, devices: Sequence[jax.Device], num_slices: int, compiled: jax.stages.Compiled
) -> StepReport:
    config, state = program.config, program.state
    memory = compiled.memory_analysis()
    assert memory is not None, "the TPU compiler reports memory"
    parameters, optimizer = (_shard_bytes(tree) for tree in (state.params, state.opt_state))
    counts = count_instructions(compiled.as_text() or "", num_slices)
    cores = CORES.get(devices[0].device_kind)
    tokens = config.global_batch * config.seq_len / len(devices)
    return StepReport(
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
        kernels={name: counts.calls[name] for name in counts.kernel_elements},
        flops=tokens * flops_per_token(config.model, length=config.seq_len),
        operation_seconds=None if cores is None else counts.cycles / cores.clock_hz,
        kernel_seconds=None if cores is None else cores.kernel_seconds(counts.kernel_elements),
    )


class Counts:
    """What a device does in a step.

    Attributes:
        cycles: the compiler's estimate for XLA's operations.
        calls: of collectives and Pallas kernels, by kind.
        arrived: bytes by kind of collective.
        collective_lines: their instructions.
        transfers: between slices, by kind.
        received: bytes from other slices by kind.
        kernel_elements: tokens times channels by kernel.
    """

    def __init__(self) -> None:
        self.cycles = 0.0
        self.calls: collections.Counter[str] = collections.Counter()
        self.arrived: collections.Counter[str] = collections.Counter()
        self.collective_lines: list[str] = []
        self.transfers: collections.Counter[str] = collections.Counter()
        self.received: collections.Counter[str] = collections.Counter()
        self.kernel_elements: collections.Counter[str] = collections.Counter()


def count_instructions(text: str, num_slices: int) -> Counts:
    """Counts what a device does in a compiled program.

    Args:
        text: from `Compiled.as_text`.
        num_slices: that the program runs on.
    """
    counts = Counts()
    _count_collectives(counts, text)
    operand_types = dict(re.findall(r"%([\w.\-]+) = (\w+\[[\d,]*\])", text))
    for line, times in hlo.compiled_instructions(text):
        if estimate := re.search(r'"estimated_cycles":"(\d+)"', line):
            counts.cycles += times * int(estimate[1])
        if found := re.search(r' = \((.*?), u32\[\].*? recv\(.*_xla_megascale_transfer_type="(\w+)"', line):
            kind = found[2].lower().replace("_", "-")
            # Of a sum, a device needs its part from every other slice, and the other parts' sums.
            share = 2 * (num_slices - 1) / num_slices if kind == "all-reduce" else 1
            counts.transfers[kind] += times
            counts.received[kind] += times * round(share * _type_bytes(found[1]))
        if found := re.search(rf"%({'|'.join(KERNELS)})[.\w]* = \(?(.*?) custom-call\((.*?)\)", line):
            counts.calls[found[1]] += times
            types = [found[2], *(operand_types.get(name, "") for name in re.findall(r"%([\w.\-]+)", found[3]))]
            # What has three dimensions is a sequence: (batch, length, channels).
            sequence = next(sizes for type_ in types for sizes in re.findall(r"\[(\d+,\d+,\d+)\]", type_))
            counts.kernel_elements[found[1]] += times * math.prod(int(size) for size in sequence.split(","))
    return counts


def _count_collectives(counts: Counts, text: str) -> None:
    alone = (("", line, times) for line, times in hlo.compiled_instructions(text))
    seen = set()
    for fusion, line, times in itertools.chain(alone, hlo.fused_instructions(text)):
        found = re.search(rf" = (.*?) ({_COLLECTIVES})(-done)?\(", line)
        channel = re.search(r"channel_id=(\d+)", line)
        # One that goes on beside other work is repeated in each of the fusions that it accompanies.
        if found is None or (channel is not None and fusion and (channel[1], times) in seen):
            continue
        if channel is not None:
            seen.add((channel[1], times))
        # A sum of which a device keeps its part is a fusion of the sum and the choice of the part.
        kind, whole = (found[2], 1) if not fusion.startswith("all-reduce-scatter") else ("reduce-scatter", 1 / 2)
        counts.calls[kind] += times
        counts.arrived[kind] += times * round(whole * _arriving_bytes(found[2], found[1], line))
        counts.collective_lines.append(line.strip())


def _shard_bytes(tree) -> int:
    """Bytes of a device's part of a tree of arrays, without the padding of its layout."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _type_bytes(result: str) -> int:
    """Bytes of the arrays in the type of an instruction's result."""
    return sum(
        (8 if dtype == "pred" else int(bits)) // 8 * math.prod(int(dim) for dim in dims.split(",") if dim)
        for dtype, bits, dims in re.findall(r"([a-z]+(\d*)\w*)\[([\d,]*)\]", result)
    )


def _arriving_bytes(kind: str, result: str, line: str) -> int:
    """Bytes that a device receives in a collective with a result of the given type, at the least."""
    size = _type_bytes(result)
    if kind == "reduce-scatter":
        return size * _group_size(line)
    return 2 * size if kind == "all-reduce" else size


def _group_size(line: str) -> int:
    """Devices that take part in a collective together."""
    if axes := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", axes[2]))
    if shape := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(shape[1])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    return 1 if listed is None else listed[1].count(",") + 1
