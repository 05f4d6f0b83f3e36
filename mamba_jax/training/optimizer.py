"""AdamW with the recipe of the Mamba paper, and Muon."""

import dataclasses
import functools
import re
from typing import Any

import jax
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from mamba_jax.config_base import require
from mamba_jax.errors import InputError
from mamba_jax.models.parameters import ModelDefinition, Params, chosen, paths
from mamba_jax.sharding import Axis
from mamba_jax.training.config import CosineSchedule, OptimizerConfig

# Root mean square of an AdamW update before the learning rate, as measured in arXiv 2502.16982, section 2.2.
_ADAMW_RMS = 0.2


def learning_rate(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Learning rate of update `count`, counted from 0.

    The warm-up starts above zero, so that the first update is not lost, and the last update has `final_lr`.

    Args:
        config: its fields `peak_lr` and `schedule` are used.
        num_steps: number of updates in the whole run.
    """
    schedule = config.schedule
    warmup = schedule.warmup(num_steps)
    if isinstance(schedule, CosineSchedule):
        after_warmup = optax.cosine_decay_schedule(
            config.peak_lr, max(num_steps - warmup, 1), alpha=schedule.final_lr / config.peak_lr
        )
        pieces, boundaries = [after_warmup], []
    else:
        decay = schedule.decay(num_steps)
        stable = optax.constant_schedule(config.peak_lr)
        falling = optax.linear_schedule(config.peak_lr, schedule.final_lr, max(decay, 1))
        pieces, boundaries = [stable, falling], [num_steps - decay]
    if warmup:
        pieces = [optax.linear_schedule(0.0, config.peak_lr, warmup), *pieces]
        boundaries = [warmup, *boundaries]
    joined = optax.join_schedules(pieces, boundaries)
    return lambda count: joined(count + 1)


def make_optimizer(
    config: OptimizerConfig, *, num_steps: int, definition: ModelDefinition
) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW, or Muon for hidden matrices and AdamW for all else.

    With the momentum m = muon_momentum m + (1 - muon_momentum) g and its Nesterov look-ahead n, Muon changes a matrix W
    of I inputs and O outputs by

        W -= lr (0.2 sqrt(max(I, O)) orthogonal(n) + weight_decay W)

    where orthogonal(n) is nearly U V^T for the singular value decomposition n = U S V^T: five Newton-Schulz steps bring
    all singular values above 0.005 of the Frobenius norm to 0.68 .. 1.16. The factor gives every update the root mean
    square of AdamW's, so that both share `peak_lr` and `weight_decay`.

    Updates are of the parameters and layers that are trained, as `chosen` gives them, and only those have moments.

    Args:
        config: the optimizer's settings.
        num_steps: number of updates in the whole run.
        definition: the model, from `with_frozen`; it says what is trained, where weight decay applies and what the
            dimensions of parameters mean.

    Source: arXiv 2312.00752, appendix E.2.1; AdamW is arXiv 1711.05101; Muon at this scale is arXiv 2502.16982.
    """
    direction = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    if config.algorithm == "muon":
        matrices = matrix_dimensions(definition)
        labels = jax.tree.map(
            lambda dims: "muon" if isinstance(dims, MuonDimensionNumbers) else "adam", matrices, is_leaf=_is_entry
        )
        direction = optax.partition({"muon": _orthogonal_momentum(config, matrices), "adam": direction}, labels)
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.chain(
            direction,
            optax.add_decayed_weights(config.weight_decay, mask=definition.decay),
            optax.scale_by_learning_rate(learning_rate(config, num_steps)),
        ),
    )
    if not config.lr_multipliers and all(jax.tree.leaves(definition.trained)):
        return optimizer
    if config.lr_multipliers:
        factors = jax.tree.map(_of_trained, definition.trained, _multipliers(config, definition))
        optimizer = optax.chain(optimizer, optax.stateless(lambda updates, _: _multiplied(factors, updates)))
    return _of_trained_layers(definition, optax.masked(optimizer, jax.tree.map(np.any, definition.trained)))


