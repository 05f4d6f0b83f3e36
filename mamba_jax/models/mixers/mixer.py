"""What every mixer shares: how it is built, called, and asked about itself."""

import dataclasses
import typing
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
    """

    y: Float[jax.Array, "B L D"]
    state: Any


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
    def declare_state(cls, config: Any, setting: Setting, *, batch_size: int) -> Any:
        """The state of one mixer as a tree of `StateArray`; by default there is none."""
        del config, setting, batch_size
        return ()

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

    def checked_input(self, u: Any) -> jax.Array:
        """The input as an array under the mesh of the context, once its shape and dtype are right."""
        u, name = in_context(jnp.asarray(u)), type(self).__name__
        if u.ndim != 3 or u.shape[-1] != self.setting.d_model or 0 in u.shape:
            raise InputError(
                f"{name}: the input has shape {u.shape}, expected non-empty (B, L, {self.setting.d_model})"
            )
        if not jnp.issubdtype(u.dtype, jnp.floating):
            raise InputError(f"{name}: the input has dtype {u.dtype}, expected a floating one")
        return u


def _dtype_name(mixer: str, argument: str, dtype: DTypeLike) -> DType:
    known = typing.get_args(DType)
    if (given := jnp.dtype(dtype).name) not in known:
        raise InputError(f"{mixer}: {argument}={given}: choose one of {', '.join(known)}")
    return typing.cast(DType, given)
