"""The training state (everything that an optimizer step changes), and how it is laid out over the mesh."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mamba_jax.models.parameters import ModelDefinition, Params
from mamba_jax.models.state import init_state, state_axes
from mamba_jax.sharding import parameter_sharding, replicated
from mamba_jax.training.config import ProgramConfig


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SkipState:
    """Counters and past gradient norms by which the next step is accepted or skipped, see `FaultsConfig`.

    Attributes:
        total: number of steps skipped so far, an int32 scalar.
        in_a_row: number of steps skipped since the last accepted one, an int32 scalar.
        norms: gradient norms of the last accepted steps, (faults.spike_window,) in float32, finite.
    """

    total: Any
    in_a_row: Any
    norms: Any


# JAX rebuilds the class around shapes and shardings, which a check of every construction would refuse.
@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """State of training.

    Attributes:
        step: updates done so far, an int32 scalar; also the number of batches consumed.
        params: the parameters of the model.
        opt_state: state of the optimizer; its moments are laid out like their parameters.
        skips: counters and gradient norms for skipping steps.
        ema: exponential moving average of the parameters; None without `optimizer.ema_decay`.
        recurrent: state of the model after the last token of every row, for `data.order="streams"`; else None.
    """

    step: Any
    params: Any
    opt_state: Any
    skips: Any
    ema: Any
    recurrent: Any

    def items(self) -> dict[str, Any]:
        """The state as the items of a checkpoint, by name, each of which can be read alone; see `from_items`."""
        rest = {"step": self.step, "opt_state": self.opt_state, "skips": self.skips}
        if self.recurrent is not None:
            rest["recurrent"] = self.recurrent
        items = {"params": self.params, "rest": rest}
        return items if self.ema is None else {**items, "ema": self.ema}

    @classmethod
    def from_items(cls, items: Mapping[str, Any]) -> "TrainState":
        """The state with the given `items`."""
        fields = {"ema": None, "recurrent": None, **items, **items["rest"]}
        del fields["rest"]
        return cls(**fields)


def create(config: ProgramConfig, params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        params=params,
        opt_state=optimizer.init(params),
        skips=SkipState(total=zero, in_a_row=zero, norms=jnp.zeros(config.faults.spike_window, jnp.float32)),
        ema=None if config.optimizer.ema_decay is None else jax.tree.map(jnp.copy, params),
        recurrent=init_state(config.model, config.global_batch) if config.order == "streams" else None,
    )


def abstract_state(
    config: ProgramConfig, definition: ModelDefinition, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Shapes, dtypes and shardings of the state, as `jax.ShapeDtypeStruct`, without allocating it.

    Raises:
        InputError: a dimension does not divide over the mesh.
    """
    state = jax.eval_shape(lambda params: create(config, params, optimizer), definition.params)

    def sharding(path: Any, leaf: Any, axes: Any) -> Any:
        return parameter_sharding(mesh, leaf.shape, axes, name=jax.tree_util.keystr(path, simple=True, separator="/"))

    shardings = jax.tree.map_with_path(sharding, definition.params, definition.axes)
    state_shardings = TrainState(
        step=replicated(mesh),
        params=shardings,
        opt_state=optax.tree_utils.tree_map_params(
            optimizer.init,
            # Muon and AdamW each keep moments of their own parameters only, and masked nodes in place of the others.
            lambda moment, sharding: moment if isinstance(moment, optax.MaskedNode) else sharding,
            state.opt_state,
            shardings,
            transform_non_params=lambda _: replicated(mesh),
            is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
        ),
        skips=jax.tree.map(lambda _: replicated(mesh), state.skips),
        ema=None if state.ema is None else shardings,
        recurrent=None
        if state.recurrent is None
        else jax.tree.map_with_path(sharding, state.recurrent, state_axes(config.model)),
    )
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state, state_shardings
    )
