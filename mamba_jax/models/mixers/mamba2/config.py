"""What a Mamba-2 mixer is made of."""

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

from mamba_jax.config_base import require
from mamba_jax.models.mixers.declaration import MIXERS, MixerConfig

if TYPE_CHECKING:
    from mamba_jax.models.mixers.mamba2.mixer import Mamba2
    from mamba_jax.models.published import Format

StepName = Literal["layers", "triton", "xla"]
SSDName = Literal["reference", "pallas_gpu", "pallas_tpu", "xla"]


@MIXERS.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2Config(MixerConfig):
    """The Mamba-2 mixer (arXiv 2405.21060, section 7) with the options of the authors' layer.

    Attributes:
        kind: discriminator between mixers.
        state_dim: N, recurrent states of a channel.
        head_dim: P, channels of a head.
        num_groups: G, groups of heads that share B and C.
        conv_width: K, taps of the short causal convolution over x, B and C.
        expand: inner channels are expand * d_model, unless `inner_dim` says how many they are.
        inner_dim: inner channels; None means expand * d_model.
        ssm_dim: channels that go through the recurrence, the others through a SwiGLU; None means all.
        dt_min: smallest initial step size.
        dt_max: largest initial step size.
        dt_init_floor: lower clamp of the initial step size.
        dt_lower_limit: least step size, whatever the input.
        dt_upper_limit: greatest step size, whatever the input; None means no limit.
        a_init_range: initial decay rates -A are uniform in this range.
        conv_init: initial weights of the convolution are uniform within +- this; None means K**-0.5.
        use_bias: biases on the input and output projections.
        use_conv_bias: bias on the convolution.
        skip: D is one number for each "head" or each "channel".
        use_norm: RMSNorm of what the gate gates; without it only the gate.
        norm_before_gate: normalise y and multiply by silu(z), not the product of both.
        norm_group_size: channels that are normalised together; None means those of a group.
        norm_eps: epsilon of that norm.
        learn_initial_state: the state before the first token of a document is a parameter.
        ssd_implementation: backend of the recurrence; None lets the platform decide.
        step_implementation: how a block reads one token in generation: "layers" one layer after the other, or a backend
            of `pallas_kernels.mamba2_step`; None is "triton" where it runs, and else "layers". Its matrices are stored
            by columns when a decoder is made.
        step_ring: tokens whose inputs generation keeps instead of writing the recurrent state after each of them: it is
            written when so many have come. Many rows wait for their states, which are then read but seldom written. It
            serves those steps that are one operation; 0 writes the state after every token.
    """

    kind: Literal["mamba2"] = "mamba2"
    state_dim: int = 128
    head_dim: int = 64
    num_groups: int = 1
    conv_width: int = 4
    expand: int = 2
    inner_dim: int | None = None
    ssm_dim: int | None = None
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
    dt_lower_limit: float = 0.0
    dt_upper_limit: float | None = None
    a_init_range: tuple[float, float] = (1.0, 16.0)
    conv_init: float | None = None
    use_bias: bool = False
    use_conv_bias: bool = True
    skip: Literal["head", "channel"] = "head"
    use_norm: bool = True
    norm_before_gate: bool = False
    norm_group_size: int | None = None
    norm_eps: float = 1e-5
    learn_initial_state: bool = False
    ssd_implementation: SSDName | None = None
    step_implementation: StepName | None = None
    step_ring: int = 0

    def _check(self) -> None:
        """Refuses sizes that are not positive, and pairs of limits that are not in order."""
        self._require_positive("state_dim", "head_dim", "num_groups", "conv_width", "expand", "ssm_dim", "norm_eps")
        self._require_positive("dt_min", "dt_init_floor", "dt_upper_limit", "conv_init", "norm_group_size", "inner_dim")
        for low, high in (("dt_min", "dt_max"), ("dt_lower_limit", "dt_upper_limit")):
            least, greatest = getattr(self, low), getattr(self, high)
            require(
                least >= 0 and (greatest is None or greatest >= least),
                f"Mamba2Config.{high} ({greatest}) must not be below {low} ({least}), nor this below 0",
            )
        require(self.step_ring >= 0, f"Mamba2Config.step_ring={self.step_ring} is below 0: give a number of tokens")
        require(
            not (self.step_ring and self.learn_initial_state),
            f"Mamba2Config.step_ring={self.step_ring} with learn_initial_state=True, which a ring cannot start from: "
            "make it 0",
        )
        low, high = self.a_init_range
        require(0 < low <= high, f"Mamba2Config.a_init_range must be positive and in order, got {self.a_init_range}")

    @classmethod
    def mixer(cls) -> "type[Mamba2]":
        """The Mamba-2 mixer."""
        from mamba_jax.models.mixers.mamba2.mixer import Mamba2

        return Mamba2

    def decisive(self, d_model: int) -> dict[str, Any]:
        """All but how random weights are drawn, how widths are arrived at, and backends."""
        free = ("expand", "dt_min", "dt_max", "dt_init_floor", "a_init_range", "conv_init")
        free += ("ssd_implementation", "step_implementation", "step_ring")
        derived = {
            "inner_dim": self.inner_channels(d_model),
            "ssm_dim": self.channels(d_model),
            "norm_group_size": self.group_size(d_model),
        }
        fields = dataclasses.asdict(self) | derived
        return {name: value for name, value in fields.items() if name not in free}

    @property
    def reads_columns(self) -> bool:
        """See `MixerConfig.reads_columns`."""
        from mamba_jax.models.mixers.one_token import is_by_kernels

        return is_by_kernels(self)

    @property
    def has_step(self) -> bool:
        """Whether `pallas_kernels.mamba2_step` computes what the mixer does, without channels that are only gated."""
        return (
            self.use_norm
            and self.use_conv_bias
            and not self.norm_before_gate
            and not self.use_bias
            and not self.learn_initial_state
        )

    @classmethod
    def formats(cls) -> "tuple[Format, ...]":
        """Those of the authors and of `transformers`."""
        from mamba_jax.models.mixers.mamba2.published import FORMATS

        return FORMATS

    def inner_channels(self, d_model: int) -> int:
        """Channels inside the mixer."""
        return self.expand * d_model if self.inner_dim is None else self.inner_dim

    def channels(self, d_model: int) -> int:
        """E, channels that go through the recurrence.

        Raises:
            InputError: they do not divide into heads, heads not into groups, or channels not into groups of the norm.
        """
        inner = self.inner_channels(d_model)
        channels = inner if self.ssm_dim is None else self.ssm_dim
        of_what = "expand * d_model" if self.inner_dim is None else "inner_dim"
        require(channels <= inner, f"Mamba2Config.ssm_dim={channels} is more than {of_what} = {inner}: make it less")
        self._require_divisor("head_dim", self.head_dim, channels, "channels")
        self._require_divisor("num_groups", self.num_groups, channels // self.head_dim, "heads")
        if self.norm_group_size is not None:
            self._require_divisor("norm_group_size", self.norm_group_size, channels, "channels")
        return channels

    def _require_divisor(self, name: str, divisor: int, number: int, what: str) -> None:
        require(
            number % divisor == 0,
            f"Mamba2Config.{name}={divisor} does not divide the {number} {what}: change it, or "
            f"{'d_model and expand' if self.inner_dim is None else 'inner_dim'}",
        )

    def gated_channels(self, d_model: int) -> int:
        """Channels that go through the SwiGLU instead."""
        return self.inner_channels(d_model) - self.channels(d_model)

    def heads(self, d_model: int) -> int:
        """H, heads of the recurrence."""
        return self.channels(d_model) // self.head_dim

    def group_size(self, d_model: int) -> int:
        """Channels that are normalised together."""
        return self.norm_group_size or self.channels(d_model) // self.num_groups

    @property
    def dt_limit(self) -> tuple[float, float]:
        """Least and greatest step size."""
        return self.dt_lower_limit, float("inf") if self.dt_upper_limit is None else self.dt_upper_limit

    @property
    def past(self) -> int:
        """K - 1, inputs before a token that the convolution reaches."""
        return self.conv_width - 1
