"""Times a training step (forward, backward, update) for every rematerialisation policy, and says where the time goes.

    python benchmarks/run_training.py
    python benchmarks/run_training.py --device gpu --compute-dtype bfloat16 --d-model 768 --num-layers 24 --length 2048

Every policy runs in a process of its own, so that its peak memory is its own.
"""

import concurrent.futures
import dataclasses
import datetime
import functools
import multiprocessing
import os
import platform
import resource
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import flax
import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import optax

from mamba_jax.cli import one_line_errors, parse
from mamba_jax.config import (
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
)
from mamba_jax.data.batch import LMBatch
from mamba_jax.models import parameters
from mamba_jax.models.flops import flops_per_token, model_flops_utilization
from mamba_jax.models.loss import next_token_loss
from mamba_jax.sharding import make_mesh, put_batch
from mamba_jax.training.config import ProgramConfig
from mamba_jax.training.optimizer import make_optimizer
from mamba_jax.training.program import TrainProgram
from pallas_kernels import causal_conv1d, selective_scan

Remat = Literal["none", "dots", "block"]
MIB = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure.

    Attributes:
        device: where to run.
        remat: policies to compare.
        d_model: width of the residual stream.
        num_layers: blocks.
        vocab_size: token ids.
        batch: sequences.
        length: tokens of a sequence.
        compute_dtype: of matrix products and activations.
        loss_chunk: sequence positions whose logits exist at the same time.
        seconds: time to spend on each measurement, at least three runs.
        output: folder for the table.
    """

    device: Literal["cpu", "gpu", "tpu"] = "cpu"
    remat: tuple[Remat, ...] = ("none", "dots", "block")
    d_model: int = 256
    num_layers: int = 4
    vocab_size: int = 4096
    batch: int = 2
    length: int = 1024
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    loss_chunk: int = 512
    seconds: float = 20.0
    output: Path = Path(__file__).parent / "results"

    def program(self, remat: Remat) -> ProgramConfig:
        """What one policy is measured with."""
        return ProgramConfig(
            model=ModelConfig(
                vocab_size=self.vocab_size,
                d_model=self.d_model,
                num_layers=self.num_layers,
                compute_dtype=self.compute_dtype,
                remat=remat,
            ),
            optimizer=OptimizerConfig(peak_lr=1e-3),
            num_steps=1000,
            seq_len=self.length,
            global_batch=self.batch,
            loss_chunk=self.loss_chunk,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Best of all runs: wall time, and processor time over all threads, in seconds."""

    wall: float
    cpu: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepCost:
    """Cost of the step under one policy."""

    timing: Timing
    compile_seconds: float
    temporaries: int
    peak_memory: int
    device_kind: str


def best_timing(run: Callable[[], Any], *, seconds: float) -> Timing:
    """Repeats `run`, which must wait for its result, after one run that does not count."""
    run()
    walls, cpus = [], []
    while len(walls) < 3 or sum(walls) < seconds:
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return Timing(wall=min(walls), cpu=min(cpus))


def select_platform(device: str) -> None:
    """Makes JAX use this kind of device."""
    jax.config.update("jax_platforms", {"gpu": "cuda"}.get(device, device))


def measure_step(options: Options, remat: Remat) -> StepCost:
    """The whole donated step, as the training loop runs it."""
    select_platform(options.device)
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    program = TrainProgram(options.program(remat), mesh)
    state = program.initialize()
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, options.vocab_size, (options.batch, options.length + 1)).astype(np.int32)
    host_batch = LMBatch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        loss_mask=np.ones(tokens[:, 1:].shape, bool),
        segment_ids=np.zeros(tokens[:, 1:].shape, np.int32),
    )
    with jax.set_mesh(mesh):
        batch = put_batch(mesh, host_batch)
        lowered = program.step.lower(state, batch)
        start = time.perf_counter()
        step = lowered.compile()
        compile_seconds = time.perf_counter() - start

        def run() -> None:
            nonlocal state
            state, metrics = step(state, batch)
            jax.block_until_ready((state, metrics))

        timing = best_timing(run, seconds=options.seconds)
    memory = step.memory_analysis()
    assert memory is not None, "XLA reports the memory of every backend in use here"
    device = jax.devices()[0]
    # Peak memory of the device where it keeps its own; the CPU's is that of the process, in KiB on Linux.
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return StepCost(
        timing=timing,
        compile_seconds=compile_seconds,
        temporaries=memory.temp_size_in_bytes,
        peak_memory=peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        device_kind=device.device_kind,
    )


