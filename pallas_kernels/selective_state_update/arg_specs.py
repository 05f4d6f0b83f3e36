"""Calls of the state update that every implementation is tested with: those of the scan, reduced to one token."""

import dataclasses

from pallas_kernels.common.arg_spec import Arguments, DType
from pallas_kernels.selective_scan import arg_specs as scan


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateUpdateSpec:
    """A one-token call of the selective scan, without its time axis.

    Attributes:
        scan: the call; it has an initial state, no segments and length 1.
    """

    scan: scan.ScanSpec

    @property
    def name(self) -> str:
        """Name of the scan's specification."""
        return self.scan.name

    @property
    def dtype(self) -> DType:
        """Dtype of x."""
        return self.scan.dtype

    def arguments(self, seed: int = 0) -> Arguments:
        """Draws the arguments."""
        drawn = self.scan.arguments(seed)

        def without_time(arrays):
            sequences = {"x", "dt", "z"} | {n for n in ("B", "C") if getattr(self.scan, n) == "grouped"}
            # One group for all channels is (B, 1, N), which a matrix of the only token is already.
            return {name: array[:, 0] if name in sequences else array for name, array in arrays.items()}

        wide = without_time(drawn.wide)
        wide["state"] = wide.pop("initial_state")
        return Arguments(wide=wide, narrow=without_time(drawn.narrow), integers={}, static=drawn.static)


SPECS = tuple(
    StateUpdateSpec(scan=dataclasses.replace(spec, length=1, has_initial_state=True, has_segments=False))
    for spec in scan.SPECS
    if spec.name != "one_token"
)
