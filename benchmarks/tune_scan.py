"""Times the tilings of the GPU kernels of the selective scan over shapes, and writes a table.

    python benchmarks/tune_scan.py
    python benchmarks/tune_scan.py --shapes 8x2048x1536 1x131072x2048

`pallas_kernels/selective_scan/pallas_gpu/tilings.py` holds what the table says. Times are medians of repeated jitted
calls, launches included, in milliseconds; the backward pass is timed together with the forward pass of the present
choice.
"""

import argparse
import concurrent.futures
import datetime
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

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


def milliseconds(function: Callable, arrays: dict[str, jax.Array]) -> float:
    """Median time of a call, when calls follow each other without a pause."""
    jax.block_until_ready(function(arrays))
    start = time.perf_counter()
    jax.block_until_ready(function(arrays))
    calls = max(1, min(20, int(0.01 / (time.perf_counter() - start))))
    times = []
    for _ in range(7):
        start = time.perf_counter()
        result = None
        for _ in range(calls):
            result = function(arrays)
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / calls)
    return 1e3 * statistics.median(times)


def main() -> None:
    """Compiles everything in parallel, then times one candidate after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="batch x length x channels")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()

    candidates = []
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for text in options.shapes:
            batch, length, channels = (int(size) for size in text.split("x"))
            shape = batch, length, channels
            chosen = choose_tilings(*shape, STATES)
            abstract = jax.eval_shape(functools.partial(arguments, shape))
            for kind, run in (("forward", forward), ("forward + backward", forward_and_backward)):
                for tiling in tilings_for(shape):
                    pair = (tiling, chosen[1]) if kind == "forward" else (chosen[0], tiling)
                    function = jax.jit(functools.partial(run, pair))
                    compiled = pool.submit(lambda f=function, a=abstract: f.lower(a).compile())
                    is_chosen = tiling == chosen[kind != "forward"]
                    candidates.append((text, shape, kind, tiling, is_chosen, function, compiled))
        for *_, compiled in candidates:
            compiled.exception()

    lines = [
        "# Tilings of the selective scan on GPUs",
        "",
        f"`python benchmarks/tune_scan.py`, {datetime.date.today()}, {jax.devices()[0].device_kind}, jax "
        f"{jax.__version__}; bfloat16, N {STATES}, D, z, dt_bias, softplus. * is the choice of `choose_tilings`.",
        "",
        "| batch x length x channels | pass | lanes | rows | parts | ms |",
        "|---|---|---|---|---|---|",
    ]
    arrays, last = {}, None
    for text, shape, kind, tiling, is_chosen, function, compiled in candidates:
        if text != last:
            arrays, last = arguments(shape), text
        reason = compiled.exception()
        time_taken = f"{milliseconds(function, arrays):.4f}" if reason is None else type(reason).__name__
        mark = "*" if is_chosen else ""
        lines.append(
            f"| {text} | {kind} | {tiling.lanes_per_channel} | {tiling.rows} | {tiling.parts} | {time_taken}{mark} |"
        )
        print(lines[-1], flush=True)
    path = options.output / f"scan_tilings_{datetime.date.today()}.md"
    path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
