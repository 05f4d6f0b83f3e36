"""Times the tilings of the GPU kernels of the selective scan over shapes; keeps the results and writes a table.

    python benchmarks/tune_scan.py
    python benchmarks/tune_scan.py --shapes 8x2048x1536 1x131072x2048

`pallas_kernels/selective_scan/pallas_gpu/tilings.py` holds what the table says. Times are medians of repeated jitted
calls, launches included, in milliseconds; the backward pass is timed together with the forward pass of the present
choice.
"""

import concurrent.futures
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import harness
from harness import Results, setting_here, time_calls
from mamba_jax.cli import one_line_errors, parse
from mamba_jax.errors import InputError
from pallas_kernels.selective_scan.arguments import ScanArguments
from pallas_kernels.selective_scan.pallas_gpu import op as pallas_gpu
from pallas_kernels.selective_scan.pallas_gpu.geometry import Tiling
from pallas_kernels.selective_scan.pallas_gpu.tilings import choose_tilings

SHAPES = (
    "1x2048x1024",
    "1x2048x2048",
    "1x2048x4096",
    "1x131072x2048",
    "8x2048x1536",
    "8x2048x3072",
    "8x2048x5120",
    "64x512x1536",
)
FORMS = ((4, 1), (4, 2), (8, 2))
PARTS = (1, 2, 4, 8, 16, 32)
STATES = 16
LEAST_TOKENS_OF_A_PART = 128
LEAST_BLOCKS, MOST_BLOCKS = 190, 700
NOTES = (
    f"bfloat16, N {STATES}, D, z, dt_bias, softplus; medians of calls that follow each other. * is the choice of "
    "`choose_tilings`. The backward pass is timed together with the forward pass of the present choice.",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to time.

    Attributes:
        shapes: batch x length x channels.
        output: folder of the results.
    """

    shapes: tuple[str, ...] = SHAPES
    output: Path = harness.RESULTS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A tiling of one pass at one shape, and the program that it makes.

    Attributes:
        direction: "forward" or "forward + backward".
        tiling: of the last pass.
        is_chosen: whether `choose_tilings` takes it.
        function: jitted.
        compiled: when it is.
    """

    direction: str
    tiling: Tiling
    is_chosen: bool
    function: Any
    compiled: concurrent.futures.Future

    @property
    def name(self) -> str:
        """As in the table."""
        tiling = self.tiling
        mark = " *" if self.is_chosen else ""
        return f"{tiling.lanes_per_channel} lanes, {tiling.rows} rows, {tiling.parts} parts{mark}"


def arguments(shape: tuple[int, int, int]) -> dict[str, jax.Array]:
    """Random arguments of a Mamba block in bfloat16: every option on."""
    batch, length, channels = shape
    keys = iter(jax.random.split(jax.random.key(0), 8))

    def draw(*sizes: int) -> jax.Array:
        return jax.random.normal(next(keys), sizes, jnp.float32)

    drawn = {name: draw(*shape).astype(jnp.bfloat16) for name in ("x", "z")}
    drawn["dt"] = (draw(*shape) - 4).astype(jnp.bfloat16)
    drawn |= {name: draw(batch, length, STATES).astype(jnp.bfloat16) for name in ("B", "C")}
    return drawn | {"A": -jnp.exp(draw(channels, STATES)), "D": draw(channels), "dt_bias": draw(channels)}


def tilings_for(shape: tuple[int, int, int]) -> list[Tiling]:
    """Tilings that neither leave most of the chip idle nor cut the sequence to pieces without need."""
    batch, length, channels = shape
    tilings = []
    for lanes, rows in FORMS:
        for parts in PARTS:
            tiling = Tiling(lanes_per_channel=lanes, rows=rows, parts=parts)
            blocks = batch * parts * (channels // tiling.channels_per_block)
            fits = LEAST_BLOCKS <= blocks <= MOST_BLOCKS and length // parts >= LEAST_TOKENS_OF_A_PART
            if fits or (parts == 1 and blocks >= LEAST_BLOCKS):
                tilings.append(tiling)
    return tilings


def forward(tilings: tuple[Tiling, Tiling], arrays: dict[str, Any]) -> jax.Array:
    """The scan with given tilings."""
    return pallas_gpu.selective_scan(ScanArguments.of(**arrays, dt_softplus=True), tilings=tilings).y


def forward_and_backward(tilings: tuple[Tiling, Tiling], arrays: dict[str, jax.Array]):
    """The scan and all gradients."""
    y, vjp = jax.vjp(functools.partial(forward, tilings), arrays)
    return y, vjp(y)


def sizes_of(text: str) -> tuple[int, int, int]:
    """Sizes from "8x2048x1536".

    Raises:
        InputError: it is not three positive integers.
    """
    sizes = [int(part) if part.isdecimal() else 0 for part in text.split("x")]
    if len(sizes) != 3 or 0 in sizes:
        raise InputError(f"--shapes {text!r}: expected batch x length x channels, for example 8x2048x1536")
    batch, length, channels = sizes
    return batch, length, channels


def candidates_of(shape: tuple[int, int, int], pool: concurrent.futures.Executor) -> list[Candidate]:
    """All candidates at a shape, whose compilation starts."""
    chosen = choose_tilings(*shape, STATES)
    abstract = jax.eval_shape(functools.partial(arguments, shape))
    candidates = []
    for direction, run in (("forward", forward), ("forward + backward", forward_and_backward)):
        for tiling in tilings_for(shape):
            pair = (tiling, chosen[1]) if direction == "forward" else (chosen[0], tiling)
            function = jax.jit(functools.partial(run, pair))
            candidates.append(
                Candidate(
                    direction=direction,
                    tiling=tiling,
                    is_chosen=tiling == chosen[direction != "forward"],
                    function=function,
                    compiled=pool.submit(lambda f=function: f.lower(abstract).compile()),
                )
            )
    return candidates


def main() -> None:
    """Compiles everything in parallel, then times one candidate after the other."""
    with one_line_errors():
        options = parse(Options, prog="benchmarks/tune_scan.py")
        with concurrent.futures.ThreadPoolExecutor() as pool:
            candidates = {text: candidates_of(sizes_of(text), pool) for text in options.shapes}
        results = Results(options.output, setting_here(harness.hardware()))
        for text, group in candidates.items():
            arrays = arguments(sizes_of(text))
            for candidate in group:
                reason, figures = candidate.compiled.exception(), {}
                if reason is None:
                    call = functools.partial(candidate.function, arrays)
                    figures["milliseconds"] = time_calls(call, seconds=0.1, in_a_row=True).milliseconds
                else:
                    figures["failure"] = type(reason).__name__
                workload = f"{text}x{STATES} bfloat16"
                results.add(
                    "selective_scan tiling",
                    workload,
                    implementation=candidate.name,
                    direction=candidate.direction,
                    **figures,
                )
        print(f"wrote {results.write_table('scan_tilings', 'Tilings of the selective scan on GPUs', *NOTES)}")


if __name__ == "__main__":
    main()
