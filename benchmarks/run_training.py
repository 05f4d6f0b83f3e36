"""Times a training step (forward, backward, update) for every rematerialisation policy, and says where the time goes.

    python benchmarks/run_training.py
    python benchmarks/run_training.py --device gpu --compute-dtype bfloat16 --d-model 768 --num-layers 24 --length 2048
    python benchmarks/run_training.py --device gpu --no-parts --sizes mamba_130m mamba2_130m --remat none_unrolled block

Every policy runs in a process of its own, for its peak memory; they compile side by side and run one by one.
"""

import concurrent.futures
import dataclasses
import fcntl
import functools
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bounds
import harness
from decoding.profile import time_by_kernel
from harness import MIB, Results, Timing, select_platform, setting_here, time_calls
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
from steps.kernels import rows

Remat = Literal["none", "cheap", "dots", "block", "none_unrolled", "cheap_unrolled"]
Size = Literal["mamba_130m", "mamba_370m", "mamba_1_4b", "mamba2_130m", "mamba2_370m", "mamba2_1_3b"]
# Width, layers and batch at which the figures of the authors' code were taken, in bfloat16 with a length of 2048.
_SMALL, _MEDIUM, _LARGE = ((768, 24, 16), (1024, 48, 8), (2048, 48, 4))
SIZES: dict[Size, tuple[Literal["mamba1", "mamba2"], tuple[int, int, int]]] = {
    "mamba_130m": ("mamba1", _SMALL),
    "mamba_370m": ("mamba1", _MEDIUM),
    "mamba_1_4b": ("mamba1", _LARGE),
    "mamba2_130m": ("mamba2", _SMALL),
    "mamba2_370m": ("mamba2", _MEDIUM),
    "mamba2_1_3b": ("mamba2", _LARGE),
}
NOTES = (
    "Forward, backward and update, compiled once, the state donated. Times are the best of repeated runs; CPU ms is "
    "processor time over all threads, the one to compare on shared cores. Temporaries are what the compiled step "
    "allocates beyond the state and the batch. Then where the time goes, each part compiled and timed alone, forward "
    "and backward, all layers, or by the kernels of a step in a trace. The bound is the operations that the model's "
    "arithmetic counts at the peak rate of the matrix units, and 28 bytes a parameter for the update.",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure.

    Attributes:
        device: where to run.
        mixer: of every layer, with its defaults.
        sizes: of the paper's models, instead of one with the width, layers, vocabulary, batch, length and dtype below.
        remat: policies to compare; "_unrolled" is without a loop over layers.
        d_model: width of the residual stream.
        num_layers: blocks.
        vocab_size: token ids.
        batch: sequences.
        length: tokens of a sequence.
        compute_dtype: of matrix products and activations.
        loss_chunk: sequence positions whose logits exist at the same time.
        parts: time the pieces of a step as well, of the first size.
        seconds: time to spend on each measurement, at least three runs.
        output: folder of the results.
    """

    device: Literal["cpu", "gpu", "tpu"] = "cpu"
    mixer: Literal["mamba1", "mamba2"] = "mamba1"
    sizes: tuple[Size, ...] = ()
    remat: tuple[Remat, ...] = ("none", "dots", "block")
    d_model: int = 256
    num_layers: int = 4
    vocab_size: int = 4096
    batch: int = 2
    length: int = 1024
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    loss_chunk: int = 512
    parts: bool = True
    seconds: float = 20.0
    output: Path = harness.RESULTS

    def cases(self) -> "list[Options]":
        """The options of every size."""
        common: Any = {"vocab_size": 50280, "length": 2048, "compute_dtype": "bfloat16", "sizes": ()}
        return [
            dataclasses.replace(self, **common, mixer=mixer, d_model=width, num_layers=layers, batch=batch)
            for mixer, (width, layers, batch) in (SIZES[size] for size in self.sizes)
        ] or [self]

    def program(self, remat: Remat) -> ProgramConfig:
        """What one policy is measured with."""
        policy: Any = remat.removesuffix("_unrolled")
        return ProgramConfig(
            model=ModelConfig(
                vocab_size=self.vocab_size,
                d_model=self.d_model,
                num_layers=self.num_layers,
                mixer=Mamba1Config() if self.mixer == "mamba1" else Mamba2Config(),
                compute_dtype=self.compute_dtype,
                remat=policy,
                unroll=policy != remat,
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
    kernels: dict[str, tuple[int, float]]


def measure_step(options: Options, remat: Remat, turn: str) -> StepCost:
    """The whole donated step, as the training loop runs it.

    Args:
        options: what to measure.
        remat: the policy.
        turn: path of a file that is locked by the process whose turn it is to use the device, until it ends.
    """
    select_platform(options.device)
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    program = TrainProgram(options.program(remat), mesh)
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
        lowered = program.step.lower(program.state, batch)
        start = time.perf_counter()
        step = lowered.compile()
        compile_seconds = time.perf_counter() - start
        fcntl.flock(os.open(turn, os.O_RDONLY), fcntl.LOCK_EX)
        state = program.initialize()

        def run() -> Any:
            nonlocal state
            state, metrics = step(state, batch)
            return state, metrics

        timing = time_calls(run, seconds=options.seconds, in_a_row=False)
        kernels = time_by_kernel(run) if options.device == "gpu" else {}
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
        kernels=kernels,
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
        "bound_ms": least_milliseconds(options, cost.hardware),
        "temporaries_MiB": cost.temporaries / MIB,
        "peak_memory_MiB": cost.peak_memory / MIB,
        "compile_s": cost.compile_seconds,
    }


def least_milliseconds(options: Options, device_kind: str) -> float | None:
    """A bound of the step: the model's operations at the peak of the matrix units, and the update at its bytes."""
    chip, config = bounds.chip(device_kind), options.program("none").model
    if chip is None:
        return None
    operations = flops_per_token(config, length=options.length) * options.batch * options.length
    # Parameter and two moments are read and written, the gradient is read.
    return 1e3 * (operations / chip.matrix + 28 * parameters.count(config) / chip.memory)


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
        cases = [(case, remat) for case in options.cases() for remat in options.remat if case.program(remat)]
        if not cases:
            raise InputError("--remat names no policy: give none, dots or block")
        results = measure(options, cases)
        print(f"wrote {results.write_table(f'training_{options.device}', 'Cost of a training step', *NOTES)}")


def measure(options: Options, cases: list[tuple[Options, Remat]]) -> Results:
    """Every case, and the pieces of the first."""
    workers = len(cases) if options.device == "gpu" else 1
    spawn = multiprocessing.get_context("spawn")
    results = None
    with (
        tempfile.NamedTemporaryFile() as turn,
        concurrent.futures.ProcessPoolExecutor(workers, mp_context=spawn, max_tasks_per_child=1) as processes,
    ):
        futures = [processes.submit(measure_step, case, remat, turn.name) for case, remat in cases]
        for (case, remat), future in zip(cases, futures, strict=True):
            cost = future.result()
            results = results or Results(options.output, setting_here(cost.hardware, libraries=("flax", "optax")))
            figures: dict[str, Any] = step_figures(case, cost)
            results.add("training step", workload(case), implementation=remat, direction="step", **figures)
            for heading, name, figures in rows(cost.kernels):
                results.add(heading, workload(case), implementation=remat, direction=name, **figures)
        (case, first), cost = cases[0], futures[0].result()
        timings = processes.submit(measure_parts, case).result() if options.parts else {}
    assert results is not None, "there is a case"
    for name, figures in part_figures(case, timings, cost.timing, first).items() if timings else ():
        results.add("parts of a step", workload(case), implementation=first, direction=name, **figures)
    return results


if __name__ == "__main__":
    main()
