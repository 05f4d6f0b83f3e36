"""The one-token form by definition: the reference of `ssd` over a sequence of one token."""

from pallas_kernels.ssd import reference
from pallas_kernels.ssd_state_update.arguments import SSDUpdateArguments, SSDUpdateOutput


def ssd_state_update(arguments: SSDUpdateArguments) -> SSDUpdateOutput:
    """See `pallas_kernels.ssd_state_update.api.ssd_state_update`."""
    output = reference.decaying_attention(arguments.core())
    return SSDUpdateOutput(y=output.y[:, 0], state=output.final_state)
