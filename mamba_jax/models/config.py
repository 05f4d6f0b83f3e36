"""What a language model is made of."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Annotated, Literal

from mamba_jax.config_base import Config, Kinds, require
from mamba_jax.errors import InputError, short
from mamba_jax.models.mixers import DEFAULT_MIXER, MIXERS
from mamba_jax.models.mixers.declaration import DType as DType
from mamba_jax.models.mixers.declaration import MixerConfig, Setting, SharedConfig
from mamba_jax.models.pattern import repeating_units, spelled_out
from pallas_kernels.common.rounding import round_up


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit(Config):
    """Blocks that repeat together.

    Attributes:
        mixers: the mixer of each block, in order.
        repeats: how often the blocks come, one round after the other; None is as often as `num_layers` leaves room for.
    """

    mixers: tuple[Annotated[MixerConfig, MIXERS], ...]
    repeats: int | None = None

    def _check(self) -> None:
        self._require_positive("repeats")
        require(len(self.mixers) > 0, "Unit.mixers is empty: give at least one mixer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hybrid(Config):
    """Blocks of several mixers: units that repeat, one after the other.

    Three Mamba blocks and one of attention, six times over, are `Hybrid.of_pattern("(MMMA)*6", M=mamba, A=attention)`,
    or in full `Hybrid(units=(Unit(mixers=(mamba, mamba, mamba, attention), repeats=6),))`.

    Attributes:
        kind: discriminator between this and a single mixer.
        units: in order; at most one leaves its repeats to `num_layers`.
    """

    kind: Literal["hybrid"] = "hybrid"
    units: tuple[Unit, ...]

    @classmethod
    def of_pattern(cls, pattern: str, **mixers: MixerConfig) -> "Hybrid":
        """The blocks that a pattern spells out, such as "(MMMA)*6" or "M*2(AF)*3"; see `spelled_out`.

        Args:
            pattern: letters, patterns in parentheses, and after either of them `*` and how often it comes.
            **mixers: what each letter stands for.

        Raises:
            InputError: the text is no pattern, or has a letter that stands for nothing.
        """
        return cls.of_blocks(spelled_out(pattern, mixers))

    @classmethod
    def of_blocks(cls, mixers: Sequence[MixerConfig]) -> "Hybrid":
        """Blocks with these mixers, in order, as the units that repeat in them: those are compiled once."""
        return cls(units=tuple(Unit(mixers=unit, repeats=repeats) for unit, repeats in repeating_units(mixers)))

    @property
    def num_blocks(self) -> int:
        """Blocks of the units that say how often they come: of all, as in a hybrid of a pattern, or of all but one."""
        return sum(len(unit.mixers) * unit.repeats for unit in self.units if unit.repeats is not None)

    def _check(self) -> None:
        require(len(self.units) > 0, "Hybrid.units is empty: give at least one Unit")
        require(
            sum(unit.repeats is None for unit in self.units) <= 1,
            "Hybrid.units: several leave their repeats to num_layers: give all but one of them",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stack:
    """Blocks of one mixer whose parameters and states are stacked on a leading axis.

    Attributes:
        name: name under which their parameters and states are stored.
        mixer: config of the mixer in each block.
        repeats: number of blocks.
    """

    name: str
    mixer: MixerConfig
    repeats: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Config):
    """A language model: embedding, `num_layers` pre-norm residual blocks, final RMSNorm, head.

    Attributes:
        vocab_size: V, token ids are 0 .. V - 1.
        d_model: D, width of the residual stream.
        num_layers: number of blocks.
        mixer: the sequence mixer of every block, or a `Hybrid` of several.
        vocab_multiple: embedding rows are padded up to a multiple of this; padded ids are never sampled.
        tie_embeddings: the head shares the embedding's weights.
        norm_eps: epsilon of every RMSNorm.
        norm_offset: what every RMSNorm's scale is added to: 1 for models whose stored scales lie around zero.
        embedding_scale: factor on the embedded tokens.
        logit_cap: c of logits c tanh(logits / c); None leaves them as they are.
        embedding_std: standard deviation of the embedding's normal initialiser.
        rescale_residual: divide the output projections' initial weights by sqrt(num_layers).
        param_dtype: dtype parameters are stored and updated in.
        compute_dtype: dtype of matrix products and activations; the residual stream, the recurrent state, A, dt, norm
            statistics and the loss stay float32 whatever this says.
        remat: what the backward pass recomputes: "none" keeps all activations, "block" keeps only the residual stream
            between blocks, "dots" also keeps the results of matrix products, "cheap" also those of projections and of
            recurrences, and recomputes norms, convolutions and activations.
        unroll: compile every layer by itself instead of a loop over layers. What the backward pass needs then stays
            where it was computed, which is faster on GPUs; compile time grows with depth.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    mixer: Annotated[MixerConfig | Hybrid, Kinds(MIXERS, Hybrid)] = DEFAULT_MIXER
    vocab_multiple: int = 8
    tie_embeddings: bool = True
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    embedding_scale: float = 1.0
    logit_cap: float | None = None
    embedding_std: float = 0.02
    rescale_residual: bool = True
    param_dtype: DType = "float32"
    compute_dtype: DType = "bfloat16"
    remat: Literal["none", "block", "dots", "cheap"] = "block"
    unroll: bool = False

    def _check(self) -> None:
        """Refuses sizes that are not positive, too many ids, and units that do not add up to `num_layers` blocks."""
        self._require_positive("vocab_size", "d_model", "num_layers", "vocab_multiple", "norm_eps", "embedding_std")
        self._require_positive("embedding_scale", "logit_cap")
        require(
            self.padded_vocab_size < 2**31, f"ModelConfig.vocab_size must stay below 2**31 ids, got {self.vocab_size}"
        )
        blocks = [stack.repeats for stack in self.stacks]
        require(
            min(blocks) > 0 and sum(blocks) == self.num_layers,
            f"ModelConfig.num_layers is {self.num_layers}, but the units of its mixer make {sum(blocks)} blocks: "
            "change one of them",
        )
        _ = self.shared_blocks

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: `vocab_size` rounded up to a multiple of `vocab_multiple`."""
        return round_up(self.vocab_size, self.vocab_multiple)

    @property
    def setting(self) -> Setting:
        """What each mixer is given."""
        return Setting(
            d_model=self.d_model,
            param_dtype=self.param_dtype,
            compute_dtype=self.compute_dtype,
            output_scale=self.num_layers**-0.5 if self.rescale_residual else 1.0,
        )

    @property
    def units(self) -> tuple[tuple[Stack, ...], ...]:
        """The blocks: units in order, each a stack for every one of its blocks, all repeated equally often."""
        if isinstance(self.mixer, MixerConfig):
            return ((Stack(name="layers", mixer=self.mixer, repeats=self.num_layers),),)
        left = self.num_layers - self.mixer.num_blocks
        names = (f"layers_{index}" for index in range(sum(len(unit.mixers) for unit in self.mixer.units)))
        return tuple(
            tuple(
                Stack(name=next(names), mixer=mixer, repeats=unit.repeats or left // len(unit.mixers))
                for mixer in unit.mixers
            )
            for unit in self.mixer.units
        )

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """All stacks of `units`."""
        return tuple(stack for unit in self.units for stack in unit)

    @property
    def block_numbers(self) -> dict[str, range]:
        """The numbers of the blocks in each stack, counted from 0 over the model, by the stack's name."""
        numbers, first = {}, 0
        for unit in self.units:
            for place, stack in enumerate(unit, start=first):
                numbers[stack.name] = range(place, place + stack.repeats * len(unit), len(unit))
            first += len(unit) * unit[0].repeats
        return numbers

    @property
    def shared_blocks(self) -> dict[str, SharedConfig]:
        """The blocks that several layers share, by name.

        Raises:
            InputError: two of a name differ.
        """
        found: dict[str, SharedConfig] = {}
        for shared in (shared for stack in self.stacks for shared in stack.mixer.shared_blocks()):
            require(
                found.setdefault(shared.name, shared) == shared,
                f"{type(shared).__name__}.name={shared.name!r} names two blocks that differ: make them equal, or give "
                "them two names",
            )
        return found

    @property
    def least_part(self) -> int:
        """Fewest tokens that a device may hold of a sequence whose length is split over devices."""
        return max(stack.mixer.mixer().least_part(stack.mixer) for stack in self.stacks)


def check_pattern(name: str, pattern: str) -> None:
    """Refuses a text that is no regular expression.

    Args:
        name: of the field that holds it, for the message.
        pattern: the text.

    Raises:
        InputError: it is none.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise InputError(f"{name}: {short(pattern)} is not a regular expression ({error})") from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig(Config):
    """Low-rank adaptation (arXiv 2106.09685): of a projection W, only A and B are trained in W + (alpha / rank) A B.

    A is drawn as by He and others (arXiv 1502.01852), uniform within +-sqrt(6 / inputs), and B is zero at first.

    Attributes:
        rank: columns of A and rows of B; None trains the parameters themselves.
        alpha: factor on every adapter, over the rank.
        targets: regular expressions; a projection gets an adapter if one of them is found in its path, such as
            "layers/mixer/in_proj". Empty is every projection of every block.
    """

    rank: int | None = None
    alpha: float = 16.0
    targets: tuple[str, ...] = ()

    def _check(self) -> None:
        self._require_positive("rank", "alpha")
        for target in self.targets:
            check_pattern("LoraConfig.targets", target)
