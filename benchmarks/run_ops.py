"""Times every implementation of the ops, forward and forward + backward; keeps the results and writes a table.

    python benchmarks/run_ops.py
    python benchmarks/run_ops.py --op selective_scan --device gpu --workloads mamba_130m long --dtypes bfloat16
    python benchmarks/run_ops.py --op selective_scan --device gpu --shapes 8x2048x1536x16
    python benchmarks/run_ops.py --op selective_scan --compile-for benchmarks/targets/h100_sxm.txtpb

Workloads have names in the manifests of the ops (`pallas_kernels/<op>/arg_specs.py`). The last form compiles for a GPU
that need not be there, and reports memory only; it needs the `cuda` extra.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

import bounds
import harness
import pallas_kernels
from harness import MIB, Results, setting_here, time_calls
from mamba_jax.cli import one_line_errors, parse
from mamba_jax.errors import InputError
from pallas_kernels import (
    TABLES,
    selective_scan_final_state,
    selective_scan_initial_cotangent,
)
from pallas_kernels.common.ahead_of_time import cuda_devices, described, tracing_for
from pallas_kernels.common.arg_spec import CallSpec, DType, Platform
from pallas_kernels.manifests import MANIFESTS

# Milliseconds of the authors' CUDA kernels (mamba-ssm 2.3.2.post1 and causal-conv1d, PyTorch) on an H100 80GB HBM3 with
# the same arguments in bfloat16 (the fourth: float32): forward, and forward + backward. They are not measured here.
OFFICIAL_CUDA: dict[tuple[str, DType, str], tuple[float, float]] = {
    ("selective_scan", "bfloat16", "8x2048x1536x16"): (0.485, 2.341),
    ("selective_scan", "bfloat16", "8x2048x2048x16"): (0.641, 3.103),
    ("selective_scan", "bfloat16", "8x2048x5120x16"): (1.504, 7.573),
    ("selective_scan", "float32", "8x2048x2048x16"): (1.222, 4.003),
    ("selective_scan", "bfloat16", "1x2048x2048x16"): (0.123, 0.736),
    ("selective_scan", "bfloat16", "1x16384x2048x16"): (0.848, 3.707),
    ("selective_scan", "bfloat16", "1x131072x2048x16"): (5.992, 28.79),
    ("selective_scan", "bfloat16", "4x8192x1536x16"): (1.071, 4.843),
    ("selective_scan", "bfloat16", "64x512x1536x16"): (0.872, 4.152),
    ("causal_conv1d", "bfloat16", "8x2048x1536x4"): (0.126, 0.650),
    ("causal_conv1d", "bfloat16", "8x2048x5120x4"): (0.210, 0.772),
}
# What is compared on a device, by op; of others all that is timed is XLA's form, on a CPU beside the reference.
IMPLEMENTATIONS = {
    "selective_scan": {
        "cpu": ("reference", "xla_sequential", "xla_associative"),
        "gpu": ("pallas_gpu", "triton", "xla"),
        "tpu": ("pallas_tpu", "xla"),
    },
    "causal_conv1d": {"cpu": ("reference", "xla"), "gpu": ("pallas_gpu", "xla"), "tpu": ("pallas_tpu", "xla")},
    "ssd": {"cpu": ("reference", "xla"), "gpu": ("pallas_gpu", "xla"), "tpu": ("xla",)},
}
ONLY_XLA = {"cpu": ("reference", "xla"), "gpu": ("xla",), "tpu": ("xla",)}
# Above so many states over all tokens the unchunked form does not fit into a GPU's memory.
UNCHUNKED_ELEMENTS = 2**29
# An update takes less time than starting a program: on a GPU so many are timed in one loop.
UPDATES = 200
OPS_OF_A_TOKEN = ("selective_state_update", "ssd_state_update")
# Distributions of other libraries, by the name of their module: compared where they are installed.
PEERS = {"jla": "jax-linear-attention", "mamba2_jax": "mamba2-jax"}
NOTES = (
    "Times are the best of repeated runs on a CPU; on a GPU the median of runs that follow each other without a pause, "
    "launches included. CPU ms is processor time over all threads. Temporaries are what the compiled program allocates "
    f"beyond arguments and results. State updates on a GPU are timed {UPDATES} in a loop.",
    "The bound is the least time of the chip's memory, or of a unit, for what the op has to do (`docs/kernels.md`), at "
    "the rates of `benchmarks/bounds.py`.",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure.

    Attributes:
        op: one op, or None for all.
        device: where to run.
        workloads: names of an op's manifest; empty takes those that suit the device.
        shapes: other sizes joined by "x" (batch, length, channels, states or width; no length for the state update).
        dtypes: of the sequence arguments.
        compile_for: description of a GPU to compile for instead of running anything.
        seconds: time to spend on each measurement, at least three runs.
        output: folder of the results.
    """

    op: str | None = None
    device: Literal["cpu", "gpu", "tpu"] = "cpu"
    workloads: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    dtypes: tuple[DType, ...] = ("float32",)
    compile_for: Path | None = None
    seconds: float = 3.0
    output: Path = harness.RESULTS

    @property
    def target(self) -> Literal["cpu", "gpu", "tpu"]:
        """What the ops run on, or are compiled for."""
        return "gpu" if self.compile_for else self.device

    @property
    def platform(self) -> Platform:
        """Whose workloads are timed."""
        return "cpu" if self.target == "cpu" else "accelerator"


