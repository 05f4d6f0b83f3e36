"""Calls that every implementation is tested with: those of `ssd`, reduced to one token."""

import dataclasses

from pallas_kernels.common.arg_spec import Arguments, DType
from pallas_kernels.ssd import arg_specs as ssd


@dataclasses.dataclass(frozen=True, kw_only=True)
class SSDUpdateSpec:
    """A one-token call of `ssd`, without its time axis.

    Attributes:
        ssd: the call; it has an initial state, no segments and length 1.
    """

    ssd: ssd.SSDSpec

    @property
    def name(self) -> str:
        """Name of the specification of `ssd`."""
        return self.ssd.name

    @property
    def dtype(self) -> DType:
        """Dtype of x."""
        return self.ssd.dtype

    def arguments(self, seed: int = 0) -> Arguments:
        """Draws the arguments."""
        drawn = self.ssd.arguments(seed)
        wide = dict(drawn.wide)
        wide["state"] = wide.pop("initial_state")
        narrow = {name: array[:, 0] for name, array in drawn.narrow.items()}
        return Arguments(wide=wide, narrow=narrow, integers={}, static=drawn.static)


SPECS = tuple(
    SSDUpdateSpec(ssd=dataclasses.replace(spec, length=1, has_initial_state=True, has_segments=False))
    for spec in ssd.SPECS
    if spec.name != "one_token"
)
