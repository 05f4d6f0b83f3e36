"""Times every implementation of the ops, forward and forward + backward, and writes a table.

    python benchmarks/run_ops.py
    python benchmarks/run_ops.py --op selective_scan --device gpu --shapes 8x2048x1536x16 --dtypes bfloat16
    python benchmarks/run_ops.py --op selective_scan --compile-for benchmarks/targets/h100_sxm.txtpb

The last form compiles for a GPU that need not be there, and reports memory only; it needs the `cuda` extra.
"""

import contextlib
import dataclasses
import datetime
import functools
import importlib.util
import math
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from mamba_jax.cli import one_line_errors, parse
from mamba_jax.errors import InputError
from pallas_kernels import (
    causal_conv1d,
    selective_scan,
    selective_scan_final_state,
    selective_scan_initial_cotangent,
    selective_state_update,
)
from pallas_kernels.common.ahead_of_time import cuda_devices, described, tracing_for
from pallas_kernels.common.arg_spec import DType

OpName = Literal["selective_scan", "causal_conv1d", "selective_state_update"]
SHAPE_MEANING: dict[OpName, str] = {
    "selective_scan": "batch x length x channels x states",
    "causal_conv1d": "batch x length x channels x width",
    "selective_state_update": "batch x channels x states",
}
DEFAULT_SHAPES: dict[str, dict[OpName, tuple[str, ...]]] = {
    "cpu": {
        "selective_scan": ("2x1024x512x16", "1x8192x256x16", "8x256x512x64"),
        "causal_conv1d": ("2x1024x512x4", "1x8192x256x4"),
        "selective_state_update": ("16x512x16",),
    },
    "gpu": {
        "selective_scan": (
            "8x2048x1536x16",
            "8x2048x5120x16",
            "1x2048x2048x16",
            "1x131072x2048x16",
            "64x512x1536x16",
        ),
        "causal_conv1d": ("8x2048x1536x4", "8x2048x5120x4"),
        "selective_state_update": ("128x1536x16", "128x5120x16", "1x1536x16"),
    },
}
MIB = 2**20
# Milliseconds of the authors' CUDA kernels (mamba-ssm 2.3.2.post1 and causal-conv1d, PyTorch) on an H100 80GB HBM3 with
# the same arguments: forward, and forward + backward. They are not measured here.
OFFICIAL_CUDA: dict[tuple[OpName, DType, tuple[int, ...]], tuple[float, float]] = {
    ("selective_scan", "bfloat16", (8, 2048, 1536, 16)): (0.485, 2.341),
    ("selective_scan", "bfloat16", (8, 2048, 2048, 16)): (0.641, 3.103),
    ("selective_scan", "bfloat16", (8, 2048, 5120, 16)): (1.504, 7.573),
    ("selective_scan", "float32", (8, 2048, 2048, 16)): (1.222, 4.003),
    ("selective_scan", "bfloat16", (1, 2048, 2048, 16)): (0.123, 0.736),
    ("selective_scan", "bfloat16", (1, 16384, 2048, 16)): (0.848, 3.707),
    ("selective_scan", "bfloat16", (1, 131072, 2048, 16)): (5.992, 28.79),
    ("selective_scan", "bfloat16", (4, 8192, 1536, 16)): (1.071, 4.843),
    ("selective_scan", "bfloat16", (64, 512, 1536, 16)): (0.872, 4.152),
    ("causal_conv1d", "bfloat16", (8, 2048, 1536, 4)): (0.126, 0.650),
    ("causal_conv1d", "bfloat16", (8, 2048, 5120, 4)): (0.210, 0.772),
}
# Above so many states over all tokens the unchunked form does not fit into a GPU's memory.
UNCHUNKED_ELEMENTS = 2**29
# An update takes less time than starting a program: on a GPU so many are timed in one loop.
UPDATES = 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure.

    Attributes:
        op: one op, or None for all.
        device: where to run.
        shapes: sizes joined by "x" (batch, length, channels, states or width; no length for the state update); empty
            takes a set that suits the device.
        dtypes: of the sequence arguments.
        compile_for: description of a GPU to compile for instead of running anything.
        seconds: time to spend on each measurement, at least three runs.
        output: folder for the table.
    """

    op: OpName | None = None
    device: Literal["cpu", "gpu", "tpu"] = "cpu"
    shapes: tuple[str, ...] = ()
    dtypes: tuple[DType, ...] = ("float32",)
    compile_for: Path | None = None
    seconds: float = 3.0
    output: Path = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """Cost of one compiled function; times are None if it was only compiled."""

    milliseconds: float | None
    cpu_milliseconds: float | None
    temporaries: int
    arguments_and_results: int


def unchunked_associative_scan(x, dt, A, B, C, *, D, z, dt_bias):
    """The textbook form: all decays and injections at once, differentiated by JAX."""
    f32 = jnp.float32
    dt = jax.nn.softplus(dt.astype(f32) + dt_bias[None, None])[..., None]
    decays = jnp.exp(dt * A[None, None])
    injections = dt * B.astype(f32)[:, :, None] * x.astype(f32)[..., None]

    def compose(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    states = jax.lax.associative_scan(compose, (decays, injections), axis=1)[1]
    y = jnp.sum(states * C.astype(f32)[:, :, None], axis=-1) + D[None, None] * x.astype(f32)
    return (y * jax.nn.silu(z.astype(f32))).astype(x.dtype)


def library_convolution(x, weight, bias):
    """The same convolution by XLA's own grouped convolution."""
    width, channels = weight.shape
    y = jax.lax.conv_general_dilated(
        x,
        weight[:, None].astype(x.dtype),
        window_strides=(1,),
        padding=[(width - 1, 0)],
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=channels,
    )
    return jax.nn.silu(y + bias.astype(x.dtype)[None, None])


