"""Times a training step (forward, backward, update) for every rematerialisation policy, and says where the time goes.

    python benchmarks/run_training.py
    python benchmarks/run_training.py --device gpu --compute-dtype bfloat16 --d-model 768 --num-layers 24 --length 2048
    python benchmarks/run_training.py --mixer mamba2

Every policy runs in a process of its own, so that its peak memory is its own.
"""

import concurrent.futures
import dataclasses
import functools
import multiprocessing
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import harness
from harness import MIB, Results, Setting, Timing, select_platform, time_calls
from mamba_jax.cli import one_line_errors, parse
from mamba_jax.config import (
    Mamba1Config,
    Mamba2Config,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
)
from mamba_jax.data.batch import LMBatch
from mamba_jax.errors import InputError
from mamba_jax.models import parameters
from mamba_jax.models.flops import flops_per_token, model_flops_utilization
from mamba_jax.models.head import Head
from mamba_jax.models.loss import next_token_loss
from mamba_jax.sharding import make_mesh, put_batch
from mamba_jax.training.config import ProgramConfig
from mamba_jax.training.optimizer import make_optimizer
from mamba_jax.training.program import TrainProgram
from pallas_kernels import causal_conv1d, selective_scan, ssd

Remat = Literal["none", "dots", "block"]
NOTES = (
    "Forward, backward and update, compiled once, the state donated. Times are the best of repeated runs; CPU ms is "
    "processor time over all threads, the one to compare on shared cores. Temporaries are what the compiled step "
    "allocates beyond the state and the batch. Then where the time goes, each part compiled and timed alone, forward "
    "and backward, all layers.",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure.

    Attributes:
        device: where to run.
        mixer: of every layer, with its defaults.
        remat: policies to compare.
        d_model: width of the residual stream.
        num_layers: blocks.
        vocab_size: token ids.
        batch: sequences.
        length: tokens of a sequence.
        compute_dtype: of matrix products and activations.
        loss_chunk: sequence positions whose logits exist at the same time.
        seconds: time to spend on each measurement, at least three runs.
        output: folder of the results.
    """

    device: Literal["cpu", "gpu", "tpu"] = "cpu"
    mixer: Literal["mamba1", "mamba2"] = "mamba1"
    remat: tuple[Remat, ...] = ("none", "dots", "block")
    d_model: int = 256
    num_layers: int = 4
    vocab_size: int = 4096
    batch: int = 2
    length: int = 1024
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    loss_chunk: int = 512
    seconds: float = 20.0
    output: Path = harness.RESULTS

    def program(self, remat: Remat) -> ProgramConfig:
        """What one policy is measured with."""
        return ProgramConfig(
            model=ModelConfig(
                vocab_size=self.vocab_size,
                d_model=self.d_model,
                num_layers=self.num_layers,
                mixer=Mamba1Config() if self.mixer == "mamba1" else Mamba2Config(),
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
class StepCost:
    """Cost of the step under one policy."""

    timing: Timing
    compile_seconds: float
    temporaries: int
    peak_memory: int
    hardware: str


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

        def run() -> Any:
            nonlocal state
            state, metrics = step(state, batch)
            return state, metrics

        timing = time_calls(run, seconds=options.seconds, in_a_row=False)
    memory = step.memory_analysis()
    assert memory is not None, "XLA reports the memory of every backend in use here"
    # Peak memory of the device where it keeps its own; the CPU's is that of the process, in KiB on Linux.
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return StepCost(
        timing=timing,
        compile_seconds=compile_seconds,
        temporaries=memory.temp_size_in_bytes,
        peak_memory=peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        hardware=harness.hardware(),
    )


Draw = Callable[..., jax.Array]
# A piece of a step: a function of arrays, and its arguments.
type Piece = tuple[Callable, tuple]


def _mamba1(config: ModelConfig, sequence: tuple[int, int], draw: Draw) -> tuple[list[tuple[int, int]], Piece, int]:
    """Sizes of the matrix products of a layer, its recurrence, and the channels that it convolves."""
    mixer: Any = config.mixer
    width, states = config.d_model, mixer.state_dim
    inner, rank = mixer.channels(width), mixer.rank(width)
    sizes = [(width, 2 * inner), (inner, rank + 2 * states), (rank, inner), (inner, width)]

    def scan(x, dt, a, b, c, d, z, bias):
        return selective_scan(x, dt, a, b, c, D=d, z=z, dt_bias=bias, dt_softplus=True).y

    x, keys = draw(*sequence, inner), draw(*sequence, states)
    vector, a = draw(inner, dtype=np.float32), -jnp.exp(draw(inner, states, dtype=np.float32))
    return sizes, (scan, (x, x, a, keys, keys, vector, x, vector)), inner


def _mamba2(config: ModelConfig, sequence: tuple[int, int], draw: Draw) -> tuple[list[tuple[int, int]], Piece, int]:
    """The same of Mamba-2."""
    mixer: Any = config.mixer
    width, groups, states = config.d_model, mixer.num_groups, mixer.state_dim
    inner, heads, shared = mixer.channels(width), mixer.heads(width), 2 * groups * states
    sizes = [(width, 2 * inner), (width, shared), (width, heads), (inner, width)]

    def recur(x, dt, a, b, c, d, bias):
        return ssd(x, dt, a, b, c, D=d, dt_bias=bias, dt_softplus=True).y

    x, keys = draw(*sequence, heads, mixer.head_dim), draw(*sequence, groups, states)
    vector = draw(heads, dtype=np.float32)
    return sizes, (recur, (x, draw(*sequence, heads), -jnp.exp(vector), keys, keys, vector, vector)), inner + shared


def parts(options: Options) -> dict[str, tuple[Callable, tuple, int]]:
    """The pieces of a step: name to a function of arrays, its arguments, and how often a step does it."""
    config = options.program("none").model
    mixer: Any = config.mixer
    dtype, layers, width = jnp.dtype(config.compute_dtype), config.num_layers, config.d_model
    rng = np.random.default_rng(0)

    def draw(*sizes: int, dtype: Any = dtype) -> jax.Array:
        return jnp.asarray(0.1 * rng.standard_normal(sizes, np.float32), dtype)

    sequence = (options.batch, options.length)
    of_layer = {"mamba1": _mamba1, "mamba2": _mamba2}[options.mixer]
    sizes, (recurrence, arrays), channels = of_layer(config, sequence, draw)
    projections = tuple((draw(*sequence, fan_in), draw(fan_in, fan_out)) for fan_in, fan_out in sizes)
    targets = jnp.asarray(rng.integers(0, options.vocab_size, sequence), jnp.int32)

    def multiply(pairs):
        return [jnp.einsum("blm,mn->bln", value, kernel) for value, kernel in pairs]

    def convolve(x, weight, bias):
        return causal_conv1d(x, weight, bias, activation="silu").y

    def loss(hidden, matrix):
        head = Head(matrix=matrix)
        count, mask = jnp.float32(targets.size), jnp.ones(sequence, bool)
        return next_token_loss(hidden, head, targets, mask, normalizer=count, z_loss=0.0, chunk=options.loss_chunk).loss

    def with_gradient(function):
        def both(*arguments):
            output, vjp = jax.vjp(function, *arguments)
            return vjp(output)

        return both

    taps, bias = draw(mixer.conv_width, channels), draw(channels, dtype=np.float32)
    return {
        "matrix products of the blocks": (with_gradient(multiply), (projections,), layers),
        "recurrence": (with_gradient(recurrence), arrays, layers),
        "convolution": (with_gradient(convolve), (draw(*sequence, channels), taps, bias), layers),
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

    def run() -> Any:
        nonlocal state
        state = update(state, gradient)
        return state

    return time_calls(run, seconds=options.seconds / 10, in_a_row=False)


def measure_parts(options: Options) -> dict[str, Timing]:
    """Every piece alone, forward and backward, times how often a step does it."""
    select_platform(options.device)
    timings = {}
    for name, (function, arguments, repeats) in parts(options).items():
        compiled = jax.jit(function).lower(*arguments).compile()
        once = time_calls(functools.partial(compiled, *arguments), seconds=options.seconds / 10, in_a_row=False)
        timings[name] = Timing(
            milliseconds=repeats * once.milliseconds, cpu_milliseconds=repeats * once.cpu_milliseconds
        )
    return timings | {"clipping and AdamW": measure_update(options)}


def step_figures(options: Options, cost: StepCost) -> dict[str, float | None]:
    """What a step costs."""
    speed = options.batch * options.length / cost.timing.milliseconds * 1e3
    mfu = model_flops_utilization(
        options.program("none").model, speed, length=options.length, device_kind=cost.hardware, num_devices=1
    )
    return {
        "milliseconds": cost.timing.milliseconds,
        "CPU_ms": cost.timing.cpu_milliseconds,
        "tokens/s": speed,
        "MFU_%": None if mfu is None else 100 * mfu,
        "temporaries_MiB": cost.temporaries / MIB,
        "peak_memory_MiB": cost.peak_memory / MIB,
        "compile_s": cost.compile_seconds,
    }


def part_figures(options: Options, timings: dict[str, Timing], whole: Timing, remat: Remat) -> dict[str, dict]:
    """Time and share of every piece, and of what of the step they do not cover."""
    kind = "cpu_milliseconds" if options.device == "cpu" else "milliseconds"
    times = {name: getattr(timing, kind) for name, timing in timings.items()}
    total = getattr(whole, kind)
    recomputed = "" if remat == "none" else ", recomputation"
    times[f"rest: norms, residuals, embedding, layout changes{recomputed}"] = total - sum(times.values())
    label = "CPU_ms" if options.device == "cpu" else "milliseconds"
    return {name: {label: time, "share_%": 100 * time / total} for name, time in times.items()}


def workload(options: Options) -> str:
    """Model and batch in words."""
    config = options.program("none").model
    flops = flops_per_token(config, length=options.length) * options.batch * options.length
    return (
        f"{options.mixer} d_model {options.d_model}, {options.num_layers} layers, vocabulary {options.vocab_size}, "
        f"{parameters.count(config):,} parameters, batch {options.batch} x {options.length}, {options.compute_dtype}, "
        f"{flops / 1e9:.1f} GFLOP a step"
    )


def main() -> None:
    """Command-line entry."""
    with one_line_errors():
        options = parse(Options, prog="benchmarks/run_training.py")
        for remat in options.remat:
            options.program(remat)
        results, whole = None, None
        with concurrent.futures.ProcessPoolExecutor(
            1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1
        ) as processes:
            for remat in options.remat:
                cost = processes.submit(measure_step, options, remat).result()
                results = results or Results(options.output, Setting.here(cost.hardware, libraries=("flax", "optax")))
                whole = whole or cost.timing
                figures: dict[str, Any] = step_figures(options, cost)
                results.add("training step", workload(options), implementation=remat, direction="step", **figures)
            timings = processes.submit(measure_parts, options).result()
        if results is None or whole is None:
            raise InputError("--remat names no policy: give none, dots or block")
        first = options.remat[0]
        for name, figures in part_figures(options, timings, whole, first).items():
            results.add("parts of a step", workload(options), implementation=first, direction=name, **figures)
        print(f"wrote {results.write_table(f'training_{options.device}', 'Cost of a training step', *NOTES)}")


if __name__ == "__main__":
    main()
