"""Models as pure data: parameters are nested dictionaries of arrays, and a definition turns them into a model."""

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
from flax import nnx

from mamba_jax.models.config import ModelConfig
from mamba_jax.models.language_model import LanguageModel
from mamba_jax.models.storage.by_columns import by_columns
from mamba_jax.models.storage.per_layer import unstacked
from mamba_jax.sharding import Axis

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ModelDefinition:
    """Everything about a model but the values of its parameters; hashable by identity, so a static jit argument.

    Attributes:
        config: the model's config.
        params: tree of `jax.ShapeDtypeStruct`, with layers stacked on a leading axis.
        axes: same tree, the logical axes of every parameter.
        decay: same tree, True where weight decay applies.
        trained: same tree, False where training leaves the parameter as it is, or a mask (R,) of the layers of a stack.
        summed: same tree, the dimension that products sum over of matrices that may be in int8; None elsewhere.
    """

    config: ModelConfig
    params: Params
    axes: Params
    decay: Params
    trained: Params
    summed: Params
    _graph: Any
    _state: Any

    @property
    def num_trained(self) -> int:
        """Number of parameters that are trained."""
        shares = jax.tree.map(np.mean, self.trained)
        parts = jax.tree.map(lambda share, leaf: share * math.prod(leaf.shape), shares, self.params)
        return round(sum(jax.tree.leaves(parts)))

    def merge(self, params: Params) -> LanguageModel:
        """The model with these parameter values."""
        state = jax.tree.map(lambda leaf: leaf, self._state)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(self._graph, state)

    def unstacked(self, params: Params) -> Params:
        """The parameters with an array for each layer of a stack, for programs that read one token; see `PerLayer`.

        Matrices of mixers that read them so lie by columns; see `by_columns`.
        """
        stacks = {stack.name for stack in self.config.stacks}
        layers = {name: unstacked(part) if name in stacks else part for name, part in params.items()}
        for name in (stack.name for stack in self.config.stacks if stack.mixer.reads_columns):
            layers[name] = by_columns(layers[name], self.summed[name])
        return layers


@functools.cache
def define(config: ModelConfig) -> ModelDefinition:
    """The definition of a model, without allocating any parameter."""
    graph, state = nnx.split(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(params=0))))
    variables = dict(nnx.to_flat_state(state))

    def tree(value) -> Params:
        return nnx.traversals.unflatten_mapping({path: value(path, variable) for path, variable in variables.items()})

    stacked = {stack.name for stack in config.stacks}

    def axes(path: tuple[str, ...], variable: nnx.Variable) -> tuple[Axis | None, ...]:
        return (Axis.LAYERS, *variable.axes) if path[0] in stacked else variable.axes

    def summed(path: tuple[str, ...], variable: nnx.Variable) -> int | None:
        return None if variable.summed is None else variable.summed + (path[0] in stacked)

    return ModelDefinition(
        config=config,
        params=nnx.to_pure_dict(state),
        axes=tree(axes),
        decay=tree(lambda path, variable: variable.decay),
        trained=tree(lambda path, variable: True),
        summed=tree(summed),
        _graph=graph,
        _state=state,
    )


def init(config: ModelConfig, key: jax.Array) -> Params:
    """Fresh parameters; a pure function that can be jitted with sharded outputs.

    Args:
        config: the model's config.
        key: a `jax.random.key`.
    """
    return nnx.to_pure_dict(nnx.state(LanguageModel(config, rngs=nnx.Rngs(params=key))))


def count(config: ModelConfig) -> int:
    """Number of parameters, including padded vocabulary rows; tied weights count once."""
    return size(define(config).params)


def size(params: Params) -> int:
    """Number of elements of all parameters of a tree."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def paths(params: Params) -> Params:
    """Tree like the parameters: the path of each, such as "layers/mixer/in_proj/kernel"."""
    return jax.tree.map_with_path(lambda path, _: jax.tree_util.keystr(path, simple=True, separator="/"), params)


def chosen(choice: Params, params: Params) -> Params:
    """The parameters of a choice; None, which is no leaf, in place of the others.

    Args:
        choice: tree like the parameters: True, False, or of a stack a mask of its layers, (R,).
        params: the parameters; of some layers of a stack those are taken alone.
    """

    def choose(is_chosen: bool | np.ndarray, leaf: Any) -> Any:
        return leaf[np.flatnonzero(is_chosen)] if isinstance(is_chosen, np.ndarray) else leaf if is_chosen else None

    return jax.tree.map(choose, choice, params)


def completed(choice: Params, part: Params, params: Params) -> Params:
    """The parameters, those of the choice as they are in `part`, which `chosen` has made or a tree like it."""

    def complete(is_chosen: bool | np.ndarray, new: Any, old: Any) -> Any:
        if isinstance(is_chosen, np.ndarray):
            return old.at[np.flatnonzero(is_chosen)].set(new)
        return new if is_chosen else old

    return jax.tree.map(complete, choice, part, params)
