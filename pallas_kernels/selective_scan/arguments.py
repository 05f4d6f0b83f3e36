"""What every implementation of the selective scan, and of its states at an edge, takes and returns."""

from typing import Literal

from pallas_kernels.common.arguments import Arguments, OpTable, arguments, array, option, result
from pallas_kernels.common.array_types import Leaf

Discretization = Literal["euler", "zoh"]
# Input and output matrices: shared by all channels, shared by each group of channels, or constant over time.
_MATRIX = ("BLN", "BLGN", "EN")


@arguments("selective_scan")
class ScanArguments(Arguments):
    """See `pallas_kernels.selective_scan.api.selective_scan`."""

    x: Leaf = array("BLE")
    dt: Leaf = array("BLE")
    A: Leaf = array("EN", dtype="complex")
    B: Leaf = array(*_MATRIX, complex_with="A")
    C: Leaf = array(*_MATRIX, complex_with="A")
    D: Leaf | None = array("E", optional=True)
    z: Leaf | None = array("BLE", optional=True)
    dt_bias: Leaf | None = array("E", optional=True)
    initial_state: Leaf | None = array("BEN", optional=True, complex_with="A")
    segment_ids: Leaf | None = array("BL", optional=True, dtype="integer")
    dt_softplus: bool = option(False, choices=(False, True))
    discretization: Discretization = option("euler", choices=("euler", "zoh"))


@result
class ScanOutput:
    """Result of a selective scan.

    Attributes:
        y: (B, L, E), dtype of x.
        final_state: (B, E, N) state after the last token, float32 (complex64 for a complex A).
    """

    y: Leaf = array("BLE")
    final_state: Leaf = array("BEN")


@arguments("selective_scan_final_state")
class FinalStateArguments(Arguments):
    """See `pallas_kernels.selective_scan.edge_states.selective_scan_final_state`."""

    x: Leaf = array("BLE")
    dt: Leaf = array("BLE")
    A: Leaf = array("EN", dtype="complex")
    B: Leaf = array(*_MATRIX, complex_with="A")
    dt_bias: Leaf | None = array("E", optional=True)
    segment_ids: Leaf | None = array("BL", optional=True, dtype="integer")
    dt_softplus: bool = option(False, choices=(False, True))
    discretization: Discretization = option("euler", choices=("euler", "zoh"))


@arguments("selective_scan_initial_cotangent")
class InitialCotangentArguments(Arguments):
    """See `pallas_kernels.selective_scan.edge_states.selective_scan_initial_cotangent`."""

    dy: Leaf = array("BLE")
    dt: Leaf = array("BLE")
    A: Leaf = array("EN", dtype="complex")
    C: Leaf = array(*_MATRIX, complex_with="A")
    z: Leaf | None = array("BLE", optional=True)
    dt_bias: Leaf | None = array("E", optional=True)
    segment_ids: Leaf | None = array("BL", optional=True, dtype="integer")
    dt_softplus: bool = option(False, choices=(False, True))


AnyScanArguments = ScanArguments | FinalStateArguments | InitialCotangentArguments


@result
class EdgeState:
    """A state, or its cotangent, at an edge of a run of tokens.

    Attributes:
        state: (B, E, N), float32 (complex64 for a complex A).
    """

    state: Leaf = array("BEN")


SCAN = OpTable(ScanArguments, ScanOutput)
FINAL_STATE = OpTable(FinalStateArguments, EdgeState)
INITIAL_COTANGENT = OpTable(InitialCotangentArguments, EdgeState)
