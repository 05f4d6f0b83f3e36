"""What a mixer behind a shared block is made of."""

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any, Literal

from mamba_jax.config_base import require
from mamba_jax.models.mixers.attention.config import AttentionConfig
from mamba_jax.models.mixers.declaration import MIXERS, MixerConfig, SharedConfig
from mamba_jax.models.mixers.mlp.config import MlpConfig

if TYPE_CHECKING:
    from mamba_jax.models.mixers.with_shared.mixer import WithShared
    from mamba_jax.models.mixers.with_shared.shared_block import SharedBlock


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedBlockConfig(SharedConfig):
    """Attention and an MLP whose weights several layers share (Zamba2, arXiv 2411.15242, section 2).

    Attributes:
        name: layers that name the same block share its weights; a model may have several, for layers in turn.
        attention: reads the residual stream beside the embedded tokens, 2 D channels, whatever its `input_dim`.
        mlp: reads what the attention writes.
    """

    name: str = "shared"
    attention: AttentionConfig = AttentionConfig()
    mlp: MlpConfig = MlpConfig()

    @classmethod
    def block(cls) -> "type[SharedBlock]":
        """The block of attention and an MLP."""
        from mamba_jax.models.mixers.with_shared.shared_block import SharedBlock

        return SharedBlock

    def reading(self, d_model: int) -> AttentionConfig:
        """The attention as it is built: its input is twice as wide as the model."""
        return dataclasses.replace(self.attention, input_dim=2 * d_model)

    def _check(self) -> None:
        require(
            self.name.isidentifier(),
            f"SharedBlockConfig.name={self.name!r} is part of parameters' names: use letters, digits and _",
        )


@MIXERS.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class WithSharedConfig(MixerConfig):
    """A mixer whose input a shared block is added to.

    Attributes:
        kind: discriminator between mixers.
        inner: the layer's own mixer.
        shared: the block that it shares with others.
        adapter_rank: rank of what the layer adds to the MLP's first weights for itself (arXiv 2106.09685); None adds
            nothing.
    """

    kind: Literal["with_shared"] = "with_shared"
    inner: Annotated[MixerConfig, MIXERS]
    shared: SharedBlockConfig = SharedBlockConfig()
    adapter_rank: int | None = None

    def _check(self) -> None:
        self._require_positive("adapter_rank")
        require(
            not self.inner.shared_blocks(),
            f"WithSharedConfig.inner is of kind {self.inner.kind!r}: give a mixer without a shared block of its own",
        )

    @classmethod
    def mixer(cls) -> "type[WithShared]":
        """A mixer behind a shared block."""
        from mamba_jax.models.mixers.with_shared.mixer import WithShared

        return WithShared

    def shared_blocks(self) -> tuple[SharedBlockConfig, ...]:
        """The one."""
        return (self.shared,)

    def check_endless(self) -> None:
        """That of its parts."""
        self.inner.check_endless()
        self.shared.attention.check_endless()

    def decisive(self, d_model: int) -> dict[str, Any]:
        """Those of its parts."""
        return {
            "kind": self.kind,
            "inner": self.inner.decisive(d_model),
            "shared": {
                "name": self.shared.name,
                "attention": self.shared.reading(d_model).decisive(d_model),
                "mlp": self.shared.mlp.decisive(d_model),
            },
            "adapter_rank": self.adapter_rank,
        }
