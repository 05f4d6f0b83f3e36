"""What every implementation of the Mamba-2 step takes and returns."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.common.arguments import Arguments, arguments, array, interval, result
from pallas_kernels.common.array_types import Leaf
from pallas_kernels.ssd.arguments import UNLIMITED


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2Weights:
    """What a residual block with a Mamba-2 mixer computes with.

    The dtype of the window is the compute dtype, which the projections have too, or they are int8 and come with a scale
    for each column: a weight is their product. Vectors may have any floating dtype; sizes are D of the residual stream,
    E = H P inner channels in H heads, N states of a channel, G groups of heads, K taps, M = 2 G N channels of B and C.

    Attributes:
        norm_scale: (D,) of the RMSNorm before the mixer.
        in_proj: (D, 2, E), to z and to x.
        BC_proj: (D, 2, G, N), to B and to C.
        dt_proj: (D, H).
        conv_weight: (K, E), tap K - 1 for the current token.
        conv_bias: (E,).
        BC_conv_weight: (K, M).
        BC_conv_bias: (M,).
        dt_bias: (H,).
        A_log: (H,), of which exp(A_log) = -A are the decay rates.
        D: (H,) or (H, P) skip connection.
        gated_norm_scale: (E,) of the RMSNorm of what the gate gates.
        out_proj: (E, D).
        in_proj_scale: (2, E) of int8 weights, as all scales; None without.
        BC_proj_scale: (2, G, N).
        dt_proj_scale: (H,).
        out_proj_scale: (D,).
    """

    norm_scale: Leaf
    in_proj: Leaf
    BC_proj: Leaf
    dt_proj: Leaf
    conv_weight: Leaf
    conv_bias: Leaf
    BC_conv_weight: Leaf
    BC_conv_bias: Leaf
    dt_bias: Leaf
    A_log: Leaf
    D: Leaf
    gated_norm_scale: Leaf
    out_proj: Leaf
    in_proj_scale: Leaf | None = None
    BC_proj_scale: Leaf | None = None
    dt_proj_scale: Leaf | None = None
    out_proj_scale: Leaf | None = None


@arguments("mamba2_step")
class StepArguments(Arguments):
    """See `pallas_kernels.mamba2_step.api.mamba2_step`; letters: D residual stream, T = 2, M = 2 G N, W = K - 1,
    L tokens of the ring, R = G N.
    """

    derived = {"W": ("K", -1)}  # noqa: RUF012  a class variable of `Arguments`

    residual: Leaf = array("BD")
    state: Leaf = array("BHPN")
    norm_scale: Leaf = array("D")
    in_proj: Leaf = array("DTE", dtype="weight")
    BC_proj: Leaf = array("DTGN", dtype="weight")
    dt_proj: Leaf = array("DH", dtype="weight")
    conv_weight: Leaf = array("KE")
    conv_bias: Leaf = array("E")
    BC_conv_weight: Leaf = array("KM")
    BC_conv_bias: Leaf = array("M")
    dt_bias: Leaf = array("H")
    A_log: Leaf = array("H")
    D: Leaf = array("H", "HP")
    gated_norm_scale: Leaf = array("E")
    out_proj: Leaf = array("ED", dtype="weight")
    window: Leaf = array("BWE")
    BC_window: Leaf = array("BWM")
    ring_x: Leaf | None = array("BLE", optional=True)
    ring_B: Leaf | None = array("BLR", optional=True)
    ring_dt: Leaf | None = array("BLH", optional=True)
    ring_length: Leaf | None = array("B", optional=True, dtype="integer")
    in_proj_scale: Leaf | None = array("TE", optional=True)
    BC_proj_scale: Leaf | None = array("TGN", optional=True)
    dt_proj_scale: Leaf | None = array("H", optional=True)
    out_proj_scale: Leaf | None = array("D", optional=True)
    dt_limit: tuple[float, float] = interval(UNLIMITED)
    eps: float = dataclasses.field(metadata={"static": True})
    gated_norm_eps: float = dataclasses.field(metadata={"static": True})
    group_size: int = dataclasses.field(metadata={"static": True})

    def check_projections(self) -> None:
        """Raises ValueError unless sizes follow from each other as described, and projections have one dtype."""
        _, heads, width, _ = self.state.shape
        channels, twos = heads * width, (self.in_proj.shape[1], self.BC_proj.shape[1])
        if self.in_proj.shape[2] != channels or twos != (2, 2):
            raise ValueError(
                f"{self.op}: in_proj {self.in_proj.shape} and BC_proj {self.BC_proj.shape} do not fit the state "
                f"{self.state.shape}: expected (D, 2, H P) and (D, 2, G, N)"
            )
        if (of_both := self.BC_proj[0].size) != self.BC_conv_bias.shape[0]:
            raise ValueError(
                f"{self.op}: BC_conv_bias has {self.BC_conv_bias.shape[0]} channels, expected 2 G N = {of_both}"
            )
        given = [ring is not None for ring in (self.ring_x, self.ring_B, self.ring_dt, self.ring_length)]
        if any(given) and not all(given):
            raise ValueError(f"{self.op}: a ring lacks one of its arrays: give all four, or none")
        if self.ring_B is not None and 2 * self.ring_B.shape[2] != of_both:
            raise ValueError(f"{self.op}: ring_B has {self.ring_B.shape[2]} channels, expected G N = {of_both // 2}")
        if self.group_size < 1 or channels % self.group_size:
            raise ValueError(f"{self.op}: group_size={self.group_size} does not divide the {channels} channels")
        self.require_one_dtype("in_proj", "BC_proj", "dt_proj", "out_proj")
        self.require_scales("in_proj", "BC_proj", "dt_proj", "out_proj")

    @property
    def compute_dtype(self) -> jnp.dtype:
        """What operands and results of the products are rounded to."""
        return self.in_proj.dtype if self.in_proj_scale is None else self.window.dtype


@result
class Mamba2Carry:
    """What a residual block is given for a token, and what it gives back in its place, each in the same dtype.

    Attributes:
        residual: (B, D) residual stream.
        window: (B, K - 1, E) last inputs of the convolution of x, in the compute dtype.
        BC_window: (B, K - 1, M) those of B and C, likewise.
        state: (B, H, P, N) recurrent state; with a ring the one before the ring's tokens.
        ring_x: (B, L, E) inputs of the recurrence of the last tokens, in the compute dtype as all of the ring; None is
            no ring.
        ring_B: (B, L, G N) their B.
        ring_dt: (B, L, H) their step sizes before bias, softplus and limits.
        ring_length: (B,) how many of the L places are taken, the first ones; fewer than L.
    """

    residual: Leaf = array("BD")
    window: Leaf = array("BWE")
    BC_window: Leaf = array("BWM")
    state: Leaf = array("BHPN")
    ring_x: Leaf | None = array("BLE", optional=True)
    ring_B: Leaf | None = array("BLR", optional=True)
    ring_dt: Leaf | None = array("BLH", optional=True)
    ring_length: Leaf | None = array("B", optional=True, dtype="integer")
