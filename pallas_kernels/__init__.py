"""State-space operations as pure functions on arrays, each with one signature for every backend."""

from pallas_kernels.causal_conv1d.api import causal_conv1d
from pallas_kernels.causal_conv1d.arguments import ConvOutput
from pallas_kernels.common.derivatives import differentiable
from pallas_kernels.selective_scan.api import selective_scan
from pallas_kernels.selective_scan.arguments import ScanOutput
from pallas_kernels.selective_scan.edge_states import selective_scan_final_state, selective_scan_initial_cotangent
from pallas_kernels.selective_state_update.api import selective_state_update
from pallas_kernels.selective_state_update.arguments import StateUpdateOutput

__all__ = [
    "ConvOutput",
    "ScanOutput",
    "StateUpdateOutput",
    "causal_conv1d",
    "differentiable",
    "selective_scan",
    "selective_scan_final_state",
    "selective_scan_initial_cotangent",
    "selective_state_update",
]
