"""What every implementation of the state-space duality op takes and returns."""

from pallas_kernels.common.arguments import Arguments, OpTable, arguments, array, interval, option, result
from pallas_kernels.common.array_types import Leaf

UNLIMITED = (0.0, float("inf"))


@arguments("ssd")
class SSDArguments(Arguments):
    """See `pallas_kernels.ssd.api.ssd`."""

    x: Leaf = array("BLHP")
    dt: Leaf = array("BLH")
    A: Leaf = array("H")
    B: Leaf = array("BLGN")
    C: Leaf = array("BLGN")
    D: Leaf | None = array("H", "HP", optional=True)
    dt_bias: Leaf | None = array("H", optional=True)
    initial_state: Leaf | None = array("BHPN", optional=True)
    segment_ids: Leaf | None = array("BL", optional=True, dtype="integer")
    dt_softplus: bool = option(False, choices=(False, True))
    dt_limit: tuple[float, float] = interval(UNLIMITED)


@arguments("ssd")
class DecayingAttentionArguments(Arguments):
    """Arguments of the core, linear attention whose heads decay: see `pallas_kernels.ssd.core`.

    Every backend takes these and returns an `SSDOutput`.

    Attributes:
        v: (B, L, H, P) values.
        log_decay: (B, L, H) logarithm of the decay of the state, at most 0, float32.
        scale: (B, L, H) factor of the values on their way into the state, float32.
        k: (B, L, G, N) keys; head h has those of group h // (H / G).
        q: (B, L, G, N) queries.
        D: (H,) or (H, P) skip connection; None is none.
        initial_state: (B, H, P, N) state before the first token; None is zero.
        segment_ids: (B, L) document of each token. Where the id differs from that of the token before, the state is
            zero before the token.
    """

    v: Leaf = array("BLHP")
    log_decay: Leaf = array("BLH")
    scale: Leaf = array("BLH")
    k: Leaf = array("BLGN")
    q: Leaf = array("BLGN")
    D: Leaf | None = array("H", "HP", optional=True)
    initial_state: Leaf | None = array("BHPN", optional=True)
    segment_ids: Leaf | None = array("BL", optional=True, dtype="integer")


@result
class SSDOutput:
    """Result of the op, and of its core.

    Attributes:
        y: (B, L, H, P), dtype of x.
        final_state: (B, H, P, N) state after the last token, float32.
    """

    y: Leaf = array("BLHP")
    final_state: Leaf = array("BHPN")


SSD = OpTable(SSDArguments, SSDOutput)
