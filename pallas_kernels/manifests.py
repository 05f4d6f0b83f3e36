"""The manifests of all ops, by name: what tests, benchmarks and documents read.

No implementation imports this module.
"""

from pallas_kernels.causal_conv1d import arg_specs as causal_conv1d
from pallas_kernels.common.arg_spec import Manifest
from pallas_kernels.selective_scan import arg_specs as selective_scan
from pallas_kernels.selective_state_update import arg_specs as selective_state_update
from pallas_kernels.ssd import arg_specs as ssd
from pallas_kernels.ssd_state_update import arg_specs as ssd_state_update

# A line an op.
MANIFESTS: dict[str, Manifest] = {
    "causal_conv1d": causal_conv1d.MANIFEST,
    "selective_scan": selective_scan.MANIFEST,
    "selective_state_update": selective_state_update.MANIFEST,
    "ssd": ssd.MANIFEST,
    "ssd_state_update": ssd_state_update.MANIFEST,
}
