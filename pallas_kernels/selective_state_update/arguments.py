"""What every implementation of the state update takes and returns."""

from pallas_kernels.common.arguments import Arguments, OpTable, arguments, array, option, result
from pallas_kernels.common.array_types import Leaf
from pallas_kernels.selective_scan.arguments import Discretization

# Input and output matrices: of each group of channels, or constant over time.
_MATRIX = ("BGN", "EN")


@arguments("selective_state_update")
class StateUpdateArguments(Arguments):
    """See `pallas_kernels.selective_state_update.api.selective_state_update`."""

    x: Leaf = array("BE")
    state: Leaf = array("BEN", complex_with="A")
    dt: Leaf = array("BE")
    A: Leaf = array("EN", dtype="complex")
    B: Leaf = array(*_MATRIX, complex_with="A")
    C: Leaf = array(*_MATRIX, complex_with="A")
    D: Leaf | None = array("E", optional=True)
    z: Leaf | None = array("BE", optional=True)
    dt_bias: Leaf | None = array("E", optional=True)
    dt_softplus: bool = option(False, choices=(False, True))
    discretization: Discretization = option("euler", choices=("euler", "zoh"))


@result
class StateUpdateOutput:
    """Result of one time step.

    Attributes:
        y: (B, E), dtype of x.
        state: (B, E, N) state after the token, float32 (complex64 for a complex A).
    """

    y: Leaf = array("BE")
    state: Leaf = array("BEN")


STATE_UPDATE = OpTable(StateUpdateArguments, StateUpdateOutput)