def peer_scan(x, dt, A, B, C, *, D, z, dt_bias):
    """The scan of the package jax-linear-attention, which calls x v, B k and C q."""
    mamba1 = importlib.import_module("jla.ops.mosaic_gpu.mamba1").mamba1
    return mamba1(C, B, x, dt, A, d=D, z=z, dt_bias=dt_bias, dt_softplus=True)[0]


def edge_state(edge, implementation, *, x, dt, A, B, C, D, z, dt_bias):
    """The state at one edge of a sequence; for the cotangent x stands for that of y."""
    common = {"dt_bias": dt_bias, "dt_softplus": True, "implementation": implementation}
    if edge == "final state":
        return selective_scan_final_state(x, dt, A, B, **common)
    return selective_scan_initial_cotangent(x, dt, A, C, z=z, **common)


def chained_updates(*, state, x, dt, **others) -> jax.Array:
    """Updates that follow each other: each takes the state, x and dt from the one before."""

    def step(_, carry):
        state, x, dt = carry
        output = selective_state_update(state, x, dt, **others, dt_softplus=True, implementation="xla")
        return output.state, output.y, dt + output.y

    return jax.lax.fori_loop(0, UPDATES, step, (state, x, dt))[1]


def candidates(op: OpName, shape: tuple[int, ...], kind: str) -> dict[str, Callable]:
    """The functions to compare on a kind of device; each takes the op's arguments by name and returns y."""

    def through_api(function, names, **options) -> dict[str, Callable]:
        return {
            name: lambda name=name, **arguments: function(**arguments, **options, implementation=name).y
            for name in names
        }

    on_gpu = kind == "gpu"
    match op:
        case "selective_scan":
            names = ("pallas_gpu", "triton", "xla") if on_gpu else ("reference", "xla_sequential", "xla_associative")
            functions = through_api(selective_scan, names, dt_softplus=True) | {
                f"{names[0]}, {edge} alone": functools.partial(edge_state, edge, names[0])
                for edge in ("final state", "initial cotangent")
            }
            if not on_gpu or math.prod(shape) <= UNCHUNKED_ELEMENTS:
                functions["unchunked associative_scan"] = unchunked_associative_scan
            if on_gpu and importlib.util.find_spec("jla"):
                functions["jax-linear-attention"] = peer_scan
            return functions
        case "causal_conv1d":
            names = ("pallas_gpu", "xla") if on_gpu else ("reference", "xla")
            functions = through_api(causal_conv1d, names, activation="silu")
            return functions | {"lax.conv_general_dilated": library_convolution}
        case "selective_state_update":
            if on_gpu:
                return {"xla": chained_updates}
            return through_api(selective_state_update, ("reference", "xla"), dt_softplus=True)


