"""Everything an optimizer step changes, and how it is laid out over the mesh."""

import dataclasses
import typing
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mamba_jax.models import parameters
from mamba_jax.models.parameters import ModelDefinition, Params
from mamba_jax.sharding import parameter_sharding, replicated


# JAX rebuilds the class around shapes and shardings, which a check of every construction would refuse.
@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """State of training.

    Attributes:
        step: updates done so far, an int32 scalar; also the number of batches consumed.
        params: parameters.
        opt_state: of the optimizer; its moments are laid out as their parameters.
    """

    step: Any
    params: Any
    opt_state: Any


def create(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update."""
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params))


def abstract_state(definition: ModelDefinition, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, as `jax.ShapeDtypeStruct`, without allocating it.

    Raises:
        InputError: a parameter dimension does not divide over the mesh.
    """
    state = jax.eval_shape(lambda params: create(params, optimizer), definition.params)
    shardings = jax.tree.map_with_path(
        lambda path, leaf, axes: parameter_sharding(
            mesh, leaf.shape, axes, name=jax.tree_util.keystr(path, simple=True, separator="/")
        ),
        definition.params,
        definition.axes,
    )
    state_shardings = TrainState(
        step=replicated(mesh),
        params=shardings,
        opt_state=optax.tree_utils.tree_map_params(
            optimizer.init,
            lambda _, sharding: sharding,
            state.opt_state,
            shardings,
            transform_non_params=lambda _: replicated(mesh),
        ),
    )
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state, state_shardings
    )


def initialize(
    definition: ModelDefinition,
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
    *,
    seed: int,
    params: Params | None = None,
) -> TrainState:
    """A fresh state, created directly in its shards.

    Args:
        definition: of the model.
        optimizer: of the run.
        abstract: from `abstract_state`.
        seed: of the parameters.
        params: values to start from instead of random ones; cast to the dtype of the run.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    if params is None:

        def build() -> TrainState:
            return create(parameters.init(definition.config, jax.random.key(seed)), optimizer)

        return jax.jit(build, out_shardings=shardings)()
    params = jax.tree.map(
        lambda value, leaf: jax.device_put(jnp.asarray(value, leaf.dtype), leaf.sharding), params, abstract.params
    )
    return jax.jit(lambda params: create(params, optimizer), out_shardings=shardings)(params)
