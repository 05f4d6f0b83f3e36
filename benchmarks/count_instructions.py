"""Counts the machine instructions of the selective scan's GPU kernels and what they would cost by themselves.

    python benchmarks/count_instructions.py
    python benchmarks/count_instructions.py --shapes 8x2048x1536x16 --dtype float32

Needs the `cuda` extra and no GPU: the kernels are compiled for a described H100, assembled by ptxas and disassembled by
the nvdisasm that comes with Triton. A chunk of tokens is a loop in them, whose inner loops walk the groups of a chunk,
so instructions per state and token follow from the loops' lengths.
"""

import collections
import dataclasses
import importlib.util
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Literal

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["MOSAIC_GPU_DUMP_PTX"] = "1"

import jax

import harness
from bounds import H100, SPECIAL_A_CYCLE
from harness import Results, setting_here
from mamba_jax.cli import one_line_errors, parse
from mamba_jax.errors import InputError
from pallas_kernels import selective_scan
from pallas_kernels.common.ahead_of_time import compile_for, cuda_devices
from pallas_kernels.selective_scan.arg_specs import MANIFEST
from pallas_kernels.selective_scan.pallas_gpu.geometry import CHUNK, SPAN, Tiling
from pallas_kernels.selective_scan.pallas_gpu.tilings import choose_tilings

