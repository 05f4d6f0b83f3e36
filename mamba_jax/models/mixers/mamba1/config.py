"""What a Mamba-1 mixer is made of."""

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Literal

from mamba_jax.config_base import require
from mamba_jax.models.mixers.declaration import MIXERS, MixerConfig

if TYPE_CHECKING:
    from mamba_jax.models.mixers.mamba1.mixer import Mamba1
    from mamba_jax.models.published import Format

ScanName = Literal["reference", "pallas_gpu", "pallas_tpu", "triton", "xla", "xla_sequential", "xla_associative"]
StepName = Literal["layers", "triton", "xla"]


@MIXERS.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba1Config(MixerConfig):
    """The Mamba-1 mixer (arXiv 2312.00752, sections 3.2-3.6) and the ablations of its section 4.6.

    Attributes:
        kind: discriminator between mixers.
        state_dim: N, recurrent states per inner channel.
        conv_width: K, taps of the short causal convolution.
        expand: inner channels E = expand * d_model.
        dt_rank: R, rank of the projection that makes dt; None means ceil(d_model / 16).
        dt_min: smallest initial step size.
        dt_max: largest initial step size.
        dt_init: distribution of the dt projection's weights.
        dt_scale: scale of the dt projection's initial weights, times R**-0.5.
        dt_init_floor: lower clamp of the initial step size.
        use_bias: biases on the input and output projections.
        use_conv_bias: bias on the convolution.
        use_conv: the short convolution; False leaves only its SiLU.
        use_gate: the SiLU(z) output gate; False also halves the input projection.
        selective: which of dt, B and C depend on the input; the others are learned constants.
        discretization: how B is discretised: "euler" is dt * B as in the released code, "zoh" the exact zero-order hold
            (exp(dt A) - 1) / A * B of the paper's equation 4.
        a_init: "s4d_real" is A_n = -(n + 1), "constant" is -1/2, "random" is -exp(normal).
        selection_norm_eps: RMSNorm of B, C and what dt is projected from, with this epsilon; None is none.
        selection_norm_weights: these norms have weights, as in Jamba (arXiv 2403.19887, section 6.4); in FalconMamba
            (arXiv 2410.05355) they have none.
        scan_implementation: backend of the selective scan; None lets the platform decide.
        step_implementation: how a block reads one token in generation: "layers" one layer after the other, or a backend
            of `pallas_kernels.mamba1_step`; None is "triton" where it runs, and else "layers". Its matrices are stored
            by columns when a decoder is made.
    """

    kind: Literal["mamba1"] = "mamba1"
    state_dim: int = 16
    conv_width: int = 4
    expand: int = 2
    dt_rank: int | None = None
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init: Literal["random", "constant"] = "random"
    dt_scale: float = 1.0
    dt_init_floor: float = 1e-4
    use_bias: bool = False
    use_conv_bias: bool = True
    use_conv: bool = True
    use_gate: bool = True
    selective: tuple[Literal["dt", "B", "C"], ...] = ("dt", "B", "C")
    discretization: Literal["euler", "zoh"] = "euler"
    a_init: Literal["s4d_real", "constant", "random"] = "s4d_real"
    selection_norm_eps: float | None = None
    selection_norm_weights: bool = False
    scan_implementation: ScanName | None = None
    step_implementation: StepName | None = None

    def _check(self) -> None:
        """Refuses sizes that are not positive, a `dt_max` below `dt_min`, and projections named twice."""
        self._require_positive("state_dim", "conv_width", "expand", "dt_rank", "dt_min", "dt_scale", "dt_init_floor")
        self._require_positive("selection_norm_eps")
        require(
            self.dt_max >= self.dt_min, f"Mamba1Config.dt_max ({self.dt_max}) must not be below dt_min ({self.dt_min})"
        )
        require(
            self.selection_norm_eps is not None or not self.selection_norm_weights,
            "Mamba1Config.selection_norm_weights=True without a norm: give selection_norm_eps, such as 1e-6",
        )
        require(
            len(set(self.selective)) == len(self.selective),
            f"Mamba1Config.selective names a projection twice: {self.selective}",
        )

    @classmethod
    def mixer(cls) -> "type[Mamba1]":
        """The Mamba-1 mixer."""
        from mamba_jax.models.mixers.mamba1.mixer import Mamba1

        return Mamba1

    def decisive(self, d_model: int) -> dict[str, Any]:
        """All but how random weights are drawn, and backends."""
        free = ("dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "a_init")
        free += ("scan_implementation", "step_implementation")
        fields = dataclasses.asdict(self) | {"dt_rank": self.rank(d_model)}
        return {name: value for name, value in fields.items() if name not in free}

    @property
    def reads_columns(self) -> bool:
        """See `MixerConfig.reads_columns`."""
        from mamba_jax.models.mixers.one_token import is_by_kernels

        return is_by_kernels(self)

    @property
    def has_step(self) -> bool:
        """Whether `pallas_kernels.mamba1_step` computes what the mixer does: it has no options of ablations."""
        return (
            self.use_conv
            and self.use_conv_bias
            and self.use_gate
            and not self.use_bias
            and len(self.selective) == 3
            and self.selection_norm_eps is None
            and self.discretization == "euler"
        )

    @classmethod
    def formats(cls) -> "tuple[Format, ...]":
        """Those of the authors and of `transformers`."""
        from mamba_jax.models.mixers.mamba1.published import FORMATS

        return FORMATS

    def channels(self, d_model: int) -> int:
        """E, channels inside the mixer."""
        return self.expand * d_model

    def rank(self, d_model: int) -> int:
        """R, rank of the projection that makes dt."""
        return self.dt_rank if self.dt_rank is not None else math.ceil(d_model / 16)

    @property
    def past(self) -> int:
        """K - 1, inputs before a token that the convolution reaches."""
        return self.conv_width - 1 if self.use_conv else 0
