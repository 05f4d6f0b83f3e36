"""Calls of the state update: those of the scan, reduced to one token; what it is timed with, and judged by."""

import dataclasses

from pallas_kernels.common.arg_spec import Arguments, Manifest, Tolerance, without_length
from pallas_kernels.selective_scan import arg_specs as scan


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateUpdateSpec(scan.ScanSpec):
    """A one-token call of the selective scan, without its time axis; it has a state and no segments."""

    length: int = 1

    def arguments(self, seed: int = 0) -> Arguments:
        """Draws the arguments."""
        drawn = super().arguments(seed)

        def without_time(arrays):
            sequences = {"x", "dt", "z"} | {n for n in ("B", "C") if getattr(self, n) == "grouped"}
            # One group for all channels is (B, 1, N), which a matrix of the only token is already.
            return {name: array[:, 0] if name in sequences else array for name, array in arrays.items()}

        wide = without_time(drawn.wide)
        wide["state"] = wide.pop("initial_state")
        return Arguments(wide=wide, narrow=without_time(drawn.narrow), integers={}, static=drawn.static)


SPECS = tuple(
    StateUpdateSpec(**(vars(spec) | {"length": 1, "has_initial_state": True, "has_segments": False}))
    for spec in scan.SPECS
    if spec.name != "one_token"
)


_LARGE = StateUpdateSpec(name="mamba_130m", batch=128, channels=1536, states=16)
MANIFEST = Manifest(
    sizes=("batch", "channels", "states"),
    tested=SPECS,
    timed={
        "cpu": (dataclasses.replace(_LARGE, name="small", batch=16, channels=512),),
        "accelerator": (
            _LARGE,
            dataclasses.replace(_LARGE, name="mamba_2_8b", channels=5120),
            dataclasses.replace(_LARGE, name="one_row", batch=1),
        ),
    },
    tolerance=Tolerance(
        longest_sum={"B": 1, "E": 1, "N": 1},
        because="the gradients of A, D and dt_bias add over rows, those of B and C over channels, outputs over states",
    ),
    forward=without_length(scan.MANIFEST.forward),
    backward=without_length(scan.MANIFEST.backward),
)
