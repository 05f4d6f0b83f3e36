"""State-space operations as pure functions on arrays, each with one signature for every backend."""

from pallas_kernels.causal_conv1d.api import causal_conv1d
from pallas_kernels.causal_conv1d.arguments import CONVOLUTION, ConvOutput
from pallas_kernels.common.arguments import OpTable
from pallas_kernels.common.derivatives import differentiable
from pallas_kernels.selective_scan.api import selective_scan
from pallas_kernels.selective_scan.arguments import FINAL_STATE, INITIAL_COTANGENT, SCAN, ScanArguments, ScanOutput
from pallas_kernels.selective_scan.edge_states import selective_scan_final_state, selective_scan_initial_cotangent
from pallas_kernels.selective_state_update.api import selective_state_update
from pallas_kernels.selective_state_update.arguments import STATE_UPDATE, StateUpdateOutput
from pallas_kernels.ssd.api import ssd
from pallas_kernels.ssd.arguments import SSD, SSDArguments, SSDOutput

# What each op takes and returns, by name: a line an op.
TABLES: dict[str, OpTable] = {
    "causal_conv1d": CONVOLUTION,
    "selective_scan": SCAN,
    "selective_scan_final_state": FINAL_STATE,
    "selective_scan_initial_cotangent": INITIAL_COTANGENT,
    "selective_state_update": STATE_UPDATE,
    "ssd": SSD,
}

__all__ = [
    "TABLES",
    "ConvOutput",
    "OpTable",
    "SSDArguments",
    "SSDOutput",
    "ScanArguments",
    "ScanOutput",
    "StateUpdateOutput",
    "causal_conv1d",
    "differentiable",
    "selective_scan",
    "selective_scan_final_state",
    "selective_scan_initial_cotangent",
    "selective_state_update",
    "ssd",
]
