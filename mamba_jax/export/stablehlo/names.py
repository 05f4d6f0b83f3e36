"""Trees of arrays as dictionaries: an artefact's arguments must be of classes that every process knows."""

from typing import Any

import jax

from mamba_jax.models.storage.per_layer import PerLayer


def _name(path: tuple[Any, ...]) -> str:
    """The name of an array: stack, number of the layer in it, and what is below; `layers.0.mixer.in_proj.kernel`."""
    parts = [str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", None)))) for entry in path]
    return ".".join(parts)


def by_name(tree: Any) -> dict[str, Any]:
    """The arrays of a model's parameters or state, with an array for each layer, by name."""
    found: dict[str, Any] = {}
    leaves, _ = jax.tree.flatten_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, PerLayer))
    for path, leaf in leaves:
        if isinstance(leaf, PerLayer):
            named = {_name((path[0], jax.tree_util.SequenceKey(i), *path[1:])): x for i, x in enumerate(leaf.arrays)}
        else:
            named = {_name(path): leaf}
        assert not found.keys() & named.keys(), f"two arrays are called {min(found.keys() & named.keys())}"
        found |= named
    return found


def like(tree: Any, arrays: dict[str, Any]) -> Any:
    """Reverses `by_name`.

    Args:
        tree: of the same structure, with leaves of any kind.
        arrays: by name.
    """
    leaves, structure = jax.tree.flatten(tree)
    names = by_name(jax.tree.unflatten(structure, range(len(leaves))))
    order = {number: name for name, number in names.items()}
    return jax.tree.unflatten(structure, [arrays[order[number]] for number in range(len(leaves))])