def calls(options: Options) -> dict[str, list[CallSpec]]:
    """The calls to time, by op.

    Raises:
        InputError: there is no such op or workload, or a shape is none of the op.
    """
    if options.op not in (None, *MANIFESTS):
        raise InputError(f"unknown op {options.op!r}; there are {', '.join(MANIFESTS)}")
    if options.op is None:
        if options.shapes or options.workloads:
            raise InputError("--shapes and --workloads need --op: the ops have different sizes")
        return {op: list(manifest.timed.get(options.platform, ())) for op, manifest in MANIFESTS.items()}
    manifest = MANIFESTS[options.op]
    try:
        chosen = [manifest.workload(name) for name in options.workloads]
        chosen += [manifest.workload_of(text) for text in options.shapes]
    except ValueError as error:
        raise InputError(f"{options.op}: {error}") from None
    return {options.op: chosen or list(manifest.timed.get(options.platform, ()))}


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


def peer_ssd(*, sums_over_heads: bool, D, dt_bias, **arrays):
    """Mamba-2's recurrence in the same package; its kernel may sum the gradients of B and C over heads."""
    ssd = importlib.import_module("jla.layers.ssm").mamba2_ssd
    dt = jax.nn.softplus(arrays["dt"].astype(jnp.float32) + dt_bias[None, None])
    return ssd(arrays["x"], dt, arrays["A"], arrays["B"], arrays["C"], d=D, grouped_key_grads=sums_over_heads)[0]


