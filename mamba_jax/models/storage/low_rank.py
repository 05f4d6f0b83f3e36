"""Low-rank adapters beside the matrices of projections, for training that leaves the matrices as they are.

What an adapter is, its rank, its scale and how it is drawn, is said by a rule of `qwix`, an optional dependency (the
extra `lora`). Its `LoraProvider` is not used to compute: it replaces `jax.lax.dot_general` while a layer is called, and
keeps what it makes there as an attribute of the layer. Layers here are rebuilt from stacked arrays inside of
`jax.lax.scan`, where such an attribute is lost; and its products leave the compute dtype for that of the parameters.
"""

import dataclasses
import re
from typing import Any

import jax

from mamba_jax.errors import InputError
from mamba_jax.models.config import LoraConfig
from mamba_jax.models.parameters import ModelDefinition, Params, paths
from mamba_jax.models.storage.int8 import imported_qwix
from mamba_jax.models.storage.matrix import LowRank

_KERNEL = "/kernel"


def adapted(definition: ModelDefinition, config: LoraConfig) -> ModelDefinition:
    """The model with an adapter beside each chosen projection, of which only the adapters are trained.

    Adapters of blocks that are stacked are stacked as well: each layer has its own.

    Args:
        definition: the model.
        config: which projections, and the adapters' rank; without a rank the model stays as it is.

    Raises:
        InputError: a target is found in the path of no projection.
    """
    if config.rank is None:
        return definition
    rank = config.rank
    targets = _targets(definition, config)

    def replace(tree: Params, of_target: Any, of_other: Any = lambda leaf: leaf) -> Params:
        def one(path: str, leaf: Any, like: Any, dim: int | None) -> Any:
            return of_target(leaf, like, dim) if path in targets else of_other(leaf)

        return jax.tree.map(one, paths(definition.params), tree, definition.params, definition.summed)

    def node(base: Any, lora_a: Any, lora_b: Any) -> LowRank:
        return LowRank(base=base, lora_a=lora_a, lora_b=lora_b, scale=config.alpha / rank)

    def shapes(leaf: Any, like: Any, dim: int) -> LowRank:
        lead, inputs, outputs = like.shape[:dim], like.shape[dim], like.shape[dim + 1 :]
        made = (jax.ShapeDtypeStruct((*lead, *rest), like.dtype) for rest in ((inputs, rank), (rank, *outputs)))
        return node(leaf, *made)

    return dataclasses.replace(
        definition,
        params=replace(definition.params, shapes),
        axes=replace(
            definition.axes,
            lambda axes, _, dim: node(axes, (*axes[: dim + 1], None), (*axes[:dim], None, *axes[dim + 1 :])),
        ),
        decay=replace(definition.decay, lambda decay, *_: node(decay, True, True)),
        trained=replace(definition.trained, lambda *_: node(False, True, True), lambda _: False),
    )


def _targets(definition: ModelDefinition, config: LoraConfig) -> set[str]:
    """The paths of the matrices that get an adapter, of those in blocks that products are taken with."""
    dims = jax.tree.leaves(definition.summed, is_leaf=lambda leaf: leaf is None)
    pairs = zip(jax.tree.leaves(paths(definition.params)), dims, strict=True)
    # Neither of the two tables, the embedding's and the head's.
    names = [path.removesuffix(_KERNEL) for path, dim in pairs if dim is not None and path.endswith(_KERNEL)]
    for target in config.targets:
        if not any(re.search(target, name) for name in names):
            raise InputError(
                f"lora.targets: {target!r} is found in no projection of this model, which has {', '.join(names)}"
            )
    targets = config.targets or ("",)
    return {name + _KERNEL for name in names if any(re.search(target, name) for target in targets)}


def with_new_adapters(definition: ModelDefinition, params: Params, config: LoraConfig, key: jax.Array) -> Params:
    """Parameters with adapters that change nothing yet: A random and B zero. It may be called inside `jax.jit`.

    Args:
        definition: from `adapted`.
        params: those of the model, without adapters.
        config: of the adapters; without a rank the parameters stay as they are.
        key: a `jax.random.key`.

    Raises:
        InputError: `qwix` is not installed.
    """
    if config.rank is None:
        return params
    qwix = imported_qwix("low-rank adapters", extra="lora")
    rule = qwix.LoraRule(module_path=".*", rank=config.rank, alpha=config.alpha)
    nodes = jax.tree.leaves(definition.params, is_leaf=_is_low_rank)
    keys = iter(jax.random.split(key, 2 * sum(map(_is_low_rank, nodes))))

    def draw(initializer: Any, like: jax.ShapeDtypeStruct, num_stacked: int) -> jax.Array:
        def one(key: jax.Array) -> jax.Array:
            return initializer(key, like.shape[num_stacked:], like.dtype)

        return jax.vmap(one)(jax.random.split(next(keys), like.shape[0])) if num_stacked else one(next(keys))

    def adapter(like: Any, base: Any) -> Any:
        if not _is_low_rank(like):
            return base
        num_stacked = like.lora_a.ndim - 2
        lora_a = draw(rule.lora_a_initializer, like.lora_a, num_stacked)
        lora_b = draw(rule.lora_b_initializer, like.lora_b, num_stacked)
        return LowRank(base=base, lora_a=lora_a, lora_b=lora_b, scale=rule.alpha / rule.rank)

    return jax.tree.map(adapter, definition.params, params, is_leaf=_is_low_rank)


def without_adapters(params: Params) -> Params:
    """The parameters that the adapters stand beside."""
    return jax.tree.map(lambda leaf: leaf.base if _is_low_rank(leaf) else leaf, params, is_leaf=_is_low_rank)


def merged(params: Params) -> Params:
    """Parameters of the same model without adapters, W + scale A B in the place of each; computed in float32."""
    return jax.tree.map(lambda leaf: _merge(leaf) if _is_low_rank(leaf) else leaf, params, is_leaf=_is_low_rank)


@jax.jit
def _merge(matrix: LowRank) -> jax.Array:
    lora_a, lora_b = matrix.lora_a, matrix.lora_b

    def change(a: jax.Array, b: jax.Array) -> jax.Array:
        return jax.numpy.tensordot(a, b, axes=1, precision=jax.lax.Precision.HIGHEST)

    delta = jax.vmap(change)(lora_a, lora_b) if lora_a.ndim == 3 else change(lora_a, lora_b)
    return (matrix.base + matrix.scale * delta).astype(matrix.base.dtype)


def _is_low_rank(leaf: Any) -> bool:
    return isinstance(leaf, LowRank)