def arguments(op: OpName, shape: tuple[int, ...], dtype: DType) -> dict[str, np.ndarray]:
    """Random arguments with everything that a Mamba block passes; dt = softplus of about -4, A about -e."""
    rng = np.random.default_rng(0)

    def wide(*sizes: int) -> np.ndarray:
        return rng.standard_normal(sizes, np.float32)

    def draw(*sizes: int) -> np.ndarray:
        return wide(*sizes).astype(jnp.dtype(dtype))

    *leading, channels, last = shape
    sequence = (*leading, channels)
    if op == "causal_conv1d":
        return {"x": draw(*sequence), "weight": wide(last, channels), "bias": wide(channels)}
    drawn = {"x": draw(*sequence), "dt": draw(*sequence) - np.asarray(4, jnp.dtype(dtype)), "z": draw(*sequence)}
    # The matrices of a single token have one group, (B, 1, N).
    matrix = (*leading, last) if len(leading) == 2 else (*leading, 1, last)
    drawn |= {"A": -np.exp(0.1 * wide(channels, last) + 1), "B": draw(*matrix), "C": draw(*matrix)}
    drawn |= {"D": wide(channels), "dt_bias": wide(channels)}
    if op == "selective_state_update":
        drawn["state"] = wide(*sequence, last)
    return drawn


def programs(function: Callable, arrays: dict) -> dict[str, tuple[Callable, tuple]]:
    """The forward pass, and the forward pass with the gradients of every argument."""

    def forward(arrays):
        return function(**arrays)

    def both(arrays, cotangent):
        y, vjp = jax.vjp(forward, arrays)
        return y, vjp(cotangent)[0]

    return {"forward": (forward, (arrays,)), "forward + backward": (both, (arrays, arrays["x"]))}


def measure(function: Callable, args: tuple, *, seconds: float, in_a_row: bool, repeats: int = 1) -> Measurement:
    """Compiles a function, for the device that its arguments are on or described by, and runs it if they are arrays.

    Args:
        function: to be jitted.
        args: arrays, or their description.
        seconds: to spend on running.
        in_a_row: start calls without waiting for the last one, as a training step does, and report the median of their
            mean times; otherwise wait for every call and report the best.
        repeats: of the op in one call; times are of one.
    """
    jitted = jax.jit(function)
    memory = jitted.lower(*args).compile().memory_analysis()
    assert memory is not None, "XLA reports the memory of every backend in use here"
    walls, cpus = [], []
    if all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(args)):
        jax.block_until_ready(jitted(*args))
        wall = time.perf_counter()
        jax.block_until_ready(jitted(*args))
        calls = max(1, min(20, int(0.02 / (time.perf_counter() - wall)))) if in_a_row else 1
        spent = 0.0
        while len(walls) < 3 or spent < seconds:
            wall, cpu = time.perf_counter(), time.process_time()
            result = None
            for _ in range(calls):
                result = jitted(*args)
            jax.block_until_ready(result)
            spent += time.perf_counter() - wall
            walls.append((time.perf_counter() - wall) / calls)
            cpus.append((time.process_time() - cpu) / calls)
    summary = statistics.median if in_a_row else min
    return Measurement(
        milliseconds=summary(walls) * 1e3 / repeats if walls else None,
        cpu_milliseconds=summary(cpus) * 1e3 / repeats if cpus else None,
        temporaries=memory.temp_size_in_bytes,
        arguments_and_results=memory.argument_size_in_bytes + memory.output_size_in_bytes,
    )


