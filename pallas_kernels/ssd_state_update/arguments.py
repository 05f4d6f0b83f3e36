"""What every implementation of the one-token form of `ssd` takes and returns."""

from pallas_kernels.common.arguments import Arguments, OpTable, arguments, array, interval, option, result
from pallas_kernels.common.array_types import Leaf
from pallas_kernels.ssd.arguments import UNLIMITED, DecayingAttentionArguments, SSDArguments
from pallas_kernels.ssd.core import as_decaying_attention


@arguments("ssd_state_update")
class SSDUpdateArguments(Arguments):
    """See `pallas_kernels.ssd_state_update.api.ssd_state_update`."""

    x: Leaf = array("BHP")
    state: Leaf = array("BHPN")
    dt: Leaf = array("BH")
    A: Leaf = array("H")
    B: Leaf = array("BGN")
    C: Leaf = array("BGN")
    D: Leaf | None = array("H", "HP", optional=True)
    dt_bias: Leaf | None = array("H", optional=True)
    dt_softplus: bool = option(False, choices=(False, True))
    dt_limit: tuple[float, float] = interval(UNLIMITED)

    def core(self) -> DecayingAttentionArguments:
        """Those of the core of `ssd`, for a sequence of one token."""
        return as_decaying_attention(
            SSDArguments(
                x=self.x[:, None],
                dt=self.dt[:, None],
                A=self.A,
                B=self.B[:, None],
                C=self.C[:, None],
                D=self.D,
                dt_bias=self.dt_bias,
                initial_state=self.state,
                segment_ids=None,
                dt_softplus=self.dt_softplus,
                dt_limit=self.dt_limit,
            )
        )


@result
class SSDUpdateOutput:
    """Result of one time step.

    Attributes:
        y: (B, H, P), dtype of x.
        state: (B, H, P, N) state after the token, float32.
    """

    y: Leaf = array("BHP")
    state: Leaf = array("BHPN")


SSD_UPDATE = OpTable(SSDUpdateArguments, SSDUpdateOutput)
