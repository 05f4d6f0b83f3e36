"""What a multilayer perceptron is made of."""

import dataclasses
from typing import TYPE_CHECKING, Literal

from mamba_jax.models.mixers.declaration import MIXERS
from mamba_jax.models.mixers.feed_forward import FeedForwardConfig

if TYPE_CHECKING:
    from mamba_jax.models.mixers.mlp.mixer import Mlp


@MIXERS.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class MlpConfig(FeedForwardConfig):
    """The multilayer perceptron of Transformers; by default SwiGLU, as in Llama.

    Others: Nemotron-H is `activation="relu_squared", gated=False`, RecurrentGemma `activation="gelu_tanh",
    use_bias=True`, Zamba2 `activation="gelu"`.

    Attributes:
        kind: discriminator between mixers.
        hidden_dim: see `FeedForwardConfig`.
        hidden_multiple: see `FeedForwardConfig`.
        activation: see `FeedForwardConfig`.
        gated: see `FeedForwardConfig`.
        use_bias: biases on both products.
    """

    kind: Literal["mlp"] = "mlp"
    use_bias: bool = False

    @classmethod
    def mixer(cls) -> "type[Mlp]":
        """The multilayer perceptron."""
        from mamba_jax.models.mixers.mlp.mixer import Mlp

        return Mlp