def with_frozen(definition: ModelDefinition, config: OptimizerConfig) -> ModelDefinition:
    """The model, of which parameters whose learning rate is multiplied by 0 are not trained.

    Raises:
        InputError: a pattern of `config.lr_multipliers` decides of no parameter, nothing is left to train, or a part of
            a stack's layers with Muon, which takes them together.
    """
    if not config.lr_multipliers:
        return definition
    names = jax.tree.leaves(chosen(definition.trained, paths(definition.params)))
    decisions = [pair for name in names for pair in _decisions(config, definition, name)]
    deciding = {pattern for pattern, _ in decisions}
    if unused := [pattern for pattern, _ in config.lr_multipliers if pattern not in deciding]:
        raise InputError(
            f"optimizer.lr_multipliers: {unused[0]!r} is found in no path that the patterns before it leave; what is "
            f"trained is {', '.join(names)}"
        )
    if all(factor == 0 for _, factor in decisions):
        frozen = " and ".join(repr(pattern) for pattern, _ in config.lr_multipliers)
        raise InputError(f"optimizer.lr_multipliers: {frozen} freeze everything: leave something to train")

    def left(is_trained: bool, factor: np.ndarray) -> bool | np.ndarray:
        layers = np.asarray(factor != 0).reshape(-1)
        return is_trained and (layers if layers.any() and not layers.all() else bool(layers.all()))

    trained = jax.tree.map(left, definition.trained, _multipliers(config, definition))
    parts = [leaf for leaf in jax.tree.leaves(trained) if isinstance(leaf, np.ndarray)]
    require(
        not parts or config.algorithm != "muon",
        "optimizer.lr_multipliers freeze some layers of a stack, which optimizer.algorithm='muon' takes together: "
        "freeze all of them or none, or choose 'adamw'",
    )
    return dataclasses.replace(definition, trained=trained)


def _decisions(config: OptimizerConfig, definition: ModelDefinition, path: str) -> list[tuple[str | None, float]]:
    """For each layer of a parameter, or once for one that is not stacked: the pattern that decides, and its factor."""
    stack, _, rest = path.partition("/")
    numbers = definition.config.block_numbers.get(stack)
    names = [(path,)] if numbers is None else [(path, f"{stack}/{number}/{rest}") for number in numbers]
    return [
        next((pair for pair in config.lr_multipliers if any(re.search(pair[0], name) for name in both)), (None, 1.0))
        for both in names
    ]


def _multipliers(config: OptimizerConfig, definition: ModelDefinition) -> Params:
    """The factor on the learning rate of every parameter: one, or (R, 1, ...) for the layers of a stack."""

    def factor(path: str, leaf: Any) -> np.ndarray:
        factors = np.array([factor for _, factor in _decisions(config, definition, path)], np.float32)
        is_one = (factors == factors[0]).all()
        return factors[:1].reshape(()) if is_one else factors.reshape(-1, *(1,) * (len(leaf.shape) - 1))

    return jax.tree.map(factor, paths(definition.params), definition.params)


def _of_trained(is_trained: bool | np.ndarray, factor: np.ndarray) -> np.ndarray:
    """The factors of the layers that are trained."""
    return factor[is_trained] if isinstance(is_trained, np.ndarray) else factor


def _multiplied(factors: Params, updates: Any) -> Any:
    def one(factor: np.ndarray, update: Any) -> Any:
        return update if isinstance(update, optax.MaskedNode) else factor * update

    return jax.tree.map(one, factors, updates)


