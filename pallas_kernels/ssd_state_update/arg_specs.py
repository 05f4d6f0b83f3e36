"""Calls of the one-token form: those of `ssd`, reduced to one token; what it is timed with, and judged by."""

import dataclasses

from pallas_kernels.common.arg_spec import Arguments, Manifest, Tolerance, without_length
from pallas_kernels.ssd import arg_specs as ssd


@dataclasses.dataclass(frozen=True, kw_only=True)
class SSDUpdateSpec(ssd.SSDSpec):
    """A one-token call of `ssd`, without its time axis; it has a state and no segments."""

    length: int = 1

    def arguments(self, seed: int = 0) -> Arguments:
        """Draws the arguments."""
        drawn = super().arguments(seed)
        wide = dict(drawn.wide)
        wide["state"] = wide.pop("initial_state")
        narrow = {name: array[:, 0] for name, array in drawn.narrow.items()}
        return Arguments(wide=wide, narrow=narrow, integers={}, static=drawn.static)


SPECS = tuple(
    SSDUpdateSpec(**(vars(spec) | {"length": 1, "has_initial_state": True, "has_segments": False}))
    for spec in ssd.SPECS
    if spec.name != "one_token"
)
_LARGE = SSDUpdateSpec(name="mamba2_130m", batch=128, heads=24, width=64, states=128, groups=1)
MANIFEST = Manifest(
    sizes=("batch", "heads", "width", "states"),
    tested=SPECS,
    timed={
        "cpu": (dataclasses.replace(_LARGE, name="small", batch=16, heads=8),),
        "accelerator": (
            _LARGE,
            dataclasses.replace(_LARGE, name="mamba2_2_7b", heads=80),
            dataclasses.replace(_LARGE, name="one_row", batch=1),
        ),
    },
    tolerance=Tolerance(
        longest_sum={"B": 1, "H": 1, "P": 1, "N": 1},
        because="the gradients of A, D and dt_bias add over rows, after channels and states; those of B "
        "and C over heads and channels, outputs over states",
    ),
    forward=without_length(ssd.MANIFEST.forward),
    backward=without_length(ssd.MANIFEST.backward),
)
