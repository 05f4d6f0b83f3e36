"""Starting a kernel of several warpgroups a block."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.partitioning import varying_like

type Arrays = dict[str, Any]


# Registers of a thread: of 3 warpgroups, two compute and one copies. Together they are those of a multiprocessor.
_COMPUTING, _COPYING = 232, 40


def take_registers(computing: int) -> None:
    """In a warpgroup that computes, one of so many: takes the registers that the copying one leaves."""
    # A single one has all that a thread can have from the start.
    if computing > 1:
        plgpu.set_max_registers(_COMPUTING, action="increase")


def give_registers(computing: int) -> None:
    """In the warpgroup that copies for so many others: leaves them its registers."""
    if computing > 1:
        plgpu.set_max_registers(_COPYING, action="decrease")


def ring_slot(i: jax.Array, stages: int) -> tuple[jax.Array, jax.Array]:
    """Place of the i-th item in a ring of `stages`, and how often the place has been used before."""
    turn = jax.lax.div(i, stages)
    return i - turn * stages, turn


def copy_ahead(count, stages: int, refs: Arrays, fetch: Callable[[jax.Array, jax.Array, Any], None]) -> None:
    """Starts the copies of `count` items into a ring of places, each as soon as its place is free.

    Args:
        count: of items.
        stages: places.
        refs: with "full" and "empty", a barrier for each place: that its copies have arrived, that it has been left.
        fetch: called with an item's index, its place and the barrier on which its copies arrive.
    """

    def advance(i, carry):
        slot, turn = ring_slot(i, stages)

        # In the first turn every place is free.
        @pl.when(turn > 0)
        def _():
            plgpu.barrier_wait(refs["empty"].at[slot])

        fetch(i, slot, refs["full"].at[slot])
        return carry

    def leave(i, carry):
        plgpu.barrier_wait(refs["empty"].at[ring_slot(i, stages)[0]])
        return carry

    jax.lax.fori_loop(0, count, advance, None)
    # Every barrier is waited for as often as it completes.
    jax.lax.fori_loop(jnp.maximum(count - stages, 0), count, leave, None)


def launch(
    kernel: Callable[[Arrays], None],
    *,
    inputs: Mapping[str, jax.Array],
    outputs: Mapping[str, jax.ShapeDtypeStruct],
    scratch: Mapping[str, Any],
    grid: Mapping[str, int],
    name: str,
    interpreted: bool,
) -> dict[str, jax.Array]:
    """Runs a kernel.

    Args:
        kernel: called in every warpgroup with the references to inputs, outputs and scratch by name.
        inputs: arrays.
        outputs: their shapes and dtypes.
        scratch: types of shared memory and barriers.
        grid: blocks along every axis, neighbours along the last of which run at the same time; and "warpgroup", the
            warpgroups of a block.
        name: of the kernel in profiles.
        interpreted: run in Pallas' interpreter instead of on a GPU.

    Returns:
        The outputs.
    """
    blocks = {axis: size for axis, size in grid.items() if axis != "warpgroup"}

    def body(*refs):
        kernel(dict(zip((*inputs, *outputs, *scratch), refs, strict=True)))

    results = plgpu.kernel(
        body,
        out_type=list(outputs.values()),
        scratch_types=list(scratch.values()),
        # exp2 is one instruction.
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=mgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams() if interpreted else None,
        kernel_name=name,
        grid=tuple(blocks.values()),
        grid_names=tuple(blocks),
        num_threads=grid["warpgroup"],
        thread_name="warpgroup",
    )(*inputs.values())
    return varying_like(next(iter(inputs.values())), dict(zip(outputs, results, strict=True)))