def parts(options: Options) -> dict[str, tuple[Callable, tuple, int]]:
    """The pieces of a step: name to a function of arrays, its arguments, and how often a step does it."""
    config = options.program("none").model
    mixer: Any = config.mixer
    dtype, layers, width = jnp.dtype(config.compute_dtype), config.num_layers, config.d_model
    inner, rank, states = mixer.channels(width), mixer.rank(width), mixer.state_dim
    rng = np.random.default_rng(0)

    def draw(*sizes: int, dtype: Any = dtype) -> jax.Array:
        return jnp.asarray(0.1 * rng.standard_normal(sizes, np.float32), dtype)

    sequence = (options.batch, options.length)
    sizes = ((width, 2 * inner), (inner, rank + 2 * states), (rank, inner), (inner, width))
    projections = tuple((draw(*sequence, fan_in), draw(fan_in, fan_out)) for fan_in, fan_out in sizes)
    x, a = draw(*sequence, inner), -jnp.exp(draw(inner, states, dtype=np.float32))
    targets = jnp.asarray(rng.integers(0, options.vocab_size, sequence), jnp.int32)

    def multiply(pairs):
        return [jnp.einsum("blm,mn->bln", value, kernel) for value, kernel in pairs]

    def scan(x, dt, a, b, c, d, z, bias):
        return selective_scan(x, dt, a, b, c, D=d, z=z, dt_bias=bias, dt_softplus=True).y

    def convolve(x, weight, bias):
        return causal_conv1d(x, weight, bias, activation="silu").y

    def loss(hidden, head):
        count, mask = jnp.float32(targets.size), jnp.ones(sequence, bool)
        return next_token_loss(hidden, head, targets, mask, normalizer=count, z_loss=0.0, chunk=options.loss_chunk).loss

    def with_gradient(function):
        def both(*arguments):
            output, vjp = jax.vjp(function, *arguments)
            return vjp(output)

        return both

    vector, keys = functools.partial(draw, inner, dtype=np.float32), draw(*sequence, states)
    return {
        "matrix products of the blocks": (with_gradient(multiply), (projections,), layers),
        "selective scan": (with_gradient(scan), (x, x, a, keys, keys, vector(), x, vector()), layers),
        "convolution": (with_gradient(convolve), (x, draw(mixer.conv_width, inner), vector()), layers),
        "head and loss": (with_gradient(loss), (draw(*sequence, width), draw(config.padded_vocab_size, width)), 1),
    }


def measure_update(options: Options) -> Timing:
    """The optimizer alone, in place."""
    config = options.program("none")
    definition = parameters.define(config.model)
    optimizer = make_optimizer(config.optimizer, num_steps=config.num_steps, definition=definition)
    state = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), definition.params)
    state = (state, optimizer.init(state))
    gradient = jax.tree.map(jnp.ones_like, state[0])

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state, gradient):
        updates, moments = optimizer.update(gradient, state[1], state[0])
        return optax.apply_updates(state[0], updates), moments

    def run() -> None:
        nonlocal state
        state = jax.block_until_ready(update(state, gradient))

    return best_timing(run, seconds=options.seconds / 10)


def measure_parts(options: Options) -> dict[str, Timing]:
    """Every piece alone, forward and backward, times how often a step does it."""
    select_platform(options.device)
    timings = {}
    for name, (function, arguments, repeats) in parts(options).items():
        compiled = jax.jit(function).lower(*arguments).compile()
        once = best_timing(
            lambda program=compiled, args=arguments: jax.block_until_ready(program(*args)),
            seconds=options.seconds / 10,
        )
        timings[name] = Timing(wall=repeats * once.wall, cpu=repeats * once.cpu)
    return timings | {"clipping and AdamW": measure_update(options)}


