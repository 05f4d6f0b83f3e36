"""What layers share that act on every token alone: two products with an activation between them."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float

from mamba_jax.models.mixers.declaration import MixerConfig
from pallas_kernels.common.rounding import round_up

Activation = Literal["silu", "gelu", "gelu_tanh", "relu_squared"]

_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeedForwardConfig(MixerConfig):
    """Two products with an activation between them.

        y = (act(u W_gate) * u W_up) W_down    gated
        y = act(u W_up) W_down                 not gated

    Attributes:
        kind: name of the mixer in JSON.
        hidden_dim: E, inner channels; None is 8/3 d_model if gated, rounded up to `hidden_multiple`, and else 4
            d_model, so that both have 8 d_model^2 parameters.
        hidden_multiple: see `hidden_dim`.
        activation: act; "gelu" is x times the normal distribution's function, "gelu_tanh" its approximation by a tanh
            (both arXiv 1606.08415), "relu_squared" max(x, 0)^2 (arXiv 2109.08668).
        gated: whether there is a gate (arXiv 2002.05202).
    """

    hidden_dim: int | None = None
    hidden_multiple: int = 128
    activation: Activation = "silu"
    gated: bool = True

    def _check(self) -> None:
        """Refuses sizes that are not positive."""
        self._require_positive("hidden_dim", "hidden_multiple")

    def decisive(self, d_model: int) -> dict[str, Any]:
        """All but how the width is arrived at."""
        fields = dataclasses.asdict(self) | {"hidden_dim": self.channels(d_model)}
        del fields["hidden_multiple"]
        return fields

    def channels(self, d_model: int) -> int:
        """E, channels between the two products."""
        if self.hidden_dim is not None:
            return self.hidden_dim
        return round_up(-(-8 * d_model // 3), self.hidden_multiple) if self.gated else 4 * d_model

    @property
    def halves(self) -> int:
        """Parts of the first product: gate and up, or up alone."""
        return 2 if self.gated else 1

    def activated(self, projected: Float[jax.Array, "*tokens P E"]) -> Float[jax.Array, "*tokens E"]:
        """What the second product takes, of the parts of the first: the gate before up."""
        first = _ACTIVATIONS[self.activation](projected[..., 0, :])
        return first * projected[..., 1, :] if self.gated else first
