"""What the TPU compiler's own schedule says about the ops; needs libtpu and no TPU.

    python benchmarks/run_tpu_static.py
    python benchmarks/run_tpu_static.py --ops selective_scan --chips v5e v4 --variants

The compiler issues a bundle of instructions a cycle and says what slots it fills. A kernel's cycles are its bundles,
times the passes of their loops; memory is bounded by its bytes. XLA's operations carry an estimate of their cycles.
"""

import concurrent.futures
import dataclasses
import functools
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"

import jax
import jax.numpy as jnp

import harness
import pallas_kernels
from harness import Results, setting_here
from mamba_jax import chips
from mamba_jax.cli import one_line_errors, parse
from mamba_jax.pods.hlo import compiled_instructions, estimated_cycles
from pallas_kernels.common.ahead_of_time import compile_for, tpu_devices
from pallas_kernels.manifests import MANIFESTS
from pallas_kernels.selective_scan.arguments import ScanArguments
from pallas_kernels.selective_scan.pallas_tpu import op as pallas_tpu
from pallas_kernels.selective_scan.pallas_tpu.tilings import Generation, generation
from tpu_schedules import DIRECTIONS, Schedule, Work, read_schedule, works_of

MEGABYTE = 1e6
# Names of units in the table and in the compiler's listing.
UNITS = {"VALU": "VALU", "EUP": "EUP", "stores": "VSTORE", "loads": "VLOAD", "XLU": "XLU", "MXU": "MATMUL"}
OpName = Literal[
    "selective_scan",
    "selective_scan_final_state",
    "selective_scan_initial_cotangent",
    "causal_conv1d",
    "selective_state_update",
    "ssd",
]
WORKLOAD = "mamba_130m"


def _shape(op: OpName) -> str:
    """Sizes of the workload of an op; the edge states have those of the scan."""
    if op == "ssd":
        return "4x2048x24x64x128"
    manifest = MANIFESTS.get(op, MANIFESTS["selective_scan"])
    return manifest.shape_text(manifest.workload(WORKLOAD))


