"""The operations of `pallas_kernels` as models call them: on arrays that are split over devices.

An operation's table says by letters what the dimensions of its arrays are. Here a letter becomes a logical axis, and
the rules of `mamba_jax.sharding` say which devices share it. A mixer knows neither.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels
from mamba_jax import sharding
from mamba_jax.models import sequence_parallel
from mamba_jax.sharding import Axis, per_shard
from pallas_kernels.common.arguments import members_of_groups

# Letters of `pallas_kernels`. The window before a sequence (W), channels of a head (P) and a group that serves all (1)
# are never split; several groups (G) lie with their channels or heads.
AXES = {
    "B": Axis.BATCH,
    "L": Axis.LENGTH,
    "E": Axis.INNER,
    "H": Axis.HEADS,
    "N": Axis.STATE,
    "K": Axis.CONV,
    "W": None,
    "P": None,
    "1": None,
}


def constrain(x: jax.Array, letters: str) -> jax.Array:
    """Pins an activation whose dimensions have these letters to the sharding rules."""
    return sharding.constrain(x, *(AXES[letter] for letter in letters))


@dataclasses.dataclass(frozen=True)
class ShardedOp[Output]:
    """An operation that each device runs on its own part of the arrays, under the mesh of `jax.set_mesh`.

    Attributes:
        op: function of keyword arguments, with a table in `pallas_kernels.TABLES` under its name.
        split: the same function of a device's part of sequences whose length is split, for use inside `per_shard`; None
            gives every device the sequences whole.
    """

    op: Callable[..., Output]
    split: Callable[..., Output] | None = None

    def __call__(self, *, past: int = 0, **arguments: Any) -> Output:
        """Calls the operation.

        Args:
            past: how many tokens before its own another part of the layer reaches; shorter parts are not made.
            **arguments: of the operation, arrays and options.
        """
        table = pallas_kernels.TABLES[self.op.__name__]
        arrays = {name: value for name, value in arguments.items() if name in table.arguments}
        options = {name: value for name, value in arguments.items() if name not in table.arguments}
        function, without_length = self.op, {"L": None}
        if self.split is not None and sequence_parallel.is_split(arrays["x"].shape[1], past=past):
            function, without_length = self.split, {}

        # Groups lie with their members, so both have one axis.
        members = members_of_groups("".join(table.outputs.values()))
        present = {name: array for name, array in arrays.items() if array is not None}
        axis = AXES[members]
        assert axis is not None
        groups, parts = {"G": axis}, sharding.parts(axis, table.sizes(present)[members])
        for name, array in present.items():
            if "G" in (letters := table.letters(name, array)):
                arrays[name] = _groups_for_parts(array, letters.index("G"), parts)

        def axes(letters: str) -> tuple[Axis | None, ...]:
            return tuple((AXES | groups | without_length)[letter] for letter in letters)

        def run(**arrays: Any) -> tuple[jax.Array, ...]:
            output = function(**arrays, **options)
            return tuple(getattr(output, name) for name in table.outputs)

        given = {name: axes(table.letters(name, array)) for name, array in arrays.items() if array is not None}
        outputs = per_shard(run, arrays, given, [axes(letters) for letters in table.outputs.values()])
        return table.returns(**dict(zip(table.outputs, outputs, strict=True)))


def _groups_for_parts(array: jax.Array, dim: int, parts: int) -> jax.Array:
    """The array with each of its groups as often, one after the other, as makes their number divide over `parts`.

    Members that divide over both divide over the new number too, and each keeps what its group had.
    """
    groups = array.shape[dim]
    repeats = math.lcm(groups, parts) // groups
    return array if repeats == 1 else jnp.repeat(array, repeats, axis=dim)


causal_conv1d = ShardedOp(pallas_kernels.causal_conv1d, sequence_parallel.convolve)
selective_scan = ShardedOp(pallas_kernels.selective_scan, sequence_parallel.scan)
selective_state_update = ShardedOp(pallas_kernels.selective_state_update)
ssd = ShardedOp(pallas_kernels.ssd, sequence_parallel.attend)
ssd_state_update = ShardedOp(pallas_kernels.ssd_state_update)
