"""What every implementation of the Mamba-1 step takes and returns."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.common.arguments import Arguments, arguments, array, result
from pallas_kernels.common.array_types import Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba1Weights:
    """What a residual block with a Mamba-1 mixer computes with.

    The dtype of the window is the compute dtype, which the projections have too, or they are int8 and come with a scale
    for each column: a weight is their product. Vectors and A may have any floating dtype; sizes are D of the residual
    stream, E inner channels, N states, K taps, R rank of the step size.

    Attributes:
        norm_scale: (D,) of the RMSNorm before the mixer.
        in_proj: (D, 2, E), to x and to z.
        conv_weight: (K, E), tap K - 1 for the current token.
        conv_bias: (E,).
        x_proj: (E, R + 2 N), to what dt is projected from, to B and to C.
        dt_proj: (R, E).
        dt_bias: (E,).
        A_log: (E, N), of which exp(A_log) = -A are the decay rates.
        D: (E,) skip connection.
        out_proj: (E, D).
        in_proj_scale: (2, E) of int8 weights, as all scales; None without.
        x_proj_scale: (R + 2 N,).
        dt_proj_scale: (E,).
        out_proj_scale: (D,).
    """

    norm_scale: Leaf
    in_proj: Leaf
    conv_weight: Leaf
    conv_bias: Leaf
    x_proj: Leaf
    dt_proj: Leaf
    dt_bias: Leaf
    A_log: Leaf
    D: Leaf
    out_proj: Leaf
    in_proj_scale: Leaf | None = None
    x_proj_scale: Leaf | None = None
    dt_proj_scale: Leaf | None = None
    out_proj_scale: Leaf | None = None


@arguments("mamba1_step")
class StepArguments(Arguments):
    """See `pallas_kernels.mamba1_step.api.mamba1_step`; letters: D residual stream, P = 2, M = R + 2 N, W = K - 1."""

    derived = {"W": ("K", -1)}  # noqa: RUF012  a class variable of `Arguments`

    residual: Leaf = array("BD")
    norm_scale: Leaf = array("D")
    in_proj: Leaf = array("DPE", dtype="weight")
    conv_weight: Leaf = array("KE")
    conv_bias: Leaf = array("E")
    A_log: Leaf = array("EN")
    dt_proj: Leaf = array("RE", dtype="weight")
    x_proj: Leaf = array("EM", dtype="weight")
    dt_bias: Leaf = array("E")
    D: Leaf = array("E")
    out_proj: Leaf = array("ED", dtype="weight")
    window: Leaf = array("BWE")
    state: Leaf = array("BEN")
    in_proj_scale: Leaf | None = array("PE", optional=True)
    x_proj_scale: Leaf | None = array("M", optional=True)
    dt_proj_scale: Leaf | None = array("E", optional=True)
    out_proj_scale: Leaf | None = array("D", optional=True)
    eps: float = dataclasses.field(metadata={"static": True})

    def check_projections(self) -> None:
        """Raises ValueError unless in_proj and x_proj have the sizes that others leave, and projections one dtype."""
        if self.in_proj.shape[1] != 2:
            raise ValueError(f"{self.op}: in_proj has shape {self.in_proj.shape}, expected (D, 2, E), to x and to z")
        columns = self.dt_proj.shape[0] + 2 * self.A_log.shape[1]
        if self.x_proj.shape[1] != columns:
            raise ValueError(f"{self.op}: x_proj has {self.x_proj.shape[1]} columns, expected R + 2 N = {columns}")
        self.require_one_dtype("in_proj", "x_proj", "dt_proj", "out_proj")
        self.require_scales("in_proj", "x_proj", "dt_proj", "out_proj")

    @property
    def compute_dtype(self) -> jnp.dtype:
        """What operands and results of the products are rounded to."""
        return self.in_proj.dtype if self.in_proj_scale is None else self.window.dtype


@result
class Mamba1StepOutput:
    """Result of one token of a residual block.

    Attributes:
        residual: (B, D) residual stream after the block, in its dtype.
        window: (B, K - 1, E) last inputs of the convolution, in the dtype of the window before.
        state: (B, E, N) recurrent state after the token, in the dtype of the state before.
    """

    residual: Leaf = array("BD")
    window: Leaf = array("BWE")
    state: Leaf = array("BEN")
