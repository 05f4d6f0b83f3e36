"""What a recurrent block of Griffin is made of."""

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

from mamba_jax.config_base import require
from mamba_jax.models.mixers.declaration import MIXERS, MixerConfig

if TYPE_CHECKING:
    from mamba_jax.models.mixers.rg_lru.mixer import RGLRU

ScanName = Literal["reference", "pallas_gpu", "pallas_tpu", "triton", "xla", "xla_sequential", "xla_associative"]


@MIXERS.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class RGLRUConfig(MixerConfig):
    """The recurrent block of Griffin (arXiv 2402.19427, section 2.3).

    Attributes:
        kind: discriminator between mixers.
        lru_width: E, channels of the recurrence; None means d_model.
        num_heads: H, blocks of the block-diagonal matrices that make the gates.
        conv_width: K, taps of the short causal convolution.
        decay_range: initial decays at an open recurrence gate, a = exp(-8 softplus(Lambda)), are uniform in this range.
        scan_implementation: backend of the selective scan, which runs the recurrence; None lets the platform decide.
    """

    kind: Literal["rg_lru"] = "rg_lru"
    lru_width: int | None = None
    num_heads: int = 16
    conv_width: int = 4
    decay_range: tuple[float, float] = (0.9, 0.999)
    scan_implementation: ScanName | None = None

    def _check(self) -> None:
        """Refuses sizes that are not positive, and decays that are not in order between 0 and 1."""
        self._require_positive("lru_width", "num_heads", "conv_width")
        low, high = self.decay_range
        require(
            0 < low <= high < 1, f"RGLRUConfig.decay_range must be in order between 0 and 1, got {self.decay_range}"
        )

    @classmethod
    def mixer(cls) -> "type[RGLRU]":
        """The recurrent block."""
        from mamba_jax.models.mixers.rg_lru.mixer import RGLRU

        return RGLRU

    def decisive(self, d_model: int) -> dict[str, Any]:
        """All but how random weights are drawn, and the backend."""
        fields = dataclasses.asdict(self) | {"lru_width": self.channels(d_model)}
        return {name: value for name, value in fields.items() if name not in ("decay_range", "scan_implementation")}

    def channels(self, d_model: int) -> int:
        """E, channels of the recurrence.

        Raises:
            InputError: the heads do not divide them.
        """
        channels = d_model if self.lru_width is None else self.lru_width
        require(
            channels % self.num_heads == 0,
            f"RGLRUConfig.num_heads={self.num_heads} does not divide the {channels} channels: change it, or "
            f"{'d_model' if self.lru_width is None else 'lru_width'}",
        )
        return channels

    @property
    def past(self) -> int:
        """K - 1, inputs before a token that the convolution reaches."""
        return self.conv_width - 1