def step_table(options: Options, costs: dict[Remat, StepCost]) -> list[str]:
    """Markdown lines of the whole step."""
    tokens = options.batch * options.length
    config = options.program("none").model
    lines = [
        "| remat | tokens/s | best ms | CPU s a step | MFU | temporaries MiB | peak memory MiB | compile s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for remat, cost in costs.items():
        speed = tokens / cost.timing.wall
        mfu = model_flops_utilization(config, speed, length=options.length, device_kind=cost.device_kind, num_devices=1)
        cells = [
            f"{speed:,.0f}",
            f"{cost.timing.wall * 1e3:.1f}",
            f"{cost.timing.cpu:.3f}",
            "-" if mfu is None else f"{mfu:.1%}",
            f"{cost.temporaries / MIB:.1f}",
            f"{cost.peak_memory / MIB:.0f}",
            f"{cost.compile_seconds:.1f}",
        ]
        lines.append(f"| {remat} | {' | '.join(cells)} |")
    return lines


def part_table(options: Options, timings: dict[str, Timing], whole: StepCost, remat: Remat) -> list[str]:
    """Markdown lines of the pieces, and what of the step they do not cover."""
    kind, label = ("cpu", "CPU ms") if options.device == "cpu" else ("wall", "ms")
    milliseconds = {name: 1e3 * getattr(timing, kind) for name, timing in timings.items()}
    total = 1e3 * getattr(whole.timing, kind)
    recomputed = "" if remat == "none" else ", recomputation"
    milliseconds[f"rest: norms, residuals, embedding, layout changes{recomputed}"] = total - sum(milliseconds.values())
    milliseconds[f"whole step, remat {remat!r}"] = total
    lines = [f"| part | {label} | share |", "|---|---|---|"]
    return lines + [f"| {name} | {time:.0f} | {time / total:.0%} |" for name, time in milliseconds.items()]


def header(options: Options, day: str, device_kind: str) -> list[str]:
    """Markdown lines that say what was measured, on what, and how."""
    config = options.program("none").model
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    cpu = f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"
    flops = flops_per_token(config, length=options.length) * options.batch * options.length
    return [
        f"# Cost of a training step, {day}",
        "",
        f"Mamba-1, d_model {options.d_model}, {options.num_layers} layers, batch {options.batch}, length "
        f"{options.length}, vocabulary {options.vocab_size}, {options.compute_dtype}: {parameters.count(config):,} "
        f"parameters, {flops / 1e9:.1f} GFLOP a step.",
        "",
        f"Hardware: {cpu if options.device == 'cpu' else device_kind}.",
        f"Software: Python {platform.python_version()}, jax {jax.__version__}, jaxlib {jaxlib.__version__}, flax "
        f"{flax.__version__}, optax {optax.__version__}.",
        f"Command: `python {shlex.join(['benchmarks/run_training.py', *sys.argv[1:]])}`",
        "",
        "Forward, backward and update, compiled once, the state donated. Times are the best of repeated runs; CPU s is "
        "processor time over all threads, the one to compare on shared cores. Temporaries are what the compiled step "
        "allocates beyond the state and the batch.",
        "",
    ]


def main() -> None:
    """Command-line entry."""
    with one_line_errors():
        options = parse(Options, prog="benchmarks/run_training.py")
        for remat in options.remat:
            options.program(remat)
        costs: dict[Remat, StepCost] = {}
        with concurrent.futures.ProcessPoolExecutor(
            1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1
        ) as processes:
            for remat in options.remat:
                costs[remat] = processes.submit(measure_step, options, remat).result()
                print(step_table(options, {remat: costs[remat]})[-1], flush=True)
            timings = processes.submit(measure_parts, options).result()
        first = options.remat[0]
        day = datetime.date.today().isoformat()
        lines = header(options, day, costs[first].device_kind) + step_table(options, costs)
        lines += ["", "Where the time goes, each part compiled and timed alone, forward and backward, all layers:", ""]
        lines += part_table(options, timings, costs[first], first)
        options.output.mkdir(parents=True, exist_ok=True)
        path = options.output / f"training_{options.device}_{day}.md"
        path.write_text("\n".join([*lines, ""]))
        print("\n".join(lines[-8:]))
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
