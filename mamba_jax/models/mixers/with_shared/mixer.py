"""A mixer whose input a shared block is added to."""

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from mamba_jax.errors import InputError
from mamba_jax.models import layers
from mamba_jax.models.config import ModelConfig
from mamba_jax.models.mixers.declaration import MixerConfig, Setting
from mamba_jax.models.mixers.mixer import BlockInput, Mixer, MixerOutput
from mamba_jax.models.mixers.with_shared.config import SharedBlockConfig, WithSharedConfig
from mamba_jax.models.mixers.with_shared.shared_block import SharedBlock
from mamba_jax.sharding import Axis


class WithShared(Mixer):
    r"""A mixer behind a block of attention and an MLP whose weights other layers use as well.

        s = shared(r, e);    y = mixer(norm(r + linear(s)))

    for the residual stream r, to which the model adds y alone, and the embedded tokens e. The layer owns its mixer, the
    linear map, and an adapter of low rank for the MLP of the shared block.

    Source: Zamba2, arXiv 2411.15242, section 2.
    """

    config: WithSharedConfig

    def __init__(self, config: WithSharedConfig | ModelConfig, *, rngs: nnx.Rngs, **setting: Any) -> None:
        """Draws the parameters that are the layer's own.

        Args:
            config: as in `Mixer`.
            rngs: source of keys.
            **setting: as in `Mixer`.

        Raises:
            InputError: as in `Mixer`, or as its parts.
        """
        super().__init__(config, **setting)
        config, width = self.config, self.setting.d_model
        build: Any = config.inner.mixer()
        self.inner = build(config.inner, **dataclasses.asdict(self.setting), rngs=rngs)
        self.linear = layers.projection(self.setting, (width, width), (Axis.EMBED, None), rngs=rngs)
        if (rank := config.adapter_rank) is not None:
            mlp = config.shared.mlp
            shape, axes = (rank, mlp.halves, mlp.channels(width)), (None, None, Axis.INNER)
            self.adapter_down = layers.projection(self.setting, (width, rank), (Axis.EMBED, None), rngs=rngs)
            # An adapter changes nothing at first.
            self.adapter_up = layers.projection(self.setting, shape, axes, scale=0.0, rngs=rngs)

    @classmethod
    def declare_state(
        cls, config: WithSharedConfig, setting: Setting, *, batch_size: int, max_length: int | None
    ) -> Any:
        """See `Mixer.declare_state`; that of the shared attention is the layer's own too."""
        parts: dict[str, MixerConfig] = {"inner": config.inner, "shared": config.shared.reading(setting.d_model)}
        return {
            name: part.mixer().declare_state(part, setting, batch_size=batch_size, max_length=max_length)
            for name, part in parts.items()
        }

    @classmethod
    def grow_state(cls, config: WithSharedConfig, state: Any, max_length: int) -> Any:
        """See `Mixer.grow_state`."""
        parts: dict[str, MixerConfig] = {"inner": config.inner, "shared": config.shared.attention}
        return {name: part.mixer().grow_state(part, state[name], max_length) for name, part in parts.items()}

    @classmethod
    def flops_per_token(cls, config: WithSharedConfig, setting: Setting, *, length: int) -> float:
        """Those of its mixer and of the shared block, each of whose parameters counts once for every layer."""
        parts: tuple[MixerConfig, ...] = (config.inner, config.shared.reading(setting.d_model))
        own = sum(part.mixer().flops_per_token(part, setting, length=length) for part in parts)
        return own + 6.0 * _shared_parameters(config.shared, setting)

    @classmethod
    def least_part(cls, config: WithSharedConfig) -> int:
        """The larger of its parts'."""
        parts: tuple[MixerConfig, ...] = (config.inner, config.shared.attention)
        return max(part.mixer().least_part(part) for part in parts)

    def advance(
        self,
        u_BLD: Float[jax.Array | np.ndarray, "B L D"],
        state: Any = None,
        segment_ids_BL: Int[jax.Array | np.ndarray, "B L"] | None = None,
    ) -> MixerOutput:
        """Refuses: the shared block is the model's, so `advance_in_block` is the way.

        Raises:
            InputError: always.
        """
        del u_BLD, state, segment_ids_BL
        raise InputError("WithShared: its shared block belongs to a LanguageModel: use it in one, not alone")

    def advance_in_block(self, given: BlockInput, norm: Any, state: Any) -> MixerOutput:
        """See `Mixer.advance_in_block`."""
        before = {"inner": None, "shared": None} if state is None else state
        shared = given.shared[self.config.shared.name](
            given.residual,
            given.embedded,
            adapter=None if self.config.adapter_rank is None else lambda u: self.adapter_up(self.adapter_down(u)),
            state=before["shared"],
            segment_ids_BL=given.segment_ids,
        )
        input_BLD = given.residual + self.linear(shared.y).astype(given.residual.dtype)
        normed_BLD = norm(input_BLD, dtype=self.setting.compute_dtype)
        update = self.inner.advance(normed_BLD, before["inner"], given.segment_ids)
        return dataclasses.replace(update, state={"inner": update.state, "shared": shared.state})


@functools.cache
def _shared_parameters(config: SharedBlockConfig, setting: Setting) -> int:
    """Number of parameters of a shared block."""
    block = nnx.eval_shape(lambda: SharedBlock(config, setting, rngs=nnx.Rngs(params=0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.to_pure_dict(nnx.state(block))))
