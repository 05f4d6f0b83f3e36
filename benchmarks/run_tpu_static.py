"""What the TPU compiler's own schedule says about the ops, and writes a table; needs libtpu and no TPU.

    python benchmarks/run_tpu_static.py
    python benchmarks/run_tpu_static.py --ops selective_scan --chips v5e v4 --variants

The compiler issues a bundle of instructions a cycle and says what slots it fills. A kernel's cycles are its bundles,
times the passes of their loops; memory is bounded by its bytes. XLA's operations carry an estimate of their cycles.
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import functools
import importlib.metadata
import math
import multiprocessing
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"

import jax
import jax.numpy as jnp

import pallas_kernels
from mamba_jax.chips import CHIPS
from mamba_jax.pods.hlo import compiled_instructions
from pallas_kernels.causal_conv1d.pallas_tpu import geometry as convolution
from pallas_kernels.common.ahead_of_time import compile_for, tpu_devices
from pallas_kernels.common.tpu_tiles import LANES, SPAN
from pallas_kernels.selective_scan.arguments import ScanArguments
from pallas_kernels.selective_scan.pallas_tpu import op as pallas_tpu
from pallas_kernels.selective_scan.pallas_tpu.tilings import Generation, choose_geometry, generation

MEGABYTE = 1e6
DIRECTIONS = ("forward", "backward")
SHAPES = dict.fromkeys(
    ("selective_scan", "selective_scan_final_state", "selective_scan_initial_cotangent"), "8x2048x1536x16"
) | {"causal_conv1d": "8x2048x1536x4", "selective_state_update": "128x1536x16"}
# Arguments in float32; the others are in bfloat16.
WIDE = ("A", "D", "dt_bias", "weight", "bias", "state")
# Passes of an op and the names of their kernels.
KERNELS = {
    "selective_scan": {direction: f"selective_scan_pallas_tpu_{direction}" for direction in DIRECTIONS},
    "selective_scan_final_state": {"forward": "selective_scan_pallas_tpu_edge"},
    "selective_scan_initial_cotangent": {"backward": "selective_scan_pallas_tpu_edge"},
    "causal_conv1d": {direction: f"causal_conv1d_pallas_tpu_{direction}" for direction in DIRECTIONS},
}


# Topologies of one chip, and the kind of its device.
TOPOLOGIES = {"v4": ("v4:1x1x1", "TPU v4"), "v5e": ("v5e:1x1", "TPU v5 lite"), "v5p": ("v5p:1x1x1", "TPU v5")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """The bundles of a loop that are not in an inner loop.

    Attributes:
        depth: 0 outside of all loops.
        bundles: how many.
        slots: filled, by unit.
    """

    depth: int
    bundles: int
    slots: dict[str, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """A kernel's loops in the order of the program, and the slots of a bundle by unit."""

    capacity: dict[str, int]
    loops: tuple[Loop, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What a compiled program tells.

    Attributes:
        kernels: schedules by pass.
        other_cycles: of everything that XLA generated.
        temporaries: bytes.
    """

    kernels: dict[str, Schedule]
    other_cycles: float
    temporaries: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What a kernel runs through.

    Attributes:
        steps: of its grid.
        spans: of tokens in a step.
        size: tokens times channels, in units of 1024.
        memory: bytes that it reads and writes; the last axis of an array takes whole registers.
        last_loop: how often the last loop runs, by step and span; 1 unless it is for the last block only.
    """

    steps: int
    spans: int
    size: float
    memory: int
    last_loop: float = 1.0


def scan_work(op: str, shape: tuple[int, ...], chip: Generation) -> dict[str, Work]:
    """The kernels of the selective scan and of its edge states."""
    batch, length, channels, states = shape
    sizes = {"batch": batch, "length": length, "groups": 1, "channels": channels, "states": states}
    geometry = choose_geometry(chip, **sizes)
    arrays = {
        "selective_scan_final_state": {"forward": {"sequence": 2, "matrices": 1, "state": 1}},
        "selective_scan_initial_cotangent": {"backward": {"sequence": 3, "matrices": 1, "state": 1}},
    }.get(op) or {
        "forward": {"sequence": 4, "matrices": 1, "checkpoints": 1, "state": 1},
        "backward": {"sequence": 7, "matrices": 1, "checkpoints": 1, "dmatrices": 1, "state": 3},
    }
    return {
        direction: Work(
            steps=math.prod(geometry.grid),
            spans=geometry.tiling.tokens // SPAN,
            size=batch * length * channels / 1024,
            memory=sum(
                count * array_bytes(geometry.shape(kind), 2 if kind in ("sequence", "matrices") else 4)
                for kind, count in kinds.items()
            ),
            last_loop=1 / geometry.blocks if op == "selective_scan" and direction == "backward" else 1.0,
        )
        for direction, kinds in arrays.items()
    }


def convolution_work(shape: tuple[int, ...]) -> dict[str, Work]:
    """The kernels of the convolution."""
    batch, length, channels, width = shape
    geometry = convolution.choose_geometry(batch=batch, length=length, channels=channels, width=width)
    return {
        direction: Work(
            steps=math.prod(geometry.grid),
            spans=geometry.spans,
            size=batch * length * channels / 1024,
            memory=sequences * array_bytes(geometry.shape("sequence"), 2),
        )
        for direction, sequences in zip(DIRECTIONS, (2, 3), strict=True)
    }


def array_bytes(shape: tuple[int, ...], item: int) -> int:
    """Bytes of an array."""
    *leading, last = shape
    return math.prod(leading) * -(-last // LANES) * LANES * item


def program_of(op: str, shape: tuple[int, ...], implementation: str, chip: Generation) -> tuple[Callable, tuple]:
    """Forward + backward of an op, or the state update, and the shapes of its arguments."""
    *leading, channels, last = shape
    sizes = {"B": leading[0], "L": leading[-1], "E": channels, "N": last, "K": last, "G": 1}
    arrays = {
        name: jax.ShapeDtypeStruct(
            [sizes[letter] for letter in layouts[0]], jnp.float32 if name in WIDE else jnp.bfloat16
        )
        for name, layouts in pallas_kernels.TABLES[op].arguments.items()
        if name not in ("initial_state", "initial_window", "segment_ids")
    }
    options = {"activation": "silu"} if op == "causal_conv1d" else {"dt_softplus": True}
    run = functools.partial(getattr(pallas_kernels, op), **options, implementation=implementation)
    if op == "selective_scan" and implementation == "pallas_tpu":

        def run(**arrays):
            return pallas_tpu.selective_scan(ScanArguments.of(**arrays, **options), chip=chip)

    if op not in ("causal_conv1d", "selective_scan"):
        return lambda arrays: run(**arrays), (arrays,)

    def both(arrays, cotangent):
        y, vjp = jax.vjp(lambda arrays: run(**arrays).y, arrays)
        return y, vjp(cotangent)

    return both, (arrays, arrays["x"])


def compile_program(op: str, chip: str, shape: tuple[int, ...], implementation: str, variant: str, folder: str) -> int:
    """Compiles in this process, which dumps schedules; returns the bytes of temporaries."""
    device = tpu_devices(TOPOLOGIES[chip][0])[0]
    function, args = program_of(op, shape, implementation, varied(generation(device.device_kind), variant))
    compiled = compile_for(device, function, *args)
    Path(folder, "program.txt").write_text(compiled.as_text() or "")
    memory = compiled.memory_analysis()
    assert memory is not None, "the TPU compiler reports memory"
    return memory.temp_size_in_bytes


def varied(chip: Generation, variant: str) -> Generation:
    """Another size of blocks, given as tiles x tokens; none if empty."""
    sizes = dict(zip(("tiles", "tokens"), map(int, variant.split("x")), strict=True)) if variant else {}
    return dataclasses.replace(chip, **sizes)


def measure(op: str, chip: str, shape: tuple[int, ...], implementation: str, variant: str = "") -> Program:
    """Compiles in a process of its own, because the library takes its options when it is loaded."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as process:
            job = process.submit(compile_program, op, chip, shape, implementation, variant, folder)
            temporaries = job.result()
        kernels = {}
        if implementation == "pallas_tpu":
            kernels = {direction: read_schedule(Path(folder), name) for direction, name in KERNELS[op].items()}
        other = cycles_of_xla(Path(folder, "program.txt").read_text())
    return Program(kernels=kernels, other_cycles=other, temporaries=temporaries)


def read_schedule(folder: Path, kernel: str) -> Schedule:
    """A kernel's loops from the compiler's final bundles and their use of slots, which are listed in the same order."""
    listing = next(path for path in folder.iterdir() if re.search(rf"{kernel}.*-\d+-final_bundles\.txt$", path.name))
    use = next(
        path
        for path in folder.iterdir()
        if kernel in path.name and path.name.endswith("-final_hlo-static-per-bundle-utilization.txt")
    )
    _, names, capacity, _, *rows = use.read_text().splitlines()
    units = [name.strip() for name in names.split(",")]
    slots = [[*map(int, row.split())] for row in rows if row.strip()]
    bundles = re.findall(
        r"^\s*(?:0x[0-9a-f]+|0)\s+(?:([A-Z]{2})\s*)?:\s*((?:> ?)*)\{", listing.read_text(), re.MULTILINE
    )
    assert len(bundles) == len(slots), f"{kernel}: {len(bundles)} bundles, {len(slots)} rows of slots"
    depths = [nesting.count(">") for _, nesting in bundles]
    # The listing shows a few bundles of a loop as if they were outside; a real return would begin with a label.
    for i in range(1, len(depths)):
        back = next((k for k in range(i, min(i + 16, len(depths))) if depths[k] >= depths[i - 1]), i)
        if not bundles[back][0]:
            depths[i] = max(depths[i], min(depths[i - 1], depths[back]))
    loop_of: list[int] = []
    loops: list[int] = [0]
    stack = [0]
    for (label, _), depth in zip(bundles, depths, strict=True):
        while depth < loops[stack[-1]]:
            stack.pop()
        if label == "LB" and depth >= loops[stack[-1]] and depth > 0:
            if depth == loops[stack[-1]]:
                stack.pop()
            loops.append(depth)
            stack.append(len(loops) - 1)
        loop_of.append(stack[-1])
    return Schedule(
        capacity=dict(zip(units, map(int, capacity.split()), strict=True)),
        loops=tuple(
            Loop(
                depth=depth,
                bundles=loop_of.count(number),
                slots={
                    unit: sum(slots[i][k] for i, owner in enumerate(loop_of) if owner == number)
                    for k, unit in enumerate(units)
                },
            )
            for number, depth in enumerate(loops)
        ),
    )


def cycles_of_xla(text: str) -> float:
    """The compiler's estimates for all operations but kernels."""
    found = ((re.search(r'"estimated_cycles":"(\d+)"', line), times) for line, times in compiled_instructions(text))
    return sum(times * int(estimate[1]) for estimate, times in found if estimate)


def passes(work: Work, schedule: Schedule, cores: int) -> list[float]:
    """How often each loop's bundles run in a core: once, for every step of the grid, for every span of tokens."""
    steps = work.steps / cores
    counts = [1.0 if loop.depth == 0 else steps if loop.depth == 1 else steps * work.spans for loop in schedule.loops]
    return [*counts[:-1], counts[-1] * work.last_loop]


def kernel_rows(chip: str, program: Program, works: dict[str, Work], label: str) -> list[str]:
    """A line for every kernel, and one for everything together."""
    figures = CHIPS[TOPOLOGIES[chip][1]]
    cores, bandwidth = figures.cores, figures.memory_bytes_per_second
    assert cores is not None, chip
    assert bandwidth is not None, chip
    lines, total = [], program.other_cycles
    for direction, schedule in program.kernels.items():
        work = works[direction]
        counts = passes(work, schedule, cores.number)
        cycles = sum(loop.bundles * count for loop, count in zip(schedule.loops, counts, strict=True))
        unit = {
            name: sum(loop.slots[name] * count for loop, count in zip(schedule.loops, counts, strict=True)) / slots
            for name, slots in schedule.capacity.items()
        }
        memory = work.memory / bandwidth * cores.clock_hz
        bound = max(unit["VALU"], unit["EUP"], memory)
        total += max(cycles, memory)
        cells = [label, direction, f"{cycles / 1e6:.3f}", f"{cycles * cores.number / work.size:.1f}"]
        cells += [f"{unit[name] / 1e6:.3f}" for name in ("VALU", "EUP", "VSTORE", "VLOAD", "XLU")]
        cells += [f"{memory / 1e6:.3f}", f"{max(cycles, memory) / bound:.2f}"]
        cells += [f"{1e3 * max(cycles, memory) / cores.clock_hz:.2f}", ""]
        lines.append("| " + " | ".join(cells) + " |")
    cells = [label, "everything", f"{total / 1e6:.3f}", *[""] * 8]
    cells += [f"{1e3 * total / cores.clock_hz:.2f}", f"{program.temporaries / MEGABYTE:.0f}"]
    return [*lines, "| " + " | ".join(cells) + " |"]


def table(op: str, chip: str, variants: Sequence[str], implementations: Sequence[str]) -> Iterator[str]:
    """Markdown lines for one op and chip, as the compiler is done with them."""
    shape = tuple(map(int, SHAPES[op].split("x")))
    columns = ["implementation", "pass", "Mcycles", "a step", "VALU", "EUP", "stores", "loads", "XLU", "memory"]
    columns += ["over bound", "ms", "temporaries MB"]
    yield from (f"## {op} {SHAPES[op]}, {chip}", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns))
    entry = generation(TOPOLOGIES[chip][1])
    tried = ("", *variants) if op == "selective_scan" else ("",)
    for variant in tried if op in KERNELS and "pallas_tpu" in implementations else ():
        changed = varied(entry, variant)
        works = convolution_work(shape) if op == "causal_conv1d" else scan_work(op, shape, changed)
        label = "pallas_tpu"
        if op == "selective_scan":
            label += f", up to {changed.tiles} tiles, {changed.tokens} tokens{'' if variant else ' (chosen)'}"
        yield from kernel_rows(chip, measure(op, chip, shape, "pallas_tpu", variant), works, label)
    if "xla" in implementations:
        yield from kernel_rows(chip, measure(op, chip, shape, "xla"), {}, "xla")
    yield ""


def main() -> None:
    """Compiles everything and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--chips", nargs="+", default=["v5e", "v5p"], choices=TOPOLOGIES)
    parser.add_argument(
        "--variants", nargs="*", default=["12x64", "6x128", "4x128"], help="tiles x tokens, of the scan"
    )
    parser.add_argument("--implementations", nargs="+", default=["pallas_tpu", "xla"], choices=["pallas_tpu", "xla"])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    lines = [
        f"# Static schedules of the ops on TPUs, {datetime.date.today()}",
        "",
        f"`python {shlex.join(['benchmarks/run_tpu_static.py', *sys.argv[1:]])}`, jax {jax.__version__}, libtpu "
        f"{importlib.metadata.version('libtpu')}; nothing was run.",
        "",
        "Sizes are batch x length x channels x states or width (of the update: batch x channels x states); sequences "
        "are bfloat16; D, z, dt_bias, softplus; bias and SiLU. Forward + backward; of the state update forward only; "
        "the edge states (final state, initial cotangent) are one pass each. "
        "The scan's forward kernel writes the states that its backward kernel starts from.",
        "",
        "Mcycles: millions of cycles of a core. A step: cycles for a token and 1024 channels. Then what the vector "
        "unit, the exponential unit, stores, loads, exchanges between lanes and the memory would take by themselves. "
        "Over bound: the larger of schedule and memory, over the largest of vector unit, exponential unit and memory.",
        "",
    ]
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"tpu_static_{datetime.date.today()}.md"
    for op in options.ops:
        for chip in options.chips:
            # The compiler takes minutes for XLA's loop over a scan: what is known is shown and kept at once.
            for line in table(op, chip, options.variants, options.implementations):
                print(line, flush=True)
                lines.append(line)
                path.write_text("\n".join(lines))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
