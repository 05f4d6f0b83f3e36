"""What every mixer shares: how it is built, called, and asked about itself."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from mamba_jax.errors import InputError
from mamba_jax.models.config import ModelConfig
from mamba_jax.models.mixers.declaration import DType, MixerConfig, Setting
from mamba_jax.sharding import in_context


# Not checked at construction: JAX also builds this class around shapes, shardings and logical axes.
@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class MixerOutput:
    """Result of a mixer that carries a state.

    Attributes:
        y: (B, L, D), in the compute dtype.
        state: after the last token; a tree of arrays as the mixer declares it.
        penalty: what the mixer adds to the training loss for the given tokens, a float32 scalar; None is nothing.
    """

    y: Float[jax.Array, "B L D"]
    state: Any
    penalty: Float[jax.Array, ""] | None = None


# Not checked either: it is built inside of traced functions, whose arrays the model has checked.
@typing.no_type_check
@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockInput:
    """What a residual block has for its mixer.

    Attributes:
        residual: residual stream before the block, (B, L, D), float32.
        embedded: embedded tokens as they entered the residual stream, (B, L, D).
        segment_ids: document of each token, (B, L); None is one document.
        shared: blocks that several layers share, by name.
        is_generating: whether the block runs for a text that grows, where nothing is differentiated.
    """

    residual: Float[jax.Array, "B L D"]
    embedded: Float[jax.Array, "B L D"]
    segment_ids: Int[jax.Array, "B L"] | None
    shared: Mapping[str, Any]
    is_generating: bool = False


@typing.no_type_check
@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockOutput:
    """Result of a residual block.

    Attributes:
        residual: residual stream after the block, (B, L, D), float32.
        state: that of the block's mixer after the last token.
        penalty: what the mixer adds to the training loss; None is nothing.
    """

    residual: Float[jax.Array, "B L D"]
    state: Any
    penalty: Float[jax.Array, ""] | None = None


class Mixer(nnx.Module):
    """A layer (B, L, D) -> (B, L, D) that carries what it knows of earlier tokens in a state.

    A subclass defines `advance`, and says by the class methods what models and training need to know. It is a layer for
    any model: under explicit mesh axes it runs as its input is split, under automatic ones called as in `MeshConfig` by
    our rules.
    """

    config: Any
    setting: Setting

    def __init__(
        self,
        config: MixerConfig | ModelConfig,
        *,
        d_model: int | None = None,
        param_dtype: DTypeLike = "float32",
        compute_dtype: DTypeLike = "float32",
        output_scale: float = 1.0,
    ) -> None:
        """Settles what the mixer is built from, as `self.config` and `self.setting`.

        Args:
            config: the mixer's own; that of a language model says its width and dtypes as well.
            d_model: D, width of input and output.
            param_dtype: dtype of the parameters.
            compute_dtype: dtype of matrix products, activations and the output.
            output_scale: factor on the initial weights of the output projection.

        Raises:
            InputError: the width is missing or not a positive number, a dtype is not one of the configs', or the
                language model has another mixer.
        """
        name = type(self).__name__
        if isinstance(config, ModelConfig):
            if d_model is not None:
                raise InputError(f"{name}: d_model={d_model} besides a ModelConfig, which says it: leave one out")
            if not isinstance(config.mixer, MixerConfig) or config.mixer.mixer() is not type(self):
                raise InputError(f"{name}: the ModelConfig has mixers of kind {config.mixer.kind!r}: give another")
            self.config, self.setting = config.mixer, config.setting
            return
        if not isinstance(d_model, int) or d_model < 1:
            raise InputError(f"{name}: d_model={d_model}: give the width of its input, a positive number")
        self.config = config
        self.setting = Setting(
            d_model=d_model,
            param_dtype=_dtype_name(name, "param_dtype", param_dtype),
            compute_dtype=_dtype_name(name, "compute_dtype", compute_dtype),
            output_scale=output_scale,
        )

    @classmethod
    def declare_state(cls, config: Any, setting: Setting, *, batch_size: int, max_length: int | None) -> Any:
        """The state of one mixer as a tree of `StateArray`; by default there is none.

        Args:
            config: the mixer's.
            setting: the model's.
            batch_size: B, rows.
            max_length: most tokens of a document that the state has to hold, for a mixer whose state grows with them;
                None is any number.

        Raises:
            InputError: the state would have to hold any number of tokens, each by itself.
        """
        del config, setting, batch_size, max_length
        return ()

    @classmethod
    def grow_state(cls, config: Any, state: Any, max_length: int) -> Any:
        """The state of a stack of mixers with room for documents of a length; by default it needs none.

        Args:
            config: the mixer's.
            state: of the stack, each array with a leading layer axis.
            max_length: most tokens of a document that it has to hold.
        """
        del config, max_length
        return state

    @classmethod
    def flops_per_token(cls, config: Any, setting: Setting, *, length: int) -> float:
        """Operations of forward and backward pass for a token, besides 6 for every element of a parameter.

        Args:
            config: the mixer's.
            setting: the model's.
            length: L, tokens of a training sequence; attention is the mixer whose count depends on it.
        """
        del config, setting, length
        return 0.0

    @classmethod
    def idle_parameters(cls, config: Any, setting: Setting) -> int:
        """Elements of a mixer's parameters that a token is not multiplied with: those of experts it is not sent to."""
        del config, setting
        return 0

    @classmethod
    def least_part(cls, config: Any) -> int:
        """Fewest tokens that a device may hold of a sequence whose length is split over devices."""
        del config
        return 1

    def __call__(
        self,
        u_BLD: Float[jax.Array | np.ndarray, "B L D"],
        state: Any = None,
        segment_ids_BL: Int[jax.Array | np.ndarray, "B L"] | None = None,
    ) -> Float[jax.Array, "B L D"]:
        """The output of `advance` alone, for models that carry no state on."""
        return self.advance(u_BLD, state, segment_ids_BL).y

    def advance(
        self,
        u_BLD: Float[jax.Array | np.ndarray, "B L D"],
        state: Any = None,
        segment_ids_BL: Int[jax.Array | np.ndarray, "B L"] | None = None,
    ) -> MixerOutput:
        """Mixes a sequence, continuing `state` if there is one.

        Args:
            u_BLD: input, (B, L, D); normalised in a residual block.
            state: from the call on the tokens before; None is the start of a sequence.
            segment_ids_BL: document of each token, (B, L); None is one document.

        Returns:
            The output (B, L, D) in the compute dtype, and the state after the last token.

        Raises:
            InputError: the input is not of this shape or has no floating dtype.
        """
        raise NotImplementedError

    def advance_in_block(self, given: BlockInput, norm: Any, state: Any) -> MixerOutput:
        """What a residual block adds to its stream: `advance` of the normalised stream, unless a mixer says otherwise.

        Args:
            given: what the block has.
            norm: the block's norm.
            state: from the call on the tokens before; None is the start of a sequence.
        """
        return self.advance(norm(given.residual, dtype=self.setting.compute_dtype), state, given.segment_ids)

    def run_block(self, given: BlockInput, norm: Any, state: Any) -> BlockOutput:
        """The whole residual block: by default the stream plus what `advance_in_block` adds to it.

        A mixer that can do more at once overrides it.

        Args:
            given: what the block has.
            norm: the block's norm.
            state: from the call on the tokens before; None is the start of a sequence.
        """
        update = self.advance_in_block(given, norm, state)
        residual_BLD = given.residual + update.y.astype(given.residual.dtype)
        return BlockOutput(residual=residual_BLD, state=update.state, penalty=update.penalty)

    def checked_input(self, u: Any, *, width: int | None = None) -> jax.Array:
        """The input as an array under the mesh of the context, once its shape and dtype are right.

        Args:
            u: the input.
            width: its channels; None means D.
        """
        u, name = in_context(jnp.asarray(u)), type(self).__name__
        width = width or self.setting.d_model
        if u.ndim != 3 or u.shape[-1] != width or 0 in u.shape:
            raise InputError(f"{name}: the input has shape {u.shape}, expected non-empty (B, L, {width})")
        if not jnp.issubdtype(u.dtype, jnp.floating):
            raise InputError(f"{name}: the input has dtype {u.dtype}, expected a floating one")
        return u


class TokenMixer(Mixer):
    """A mixer that acts on every token alone: without a state, and the same for documents, windows and streams.

    A subclass defines `on_tokens`.
    """

    def advance(self, u_BLD: Any, state: Any = None, segment_ids_BL: Any = None) -> MixerOutput:
        """See `Mixer.advance`."""
        del state, segment_ids_BL
        return self.on_tokens(self.checked_input(u_BLD))

    def on_tokens(self, u_BLD: Float[jax.Array, "B L D"]) -> MixerOutput:
        """The output (B, L, D) in the compute dtype, with an empty state."""
        raise NotImplementedError


def _dtype_name(mixer: str, argument: str, dtype: DTypeLike) -> DType:
    known = typing.get_args(DType)
    if (given := jnp.dtype(dtype).name) not in known:
        raise InputError(f"{mixer}: {argument}={given}: choose one of {', '.join(known)}")
    return typing.cast(DType, given)
