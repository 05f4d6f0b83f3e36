"""What a mixer says of itself, so that models, training and export need not know it by name."""

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

from mamba_jax.config_base import Config, Kinds
from mamba_jax.sharding import Axis

if TYPE_CHECKING:
    from mamba_jax.models.mixers.mixer import Mixer
    from mamba_jax.models.published import Format

DType = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixerConfig(Config):
    """The base of every mixer's config.

    Attributes:
        kind: name of the mixer in JSON; each class has one of its own, as its default.
    """

    kind: str

    @classmethod
    def mixer(cls) -> "type[Mixer]":
        """The mixer that this configures. It is imported here, so that configs can be read without any model."""
        raise NotImplementedError

    def decisive(self, d_model: int) -> dict[str, Any]:
        """What trained weights depend on, by name: not how random ones are drawn, nor which backend computes.

        Args:
            d_model: D, for fields whose default follows from it.
        """
        del d_model
        return dataclasses.asdict(self)

    @property
    def reads_columns(self) -> bool:
        """Whether its kernels for one token read matrices by columns, so that these should lie that way in memory."""
        return False

    def shared_blocks(self) -> "tuple[SharedConfig, ...]":
        """The blocks that this mixer shares with those of other layers; none by default."""
        return ()

    def check_endless(self) -> None:
        """Raises an InputError if the mixer's state cannot go on without end; by default it can."""

    @classmethod
    def formats(cls) -> "tuple[Format, ...]":
        """The formats in which models of this mixer are published; none by default."""
        return ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedConfig(Config):
    """The base of the configs of blocks that several layers of a model share.

    Attributes:
        name: layers that name the same block share its weights.
    """

    name: str

    @classmethod
    def block(cls) -> Any:
        """The block that this configures: built from (config, setting, norm_eps, norm_offset, rngs)."""
        raise NotImplementedError


# Those of the mixers whose folders `mamba_jax.models.mixers` imports, and of whoever registers another.
MIXERS = Kinds()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What a model gives each of its mixers.

    Attributes:
        d_model: D, width of input and output.
        param_dtype: dtype that parameters are stored in.
        compute_dtype: dtype of matrix products, activations and the output.
        output_scale: factor on the initial weights of the output projection.
    """

    d_model: int
    param_dtype: DType = "float32"
    compute_dtype: DType = "float32"
    output_scale: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateArray:
    """One array of a recurrent state, declared and not allocated.

    Attributes:
        shape: sizes.
        dtype: as the mixer returns it.
        axes: logical axis of every dimension; one of them is BATCH.
        initial: value of every element before the first token of a document.
        is_passing: whether it is in use between single tokens of generation alone. No kept context has it.
    """

    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[Axis | None, ...]
    initial: float = 0.0
    is_passing: bool = False