@functools.cache
def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a large copy on the default device."""
    source = jnp.ones(2**28, jnp.float32)
    cost = measure(lambda array: array + 1, (source,), seconds=0.3, in_a_row=True)
    assert cost.milliseconds is not None
    return 2 * source.nbytes / (cost.milliseconds * 1e-3)


def table(op: OpName, shape: tuple[int, ...], dtype: DType, options: Options) -> list[str]:
    """Markdown lines for one op at one shape and dtype."""
    kind = "cpu" if options.device == "cpu" and options.compile_for is None else "gpu"
    with_time = options.compile_for is None
    on_gpu = kind == "gpu" and with_time
    official = OFFICIAL_CUDA.get((op, dtype, shape)) if on_gpu else None
    columns = ["implementation", "pass"]
    columns += ["ms"] if with_time else []
    columns += ["CPU ms"] if kind == "cpu" else []
    columns += ["floor ms", "of bandwidth"] if on_gpu else []
    columns += ["of official CUDA"] if official else []
    columns += ["temporaries MiB", "arguments + results MiB"]
    sizes = "x".join(map(str, shape))
    lines = [f"## {op} {sizes} ({SHAPE_MEANING[op]}), {dtype}", "", "| " + " | ".join(columns) + " |"]
    lines.append("|" + "---|" * len(columns))
    device = cuda_devices(options.compile_for)[0] if options.compile_for else None
    arrays = arguments(op, shape, dtype)
    arrays = jax.tree.map(jnp.asarray, arrays) if device is None else described(arrays, device)
    repeats = UPDATES if op == "selective_state_update" and kind == "gpu" else 1
    for name, function in candidates(op, shape, kind).items():
        for i, (direction, (program, args)) in enumerate(programs(function, arrays).items()):
            if direction != "forward" and (repeats > 1 or name.endswith(" alone")):
                continue
            with tracing_for(device) if device else contextlib.nullcontext():
                cost = measure(program, args, seconds=options.seconds, in_a_row=kind == "gpu", repeats=repeats)
            cells = [name, direction]
            cells += [f"{cost.milliseconds:.3f}"] if with_time else []
            cells += [f"{cost.cpu_milliseconds:.2f}"] if kind == "cpu" else []
            if on_gpu and cost.milliseconds is not None:
                floor = 1e3 * cost.arguments_and_results / copy_bandwidth()
                cells += [f"{floor:.3f}", f"{floor / cost.milliseconds:.0%}"]
                cells += [f"{cost.milliseconds / official[i]:.3f}"] if official else []
            cells += [f"{cost.temporaries / MIB:.1f}", f"{cost.arguments_and_results / MIB:.1f}"]
            lines.append("| " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    return [*lines, ""]


def header(options: Options, day: str) -> list[str]:
    """Markdown lines that say what the numbers were taken on, and how."""
    if options.compile_for is not None:
        hardware = f"compiled for {options.compile_for.name}, not run"
    elif options.device == "cpu":
        cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        names = [line.split(":")[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
        hardware = f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"
    else:
        hardware = f"{jax.devices()[0].device_kind}, a large copy moves {copy_bandwidth() / 1e12:.2f} TB/s"
    return [
        f"# Cost of the ops, {day}",
        "",
        f"Hardware: {hardware}.",
        f"Software: Python {platform.python_version()}, jax {jax.__version__}.",
        f"Command: `python {shlex.join(['benchmarks/run_ops.py', *sys.argv[1:]])}`",
        "",
        "Times are the best of repeated runs on a CPU; on a GPU the median of runs that follow each other without a "
        "pause, launches included. CPU ms is processor time over all threads. Temporaries are what the compiled "
        "program allocates beyond arguments and results, whose size bounds memory traffic from below: the floor is "
        f"that size at the bandwidth of a large copy. State updates on a GPU are timed {UPDATES} in a loop.",
        "",
    ]


def parse_shape(op: OpName, text: str) -> tuple[int, ...]:
    """Sizes from "2x1024x512x16".

    Raises:
        InputError: it is not positive integers, as many as the op has sizes.
    """
    sizes = tuple(int(part) if part.isdecimal() else 0 for part in text.split("x"))
    if len(sizes) != len(SHAPE_MEANING[op].split(" x ")) or 0 in sizes:
        raise InputError(
            f"--shapes {text!r} does not fit {op}: expected {SHAPE_MEANING[op]}, for example 2x1024x512x16"
        )
    return sizes


def main() -> None:
    """Command-line entry."""
    with one_line_errors():
        options = parse(Options, prog="benchmarks/run_ops.py")
        if options.shapes and options.op is None:
            raise InputError("--shapes needs --op: the ops have different sizes")
        ops: tuple[OpName, ...] = (options.op,) if options.op else tuple(SHAPE_MEANING)
        kind = "cpu" if options.device == "cpu" and options.compile_for is None else "gpu"
        shapes = {op: [parse_shape(op, text) for text in options.shapes or DEFAULT_SHAPES[kind][op]] for op in ops}
        jax.config.update("jax_platforms", {"gpu": "cuda"}.get(options.device, options.device))

        day = datetime.date.today().isoformat()
        label = options.compile_for.stem if options.compile_for else options.device
        path = options.output / f"ops_{label}_{day}.md"
        options.output.mkdir(parents=True, exist_ok=True)
        lines = header(options, day)
        for op in ops:
            for shape in shapes[op]:
                for dtype in options.dtypes:
                    lines += table(op, shape, dtype, options)
                    # After every table, so that a run that is cut short leaves what it has.
                    path.write_text("\n".join(lines))
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