def _of_trained_layers(
    definition: ModelDefinition, optimizer: optax.GradientTransformation
) -> optax.GradientTransformation:
    """The optimizer for parameters of which only the layers that are trained get moments."""

    def layers(is_trained: bool | np.ndarray, leaf: Any) -> Any:
        return leaf[np.flatnonzero(is_trained)] if isinstance(is_trained, np.ndarray) else leaf

    def init(params: Any) -> Any:
        # Optax also asks with what is no tree, to find out where moments are.
        return optimizer.init(jax.tree.map(layers, definition.trained, params) if isinstance(params, dict) else params)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return optimizer.update(updates, state, jax.tree.map(layers, definition.trained, params))

    return optax.GradientTransformation(init, update)


def begin_schedule(stored: Any, fresh: Any) -> Any:
    """The state of an optimizer with stored moments, whose learning rate begins at its first update again.

    Args:
        stored: state of an optimizer after some updates; the corrections of its means go on from there.
        fresh: state of the same kind before the first.
    """

    def is_count(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    return jax.tree.map(lambda new, old: new if is_count(new) else old, fresh, stored, is_leaf=is_count)


def matrix_dimensions(definition: ModelDefinition) -> Params:
    """Which parameters Muon updates: the matrices inside the blocks.

    These are the layers' parameters with weight decay, except convolutions, which are one filter per channel. Behind
    the dimension of the layers, the first dimension is the input and the last the output. Dimensions in between count
    separate matrices, each of which is orthogonalised alone, such as those of x and z in the input projection; so does
    one of experts, before the input.

    Args:
        definition: the model; it says which parameters decay and what their dimensions mean.

    Returns:
        Tree like the parameters: the input and output dimension of every matrix, `optax.MaskedNode()` for all else.
    """

    def dimensions(leaf: Any, decay: bool, trained: Any, axes: tuple[Axis | None, ...]) -> Any:
        if not (decay and np.any(trained)) or axes[0] != Axis.LAYERS or Axis.CONV in axes:
            return optax.MaskedNode()
        return MuonDimensionNumbers(reduction_axis=2 if axes[1] == Axis.EXPERT else 1, output_axis=len(leaf.shape) - 1)

    return jax.tree.map(dimensions, definition.params, definition.decay, definition.trained, definition.axes)


def _orthogonal_momentum(config: OptimizerConfig, matrices: Params) -> optax.GradientTransformation:
    """Muon's update without learning rate and decay; `matrices` is from `matrix_dimensions`."""

    def to_adamw_rms(dims: Any, update: Any) -> Any:
        if isinstance(dims, optax.MaskedNode):
            return update
        return update * (_ADAMW_RMS * max(update.shape[dims.reduction_axis], update.shape[dims.output_axis]) ** 0.5)

    of_a_layer = jax.tree.map(
        lambda dims: dims if isinstance(dims, optax.MaskedNode) else MuonDimensionNumbers(*(dim - 1 for dim in dims)),
        matrices,
        is_leaf=_is_entry,
    )
    muon = scale_by_muon(beta=config.muon_momentum, nesterov=True, weight_dimension_numbers=of_a_layer)
    return optax.chain(
        optax.GradientTransformation(muon.init, functools.partial(_one_layer_at_a_time, muon)),
        optax.stateless(lambda updates, _: jax.tree.map(to_adamw_rms, matrices, updates, is_leaf=_is_entry)),
    )


def _one_layer_at_a_time(muon: optax.GradientTransformation, updates: Any, state: Any, params: Any = None) -> Any:
    """Muon's update in a loop over the layers, so that only one layer's matrices are gathered on a device at a time."""

    def update_layer(layer: tuple[Any, Any]) -> tuple[Any, Any]:
        updates, momentum = layer
        result: Any = muon.update(updates, state._replace(mu=momentum))
        updates, after = result
        return updates, (after.mu, after.count)

    updates, (momentum, counts) = jax.lax.map(update_layer, (updates, state.mu))
    return updates, state._replace(mu=momentum, count=counts[0])


def _is_entry(node: Any) -> bool:
    """Whether a node is an entry of the tree of `matrix_dimensions`: both kinds are tuples, not leaves, to JAX."""
    return isinstance(node, (MuonDimensionNumbers, optax.MaskedNode))