SHAPES = ("8x2048x1536x16", "8x2048x5120x16", "1x2048x2048x16", "1x131072x2048x16", "64x512x1536x16")
TARGET = Path(__file__).parent / "targets" / "h100_sxm.txtpb"
# Instructions that a multiprocessor issues in a cycle, and threads that each of them is for.
ISSUED_A_CYCLE, LANES = 4, 32
PIPES = {
    "FFMA": "float",
    "FMUL": "float",
    "FADD": "float",
    "MUFU": "exponential",
    "LDS": "shared",
    "STS": "shared",
    "SHFL": "shared",
    "LDG": "global",
    "STG": "global",
}
PIPE_NAMES = ("all", "float", "exponential", "shared", "global", "other")
NOTE = (
    "Instructions and memory cycles (shared memory, shuffles, L1) are per state and token, in a warp; times in ms are "
    f"for {H100.number} multiprocessors at {H100.clock_hz / 1e9:.2f} GHz if nothing else took time. Those of the parts "
    "are for the whole sequence."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What a kernel executes for one state and token, in a lane.

    Attributes:
        instructions: by pipe, and "all".
        memory_cycles: of the unit that serves shared memory, shuffles and the L1 cache: a cycle moves 128 bytes.
        registers: a thread.
    """

    instructions: dict[str, float]
    memory_cycles: float
    registers: int


def tool(name: str) -> str:
    """Path of a program of the CUDA toolkit among the installed packages.

    Raises:
        InputError: it is not there.
    """
    for package, folder in (("nvidia.cu13", "bin"), ("triton", "backends/nvidia/bin")):
        spec = importlib.util.find_spec(package)
        for place in spec.submodule_search_locations or () if spec else ():
            if (path := Path(place) / folder / name).exists():
                return str(path)
    raise InputError(f"{name} is not installed; install the cuda extra")


def compile_kernels(shape: tuple[int, ...], dtype: str, folder: Path) -> dict[str, Path]:
    """Compiles forward + backward for the described GPU; returns the kernels' PTX by kernel."""
    os.environ["MOSAIC_GPU_DUMP_TO"] = str(folder)
    batch, length, channels, states = shape
    sequence, matrix = (batch, length, channels), (batch, length, states)

    def array(sizes, dtype=dtype):
        return jax.ShapeDtypeStruct(sizes, dtype)

    arrays = {name: array(sequence) for name in ("x", "dt", "z")} | {name: array(matrix) for name in ("B", "C")}
    arrays |= {"A": array((channels, states), "float32")}
    arrays |= {name: array((channels,), "float32") for name in ("D", "dt_bias")}

    def program(arrays, cotangent):
        y, vjp = jax.vjp(lambda a: selective_scan(**a, dt_softplus=True, implementation="pallas_gpu").y, arrays)
        return y, vjp(cotangent)

    compile_for(cuda_devices(TARGET)[0], program, arrays, arrays["x"])
    kernels = {}
    # Parts are compiled twice; those of the backward pass take more arguments.
    for path in sorted(folder.glob("*.ptx"), key=lambda path: path.read_text().count(".param")):
        name = re.sub(r"_\d+$", "", path.stem).removeprefix("pallas_gpu_")
        kernels[f"{name} (backward)" if name in kernels else name] = path
    return kernels


def disassemble(ptx: Path) -> tuple[list[str], dict[str, int], int]:
    """Instructions in order, positions of labels, and registers a thread."""
    cubin = ptx.with_suffix(".cubin")
    command = [tool("ptxas"), "-v", "-arch=sm_90a", str(ptx), "-o", str(cubin)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", report)
    assert registers, f"ptxas reports no registers: {report}"
    command = [tool("nvdisasm"), "-c", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    instructions: list[str] = []
    labels = {}
    for line in map(str.strip, text.splitlines()):
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?);", line):
            instructions.append(instruction[1])
    return instructions, labels, int(registers[1])


def cost_of(ptx: Path, tiling: Tiling) -> Cost:
    """Cost by the longest loop, which walks the chunks; the loops in it walk the groups of a chunk."""
    instructions, labels, registers = disassemble(ptx)
    loops = []
    for end, instruction in enumerate(instructions):
        target = re.search(r"BRA.*?(\.L_x_\d+)", instruction)
        if target and labels.get(target[1], end) < end:
            loops.append((labels[target[1]], end + 1))
    start, stop = max(loops, key=lambda loop: loop[1] - loop[0])
    times = [1] * len(instructions)
    for first, last in set(loops):
        if start < first and last < stop:
            times[first:last] = [CHUNK // SPAN] * (last - first)
    work = tiling.states_per_lane * tiling.rows * CHUNK
    counts: collections.Counter[str] = collections.Counter()
    cycles = 0
    for instruction, count in zip(instructions[start:stop], times[start:stop], strict=True):
        opcode = instruction.split()[0]
        pipe = PIPES.get(opcode.split(".")[0], "other")
        counts[pipe] += count
        counts["all"] += count
        if pipe in ("shared", "global"):
            cycles += count * (4 if ".128" in opcode else 2 if ".64" in opcode else 1)
    return Cost(
        instructions={pipe: count / work for pipe, count in counts.items()},
        memory_cycles=cycles / work,
        registers=registers,
    )


def bounds(cost: Cost, shape: tuple[int, ...]) -> dict[str, float]:
    """Milliseconds that the whole chip needs for one kind of work alone, at one state and token a lane."""
    batch, length, channels, states = shape
    warps = batch * length * channels * states / LANES
    seconds = 1 / (H100.number * H100.clock_hz)
    return {
        "issue": 1e3 * warps * cost.instructions["all"] / ISSUED_A_CYCLE * seconds,
        "exponential": 1e3 * warps * cost.instructions["exponential"] * LANES / SPECIAL_A_CYCLE * seconds,
        "memory": 1e3 * warps * cost.memory_cycles * seconds,
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to count.

    Attributes:
        shapes: batch x length x channels x states.
        dtype: of the sequences.
        output: folder of the results.
    """

    shapes: tuple[str, ...] = SHAPES
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    output: Path = harness.RESULTS


def main() -> None:
    """Command-line entry."""
    with one_line_errors():
        options = parse(Options, prog="benchmarks/count_instructions.py")
        try:
            specs = [MANIFEST.workload_of(text) for text in options.shapes]
        except ValueError as error:
            raise InputError(f"--shapes: {error}") from None
        os.environ["PATH"] = f"{Path(tool('nvdisasm')).parent}:{os.environ['PATH']}"
        results = Results(options.output, setting_here("sm_90a, compiled for and not run"))
        for text, spec in zip(options.shapes, specs, strict=True):
            shape = tuple(getattr(spec, name) for name in MANIFEST.sizes)
            forward, backward = choose_tilings(*shape)
            with tempfile.TemporaryDirectory() as folder:
                for name, ptx in compile_kernels(shape, options.dtype, Path(folder)).items():
                    tiling = backward if "backward" in name else forward
                    cost = cost_of(ptx, tiling)
                    figures = {pipe: cost.instructions.get(pipe, 0.0) for pipe in PIPE_NAMES}
                    figures |= {"memory_cycles": cost.memory_cycles, "registers": cost.registers}
                    figures |= {f"{unit}_ms": time for unit, time in bounds(cost, shape).items()}
                    sizes = f"{tiling.lanes_per_channel} lanes, {tiling.rows} rows, {tiling.parts} parts"
                    results.add(
                        "selective_scan instructions",
                        f"{text} {options.dtype}",
                        implementation=sizes,
                        direction=name,
                        **figures,
                    )
        title = "Instructions of the selective scan's GPU kernels"
        print(f"wrote {results.write_table('scan_instructions', title, NOTE)}")


if __name__ == "__main__":
    main()