def peer_ssd_of_heads(*, chunk: int, D, dt_bias, **arrays):
    """Mamba-2's recurrence in the package mamba2-jax, whose default is a chunk of 256; B and C are for each head."""
    forward = importlib.import_module("mamba2_jax.modeling").ssd_forward
    x, dt, A = (arrays[name] for name in ("x", "dt", "A"))
    B, C = (jnp.repeat(arrays[name], x.shape[2] // arrays[name].shape[2], axis=2) for name in ("B", "C"))
    return forward(x, dt, A, B, C, chunk, D=D, dt_bias=dt_bias[None, None], dt_min=0.0, dt_max=math.inf)[0]


def edge_state(edge, implementation, *, x, dt, A, B, C, D, z, dt_bias):
    """The state at one edge of a sequence; for the cotangent x stands for that of y."""
    common = {"dt_bias": dt_bias, "dt_softplus": True, "implementation": implementation}
    if edge == "final state":
        return selective_scan_final_state(x, dt, A, B, **common)
    return selective_scan_initial_cotangent(x, dt, A, C, z=z, **common)


def chained_updates(update: Callable, *, state, x, dt, **others) -> jax.Array:
    """Updates that follow each other: each takes the state, x and dt from the one before."""

    def step(_, carry):
        state, x, dt = carry
        output = update(state, x, dt, **others, dt_softplus=True, implementation="xla")
        # A head has one dt for all of its channels.
        return output.state, output.y, dt + (output.y if dt.ndim == x.ndim else output.y[..., 0])

    return jax.lax.fori_loop(0, UPDATES, step, (state, x, dt))[1]


def candidates(op: str, static: Mapping[str, Any], elements: int, options: Options) -> dict[str, Callable]:
    """The functions to compare; each takes the op's arrays by name and returns y.

    Args:
        op: its name.
        static: options of the call.
        elements: states over all tokens.
        options: of the command.
    """
    on_accelerator = options.platform == "accelerator"
    names, function = IMPLEMENTATIONS.get(op, ONLY_XLA)[options.target], getattr(pallas_kernels, op)
    if op in OPS_OF_A_TOKEN and on_accelerator:
        return {"xla": functools.partial(chained_updates, function)}

    def through_api(implementation: str, **arrays: jax.Array) -> jax.Array:
        return function(**arrays, **static, implementation=implementation).y

    functions: dict[str, Callable] = {name: functools.partial(through_api, name) for name in names}
    if op == "causal_conv1d":
        functions["lax.conv_general_dilated"] = library_convolution
    if op == "selective_scan":
        for edge in ("final state", "initial cotangent"):
            functions[f"{names[0]}, {edge} alone"] = functools.partial(edge_state, edge, names[0])
        if not on_accelerator or elements <= UNCHUNKED_ELEMENTS:
            functions["unchunked associative_scan"] = unchunked_associative_scan
        if on_accelerator and "jla" in installed_peers():
            functions["jax-linear-attention"] = peer_scan
    return functions | (peers_of_ssd(on_accelerator) if op == "ssd" else {})


def installed_peers() -> dict[str, str]:
    """Those of `PEERS` that can be imported."""
    return {module: name for module, name in PEERS.items() if importlib.util.find_spec(module)}


def peers_of_ssd(on_accelerator: bool) -> dict[str, Callable]:
    """What other libraries have for `ssd`: on an accelerator kernels, which have a choice, elsewhere plain JAX."""
    functions: dict[str, Callable] = {}
    peers = installed_peers()
    if "jla" in peers and on_accelerator:
        for summed, where in ((True, "in its kernel"), (False, "after it")):
            functions[f"{PEERS['jla']}, heads summed {where}"] = functools.partial(peer_ssd, sums_over_heads=summed)
    elif "jla" in peers:
        functions[PEERS["jla"]] = functools.partial(peer_ssd, sums_over_heads=False)
    if "mamba2_jax" in peers and not on_accelerator:
        for chunk in (64, 128, 256):
            functions[f"{PEERS['mamba2_jax']}, chunk {chunk}"] = functools.partial(peer_ssd_of_heads, chunk=chunk)
    return functions


def programs(function: Callable, arrays: dict) -> dict[str, tuple[Callable, tuple]]:
    """The forward pass, and the forward pass with the gradients of every argument."""

    def forward(arrays):
        return function(**arrays)

    def both(arrays, cotangent):
        y, vjp = jax.vjp(forward, arrays)
        return y, vjp(cotangent)[0]

    return {"forward": (forward, (arrays,)), "forward + backward": (both, (arrays, arrays["x"]))}


def comparisons(op: str, spec: CallSpec, dtype: DType, direction: str, *, sizes, moved, milliseconds) -> dict[str, Any]:
    """What a time on an accelerator amounts to: of the chip's least time, and of the authors' CUDA kernel's."""
    manifest, figures = MANIFESTS[op], {}
    if chip := bounds.chip(harness.hardware()):
        passes = [manifest.forward] if direction == "forward" else [manifest.forward, manifest.backward]
        least = bounds.bound(chip, moved=moved, passes=passes, sizes=sizes)
        share = 100 * least.milliseconds / milliseconds
        figures = {"bound_ms": least.milliseconds, "bound_by": least.unit, "of_bound_%": share}
    if official := OFFICIAL_CUDA.get((op, dtype, manifest.shape_text(spec))):
        figures["of_official_CUDA"] = milliseconds / official[direction != "forward"]
    return figures


def run(op: str, spec: CallSpec, dtype: DType, options: Options, results: Results) -> None:
    """Measures every candidate at one workload and dtype."""
    drawn = spec.arguments()
    device = cuda_devices(options.compile_for)[0] if options.compile_for else None
    arrays: Any = drawn.rounded(dtype)
    sizes = TABLES[op].sizes(arrays)
    arrays = jax.tree.map(jnp.asarray, arrays) if device is None else described(arrays, device)
    workload = " ".join(filter(None, (spec.name, MANIFESTS[op].shape_text(spec), dtype)))
    on_cpu = options.platform == "cpu"
    repeats = UPDATES if op in OPS_OF_A_TOKEN and not on_cpu else 1
    elements = math.prod(size for letter, size in sizes.items() if letter in "BLEN")
    for name, function in candidates(op, drawn.static, elements, options).items():
        is_whole = repeats == 1 and not name.endswith(" alone")
        for direction, (program, args) in programs(function, arrays).items():
            if direction != "forward" and not is_whole:
                continue
            jitted, figures = jax.jit(program), {}
            with tracing_for(device) if device else contextlib.nullcontext():
                memory = jitted.lower(*args).compile().memory_analysis()
            assert memory is not None, "XLA reports the memory of every backend in use here"
            moved = memory.argument_size_in_bytes + memory.output_size_in_bytes
            if device is None:
                timing = time_calls(functools.partial(jitted, *args), seconds=options.seconds, in_a_row=not on_cpu)
                milliseconds = timing.milliseconds / repeats
                figures = {"milliseconds": milliseconds, "CPU_ms": timing.cpu_milliseconds if on_cpu else None}
                if is_whole and not on_cpu:
                    figures |= comparisons(
                        op, spec, dtype, direction, sizes=sizes, moved=moved, milliseconds=milliseconds
                    )
            figures |= {"temporaries_MiB": memory.temp_size_in_bytes / MIB, "arguments_+_results_MiB": moved / MIB}
            results.add(op, workload, implementation=name, direction=direction, **figures)


def main() -> None:
    """Command-line entry."""
    with one_line_errors():
        options = parse(Options, prog="benchmarks/run_ops.py")
        chosen = calls(options)
        harness.select_platform(options.device)
        target = options.compile_for
        setting = setting_here(
            f"{target.stem}, compiled for and not run" if target else harness.hardware(),
            libraries=tuple(installed_peers().values()),
        )
        results = Results(options.output, setting)
        for op, specs in chosen.items():
            for spec in specs:
                for dtype in options.dtypes:
                    run(op, spec, dtype, options, results)
        path = results.write_table(f"ops_{target.stem if target else options.device}", "Cost of the ops", *NOTES)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
