"""State-space operations as pure functions on arrays, each with one signature for every backend."""

from pallas_kernels.causal_conv1d.api import causal_conv1d
from pallas_kernels.causal_conv1d.arguments import CONVOLUTION, ConvOutput
from pallas_kernels.common.arguments import OpTable
from pallas_kernels.common.derivatives import differentiable
from pallas_kernels.common.triton.launch import has_triton as has_step_kernels
from pallas_kernels.mamba1_step.api import mamba1_step
from pallas_kernels.mamba1_step.arguments import Mamba1StepOutput, Mamba1Weights
from pallas_kernels.mamba2_step.api import mamba2_step
from pallas_kernels.mamba2_step.arguments import Mamba2Carry, Mamba2Weights
from pallas_kernels.mamba2_step.xla.replay import settled_state as mamba2_settled_state
from pallas_kernels.selective_scan.api import selective_scan
from pallas_kernels.selective_scan.arguments import FINAL_STATE, INITIAL_COTANGENT, SCAN, ScanArguments, ScanOutput
from pallas_kernels.selective_scan.edge_states import selective_scan_final_state, selective_scan_initial_cotangent
from pallas_kernels.selective_state_update.api import selective_state_update
from pallas_kernels.selective_state_update.arguments import STATE_UPDATE, StateUpdateOutput
from pallas_kernels.ssd.api import ssd
from pallas_kernels.ssd.arguments import SSD, DecayingAttentionArguments, SSDArguments, SSDOutput
from pallas_kernels.ssd.core import as_decaying_attention, decaying_attention
from pallas_kernels.ssd.edge_states import ssd_final_state, ssd_initial_cotangent
from pallas_kernels.ssd_state_update.api import ssd_state_update
from pallas_kernels.ssd_state_update.arguments import SSD_UPDATE, SSDUpdateOutput

# What each op takes and returns, by name: a line an op.
TABLES: dict[str, OpTable] = {
    "causal_conv1d": CONVOLUTION,
    "selective_scan": SCAN,
    "selective_scan_final_state": FINAL_STATE,
    "selective_scan_initial_cotangent": INITIAL_COTANGENT,
    "selective_state_update": STATE_UPDATE,
    "ssd": SSD,
    "ssd_state_update": SSD_UPDATE,
}

__all__ = [
    "TABLES",
    "ConvOutput",
    "DecayingAttentionArguments",
    "Mamba1StepOutput",
    "Mamba1Weights",
    "Mamba2Carry",
    "Mamba2Weights",
    "OpTable",
    "SSDArguments",
    "SSDOutput",
    "SSDUpdateOutput",
    "ScanArguments",
    "ScanOutput",
    "StateUpdateOutput",
    "as_decaying_attention",
    "causal_conv1d",
    "decaying_attention",
    "differentiable",
    "has_step_kernels",
    "mamba1_step",
    "mamba2_settled_state",
    "mamba2_step",
    "selective_scan",
    "selective_scan_final_state",
    "selective_scan_initial_cotangent",
    "selective_state_update",
    "ssd",
    "ssd_final_state",
    "ssd_initial_cotangent",
    "ssd_state_update",
]
