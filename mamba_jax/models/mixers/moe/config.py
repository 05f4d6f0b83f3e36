"""What a mixture of experts is made of."""

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

from mamba_jax.config_base import require
from mamba_jax.models.mixers.declaration import MIXERS
from mamba_jax.models.mixers.feed_forward import FeedForwardConfig

if TYPE_CHECKING:
    from mamba_jax.models.mixers.moe.mixer import Moe


@MIXERS.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeConfig(FeedForwardConfig):
    """Experts of one shape, of which a router chooses a few for every token; the defaults are those of Jamba.

    Attributes:
        kind: discriminator between mixers.
        hidden_dim: of one expert; see `FeedForwardConfig`.
        hidden_multiple: see `FeedForwardConfig`.
        activation: see `FeedForwardConfig`.
        gated: see `FeedForwardConfig`.
        num_experts: X, experts of a layer.
        experts_per_token: K, experts that a token goes through.
        normalize_weights: divide the weights of a token's experts by their sum (Mixtral), or leave them the
            probabilities among all experts that they are (Jamba).
        balance_weight: weight in the training loss of the penalty on uneven use of the experts; 0 has none.
        z_weight: weight of the penalty on large logits of the router (arXiv 2202.08906, equation 5); 0 has none.
    """

    kind: Literal["moe"] = "moe"
    num_experts: int = 16
    experts_per_token: int = 2
    normalize_weights: bool = False
    balance_weight: float = 0.001
    z_weight: float = 0.0

    def _check(self) -> None:
        """Refuses sizes that are not positive, more experts a token than there are, and negative weights."""
        super()._check()
        self._require_positive("num_experts", "experts_per_token")
        require(
            self.experts_per_token <= self.num_experts,
            f"MoeConfig.experts_per_token={self.experts_per_token} is more than num_experts={self.num_experts}: "
            "change one of them",
        )
        for name in ("balance_weight", "z_weight"):
            value = getattr(self, name)
            require(value >= 0, f"MoeConfig.{name} must not be negative, got {value}")

    @classmethod
    def mixer(cls) -> "type[Moe]":
        """The mixture of experts."""
        from mamba_jax.models.mixers.moe.mixer import Moe

        return Moe

    def decisive(self, d_model: int) -> dict[str, Any]:
        """All but how the width is arrived at, and what training alone adds to the loss."""
        fields = super().decisive(d_model)
        return {name: value for name, value in fields.items() if name not in ("balance_weight", "z_weight")}