SHAPES: dict[OpName, str] = {op: _shape(op) for op in get_args(OpName)}
# Arguments in float32; the others are in bfloat16.
WIDE = ("A", "D", "dt_bias", "weight", "bias", "state")
# Passes of an op and the names of their kernels.
KERNELS = {
    "selective_scan": {direction: f"selective_scan_pallas_tpu_{direction}" for direction in DIRECTIONS},
    "selective_scan_final_state": {"forward": "selective_scan_pallas_tpu_edge"},
    "selective_scan_initial_cotangent": {"backward": "selective_scan_pallas_tpu_edge"},
    "causal_conv1d": {direction: f"causal_conv1d_pallas_tpu_{direction}" for direction in DIRECTIONS},
    "ssd": {direction: f"ssd_pallas_tpu_{direction}" for direction in DIRECTIONS},
}
NOTES = (
    "Sizes are batch x length x channels x states or width (of the update: batch x channels x states; of `ssd` batch x "
    "length x heads x channels of a head x states, in one group); sequences are "
    "bfloat16; D, z, dt_bias, softplus; bias and SiLU. Forward + backward; of the state update forward only; the edge "
    "states (final state, initial cotangent) are one pass each. The scan's forward kernel writes the states that its "
    "backward kernel starts from, and so does that of `ssd`. Nothing was run.",
    "Mcycles: millions of cycles of a core. A step: cycles for a token and 1024 channels. Then what the vector unit, "
    "the exponential unit, stores, loads, exchanges between lanes, matrix products and the memory would take by "
    "themselves. Over bound: the larger of schedule and memory, over the largest of vector unit, exponential unit, "
    "matrix products and memory.",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to compile.

    Attributes:
        ops: their names.
        chips: generations.
        implementations: the kernels, XLA's form, or both; the compiler takes minutes for XLA's loop over a scan.
        variants: other blocks of the scan, tiles x tokens.
        output: folder of the results.
    """

    ops: tuple[OpName, ...] = tuple(SHAPES)
    chips: tuple[Literal["v4", "v5e", "v5p"], ...] = ("v5e", "v5p")
    implementations: tuple[Literal["pallas_tpu", "xla"], ...] = ("pallas_tpu", "xla")
    variants: tuple[str, ...] = ("12x64", "6x128", "4x128")
    output: Path = harness.RESULTS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """What to compile for.

    Attributes:
        topology: of one chip.
        kind: as JAX calls it.
    """

    topology: str
    kind: str

    @property
    def cores(self) -> chips.Cores:
        """Their number and clock."""
        cores = chips.CHIPS[self.kind].cores
        assert cores is not None, self.kind
        return cores


CHIPS = {
    "v4": Chip(topology="v4:1x1x1", kind="TPU v4"),
    "v5e": Chip(topology="v5e:1x1", kind="TPU v5 lite"),
    "v5p": Chip(topology="v5p:1x1x1", kind="TPU v5"),
}


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


def program_of(op: str, shape: tuple[int, ...], implementation: str, chip: Generation) -> tuple[Callable, tuple]:
    """Forward + backward of an op, or the state update, and the shapes of its arguments."""
    if op == "ssd":
        return ssd_program(shape, implementation)
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


def ssd_program(shape: tuple[int, ...], implementation: str) -> tuple[Callable, tuple]:
    """Forward + backward of `ssd` on sequences as a convolution leaves them: heads, or groups, side by side."""
    batch, length, heads, width, states = shape
    sequences = {"x": heads * width, "dt": heads, "B": states, "C": states}
    arrays = {name: jax.ShapeDtypeStruct((batch, length, size), jnp.bfloat16) for name, size in sequences.items()}
    arrays |= {name: jax.ShapeDtypeStruct((heads,), jnp.float32) for name in ("A", "D", "dt_bias")}

    def run(arrays):
        inputs = arrays | {"x": arrays["x"].reshape(batch, length, heads, width)}
        inputs |= {name: arrays[name][:, :, None] for name in ("B", "C")}
        return pallas_kernels.ssd(**inputs, dt_softplus=True, implementation=implementation).y.reshape(
            batch, length, -1
        )

    def both(arrays, cotangent):
        y, vjp = jax.vjp(run, arrays)
        return y, vjp(cotangent)

    return both, (arrays, arrays["x"])


def compile_program(op: str, chip: str, shape: tuple[int, ...], implementation: str, variant: str, folder: str) -> int:
    """Compiles in this process, which dumps schedules; returns the bytes of temporaries."""
    device = tpu_devices(CHIPS[chip].topology)[0]
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


def cycles_of_xla(text: str) -> float:
    """The compiler's estimates for all operations but kernels."""
    return sum(times * estimated_cycles(line) for line, times in compiled_instructions(text))


def passes(work: Work, schedule: Schedule, cores: int) -> list[float]:
    """How often each loop's bundles run in a core: once, for every step of the grid, for every span of tokens."""
    steps = work.steps / cores
    counts = [1.0 if loop.depth == 0 else steps if loop.depth == 1 else steps * work.spans for loop in schedule.loops]
    return [*counts[:-1], counts[-1] * work.last_loop]


def kernel_figures(chip: Chip, schedule: Schedule, work: Work) -> dict[str, float]:
    """What a kernel takes, on the whole and of every unit."""
    counts = passes(work, schedule, chip.cores.number)
    cycles = sum(loop.bundles * count for loop, count in zip(schedule.loops, counts, strict=True))
    unit = {
        name: sum(loop.slots[name] * count for loop, count in zip(schedule.loops, counts, strict=True)) / slots
        for name, slots in schedule.capacity.items()
    }
    bytes_per_second = chips.CHIPS[chip.kind].memory_bytes_per_second
    assert bytes_per_second is not None, chip.kind
    memory = work.memory / bytes_per_second * chip.cores.clock_hz
    least = max(unit["VALU"], unit["EUP"], unit["MATMUL"], memory)
    return {
        "milliseconds": 1e3 * max(cycles, memory) / chip.cores.clock_hz,
        "Mcycles": cycles / 1e6,
        "a_step": cycles * chip.cores.number / work.size,
        **{label: unit[name] / 1e6 for label, name in UNITS.items()},
        "memory": memory / 1e6,
        "over_bound": max(cycles, memory) / least,
    }


def add(
    results: Results, op: OpName, chip: Chip, implementation: str, program: Program, works: dict[str, Work]
) -> None:
    """Keeps a result for every kernel, and one for everything together."""
    keep = functools.partial(results.add, f"{op} schedule", f"{SHAPES[op]}, {chip.kind}", implementation=implementation)
    total = 1e3 * program.other_cycles / chip.cores.clock_hz
    for direction, schedule in program.kernels.items():
        figures: dict[str, Any] = kernel_figures(chip, schedule, works[direction])
        total += figures["milliseconds"]
        keep(direction=direction, **figures)
    everything = {
        "Mcycles": total * chip.cores.clock_hz / 1e9,
        "temporaries_MB": program.temporaries / MEGABYTE,
    }
    keep(direction="everything", milliseconds=total, **everything)


def compile_all(op: OpName, name: str, options: Options, results: Results) -> None:
    """An op on a chip: its kernels, other sizes of blocks, and XLA's form."""
    shape, chip = tuple(map(int, SHAPES[op].split("x"))), CHIPS[name]
    entry = generation(chip.kind)
    tried = ("", *options.variants) if op == "selective_scan" else ("",)
    for variant in tried if op in KERNELS and "pallas_tpu" in options.implementations else ():
        changed = varied(entry, variant)
        works = works_of(op, chip.kind, shape, changed)
        label = "pallas_tpu"
        if op == "selective_scan":
            label += f", up to {changed.tiles} tiles, {changed.tokens} tokens{'' if variant else ' (chosen)'}"
        add(results, op, chip, label, measure(op, name, shape, "pallas_tpu", variant), works)
    if "xla" in options.implementations:
        add(results, op, chip, "xla", measure(op, name, shape, "xla"), {})


def main() -> None:
    """Command-line entry."""
    with one_line_errors():
        options = parse(Options, prog="benchmarks/run_tpu_static.py")
        results = Results(options.output, setting_here("TPU compiler, nothing run", libraries=("libtpu",)))
        for op in options.ops:
            for chip in options.chips:
                compile_all(op, chip, options, results)
        print(f"wrote {results.write_table('tpu_static', 'Static schedules of the ops on TPUs', *NOTES)}")


if __name__ == "__main__":
    main()
