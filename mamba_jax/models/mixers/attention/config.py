"""What an attention mixer is made of."""

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

from mamba_jax.config_base import require
from mamba_jax.models.mixers.declaration import MIXERS, MixerConfig

if TYPE_CHECKING:
    from mamba_jax.models.mixers.attention.mixer import Attention

AttentionName = Literal["cudnn", "tokamax", "splash", "xla"]


@MIXERS.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig(MixerConfig):
    """Causal softmax attention (arXiv 1706.03762, section 3.2) with the options of models that hybrids are made of.

    Attributes:
        kind: discriminator between mixers.
        num_heads: H, heads of queries.
        num_kv_heads: heads of keys and values, each read by H / num_kv_heads of queries (arXiv 2305.13245); None is H.
        head_dim: P, channels of a head; None means d_model / H.
        window: tokens that a token attends to, itself included; None means all of its document.
        rotary_dims: channels of a head that are rotated by the token's position in its document (arXiv 2104.09864), the
            first ones, channel m together with m + rotary_dims / 2; None means all of them, 0 none.
        rope_theta: base of the rotation: pair m turns by position * rope_theta**(-2 m / rotary_dims).
        softmax_scale: factor on the products of queries and keys; None means P**-0.5.
        conv_width: taps of a short causal convolution of queries, keys and values, without activation; None is none.
        use_conv_bias: bias on that convolution.
        use_qkv_bias: biases on the projections to queries, keys and values.
        use_output_bias: bias on the output projection.
        input_dim: channels of the input where they are not the d_model of the output, as in a block that reads two
            streams beside each other; None means d_model.
        attention_implementation: backend of the attention; None lets the platform decide.
    """

    kind: Literal["attention"] = "attention"
    num_heads: int = 8
    num_kv_heads: int | None = None
    head_dim: int | None = None
    window: int | None = None
    rotary_dims: int | None = None
    rope_theta: float = 10_000.0
    softmax_scale: float | None = None
    conv_width: int | None = None
    use_conv_bias: bool = True
    use_qkv_bias: bool = False
    use_output_bias: bool = False
    input_dim: int | None = None
    attention_implementation: AttentionName | None = None

    def _check(self) -> None:
        """Refuses sizes that are not positive, heads that cannot be shared evenly, and half a pair of channels."""
        self._require_positive("num_heads", "num_kv_heads", "head_dim", "rope_theta", "softmax_scale", "conv_width")
        self._require_positive("input_dim")
        require(
            self.window is None or self.window >= 1,
            f"AttentionConfig.window={self.window}: give at least 1, which is the token alone, or None for no limit",
        )
        require(
            self.num_heads % self.kv_heads == 0,
            f"AttentionConfig.num_kv_heads={self.kv_heads} does not divide num_heads={self.num_heads}: change one of "
            "them",
        )
        require(
            self.rotary_dims is None or (self.rotary_dims >= 0 and self.rotary_dims % 2 == 0),
            f"AttentionConfig.rotary_dims={self.rotary_dims}: channels are rotated in pairs, give an even number or 0",
        )

    @classmethod
    def mixer(cls) -> "type[Attention]":
        """The attention mixer."""
        from mamba_jax.models.mixers.attention.mixer import Attention

        return Attention

    def decisive(self, d_model: int) -> dict[str, Any]:
        """All but the backend."""
        derived = {
            "num_kv_heads": self.kv_heads,
            "head_dim": self.channels(d_model),
            "rotary_dims": self.rotated_channels(d_model),
            "softmax_scale": self.scale(d_model),
            "input_dim": self.input_dim or d_model,
        }
        fields = dataclasses.asdict(self) | derived
        return {name: value for name, value in fields.items() if name != "attention_implementation"}

    @property
    def kv_heads(self) -> int:
        """K, heads of keys and values."""
        return self.num_kv_heads or self.num_heads

    @property
    def past(self) -> int:
        """Inputs before a token that the convolution reaches."""
        return 0 if self.conv_width is None else self.conv_width - 1

    def channels(self, d_model: int) -> int:
        """P, channels of a head.

        Raises:
            InputError: d_model does not divide into heads.
        """
        require(
            self.head_dim is not None or d_model % self.num_heads == 0,
            f"AttentionConfig.num_heads={self.num_heads} does not divide d_model={d_model}: change one of them, or "
            "give head_dim",
        )
        return self.head_dim or d_model // self.num_heads

    def rotated_channels(self, d_model: int) -> int:
        """Channels of a head that are rotated.

        Raises:
            InputError: a head has fewer, or an odd number that are all to be rotated.
        """
        channels = self.channels(d_model)
        if self.rotary_dims is None:
            require(
                channels % 2 == 0,
                f"AttentionConfig.rotary_dims is None, but a head of {channels} channels has no whole number of pairs: "
                "give rotary_dims, or an even head_dim",
            )
            return channels
        require(
            self.rotary_dims <= channels,
            f"AttentionConfig.rotary_dims={self.rotary_dims} is more than the {channels} channels of a head: make it "
            "less",
        )
        return self.rotary_dims

    def scale(self, d_model: int) -> float:
        """Factor on the products of queries and keys."""
        return self.channels(d_model) ** -0.5 if self.softmax_scale is None else self.softmax_scale

    def check_endless(self) -> None:
        """Raises an InputError without a window."""
        self.capacity(None)

    def capacity(self, max_length: int | None) -> int:
        """C, tokens whose keys and values a state holds.

        Args:
            max_length: most tokens of a document; None is any number.

        Raises:
            InputError: there is no limit.
        """
        limits = [limit for limit in (self.window, max_length) if limit is not None]
        require(
            len(limits) > 0,
            "AttentionConfig.window is None, so a state has to hold every token of a document: give max_length, the "
            "most tokens of one, or a window (which data.order='streams' needs, for its rows go on without end)",
        )
        return min(limits)
