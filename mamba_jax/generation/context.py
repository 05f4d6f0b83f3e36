"""What a model knows after a text, as a value: to be forked, continued, batched, and kept in a file."""

import dataclasses
import functools
import hashlib
import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jaxtyping import Float, Int32

from mamba_jax.checkpoint.fingerprints import fingerprint
from mamba_jax.config_base import from_json, to_json
from mamba_jax.errors import InputError, reason, short
from mamba_jax.export.initial import decisive
from mamba_jax.export.weights import StoredTensor, first_few, open_safetensors, read_metadata
from mamba_jax.files import replacement
from mamba_jax.models.config import ModelConfig
from mamba_jax.models.mixers.declaration import StateArray
from mamba_jax.models.parameters import ModelDefinition, Params
from mamba_jax.models.state import ANY_LENGTH, LMState, declare, with_room
from mamba_jax.models.storage.per_layer import PerLayer, unstacked
from mamba_jax.sharding import Axis

_FORMAT, _VERSION = "mamba_jax context", "1"
_FLOATS = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """What a model knows after a text.

    No array of it is ever changed, so that any number of continuations may begin here.

    Attributes:
        tokens: all ids that were read, (T,).
        logits: of the next token, (V,), V the padded vocabulary.
        state: after the last token, of one row; with stacked arrays, or an array for each layer.
    """

    tokens: Int32[np.ndarray, " T"]
    logits: Float[jax.Array, " V"]
    state: LMState


def fingerprint_of(definition: ModelDefinition, params: Params) -> str:
    """A short text that tells the weights of a model from others.

    It is the same for stacked parameters and those with an array for each layer, on every device and mesh, and for
    bfloat16 and float32 as long as the values are equal.

    Args:
        definition: the model.
        params: its parameters.

    Returns:
        16 hexadecimal digits.
    """
    found = jax.device_get(_fingerprints(definition, params))
    lines = [
        f"{jax.tree_util.keystr(path, simple=True, separator='/')} {np.asarray(values).tolist()}"
        for path, values in jax.tree.leaves_with_path(found)
    ]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]


@functools.partial(jax.jit, static_argnums=0)
def _fingerprints(definition: ModelDefinition, params: Params) -> Any:
    """For every parameter a fingerprint, and for those of a stack one of each layer, (R,)."""

    def of_stack(leaf: Any) -> jax.Array:
        if isinstance(leaf, PerLayer):
            return jnp.stack([_of_values(array) for array in leaf.arrays])
        return jax.vmap(_of_values)(leaf)

    stacks = {stack.name for stack in definition.config.stacks}
    return {
        name: jax.tree.map(of_stack, part, is_leaf=lambda leaf: isinstance(leaf, PerLayer))
        if name in stacks
        else jax.tree.map(_of_values, part)
        for name, part in params.items()
    }


def _of_values(array: jax.Array) -> jax.Array:
    """The fingerprint of an array's values as float32."""
    if array.dtype == jnp.bfloat16:
        # Devices may take the smallest numbers for 0 when they convert.
        return fingerprint(jax.lax.bitcast_convert_type(array, jnp.uint16).astype(jnp.uint32) << 16)
    return fingerprint(array.astype(jnp.float32) if jnp.issubdtype(array.dtype, jnp.floating) else array)


def save_context(path: str | Path, context: Context, definition: ModelDefinition, weights_fingerprint: str) -> None:
    """Keeps a context in one safetensors file, which appears only when it is whole.

    The arrays of the state are named as in the state's tree, such as `state/layers/ssm`, without the axis of rows and
    in the dtypes that they have; beside them are `logits` and `tokens`. Of attention's rings only the slots are stored
    that were written. The header says which model they belong to.

    Args:
        path: the file; one that is there is replaced.
        context: what to keep.
        definition: the model.
        weights_fingerprint: what `fingerprint_of` says of its weights.

    Raises:
        InputError: the file cannot be written, the state has more than one row, is one between single tokens of
            generation, or there is NaN in it.
    """
    path = Path(path)
    declared = _by_name(declare(definition.config, batch_size=1, max_length=ANY_LENGTH))
    leaves = _by_name(_on_host(context.state))
    if any(declared[name].is_passing and leaf.dtype == np.int32 and leaf.any() for name, leaf in leaves.items()):
        raise InputError("the context's state is one between single tokens: read its last token with `extend`")
    leaves = {name: leaf for name, leaf in leaves.items() if not declared[name].is_passing}
    arrays = {name: _of_one_row(name, declared[name], leaf) for name, leaf in leaves.items()}
    rings = {}
    for name, axis in _ring_axes(definition.config).items():
        whole = arrays[name]
        begin, end = _written(whole, axis)
        arrays[name] = np.ascontiguousarray(whole.take(range(begin, end), axis))
        rings[name] = [begin, whole.shape[axis]]
    arrays |= {"logits": np.asarray(context.logits, np.float32), "tokens": np.asarray(context.tokens, np.int32)}
    _check_finite("the context", arrays, declared)
    header = {
        "format": _FORMAT,
        "version": _VERSION,
        "model": to_json(definition.config, indent=None),
        "weights": weights_fingerprint,
        "rings": json.dumps(rings),
        "sha256": _checksum(arrays, rings),
    }
    content = safetensors.numpy.save(arrays, metadata=header)
    try:
        with replacement(path, mark=f".{uuid.uuid4().hex}") as temporary:
            temporary.write_bytes(content)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write {path} ({reason(error)}): make room there or choose another file") from None


def load_context(
    path: str | Path,
    definition: ModelDefinition,
    weights_fingerprint: str,
    *,
    max_length: int | None,
    state_dtype: Literal["float32", "bfloat16"] = "float32",
) -> Context:
    """Reads a context that `save_context` has kept.

    Args:
        path: the file.
        definition: the model that is to go on from it.
        weights_fingerprint: what `fingerprint_of` says of its weights.
        max_length: that of the decoder that goes on from it: most tokens of a text, those of the context included.
        state_dtype: that of the decoder; a state that was kept in another dtype is converted.

    Returns:
        The context; its state has an array for each layer, as those of a decoder.

    Raises:
        InputError: the file cannot be read or is damaged, is something else or of another version, belongs to another
            model (the message says what differs), or holds more than `max_length` tokens, or NaN.
    """
    path = Path(path)
    header, tensors = read_metadata(path), open_safetensors(path)
    _check_header(path, header, definition.config, weights_fingerprint)
    _check_names(path, tensors, definition.config)
    rings = _rings(path, header, tensors, definition.config)
    room = _check_tensors(path, tensors, rings, definition.config)
    length = tensors["tokens"].shape[0]
    if max_length is not None and max(length, room or 0) > max_length:
        has = f"room for {room} tokens" if length <= max_length else f"{length} tokens"
        raise InputError(
            f"{path} has {has}, but max_length is {max_length}: load it with at least {max(length, room or 0)}"
        )
    declared = declare(definition.config, batch_size=1, max_length=max_length)
    arrays = {name: tensor.read() for name, tensor in tensors.items()}
    _check_finite(str(path), arrays, _by_name(declared))
    if header.get("sha256") != _checksum(arrays, rings):
        raise InputError(f"{path} is damaged (its arrays differ from their checksum): take another copy")
    outside = [token for token in arrays["tokens"].tolist() if not 0 <= token < definition.config.padded_vocab_size]
    if outside:
        raise InputError(f"{path} is damaged (it has the token id {outside[0]}): take another copy")

    state = _restored(arrays, rings, declared, _ring_axes(definition.config), state_dtype)
    layers = {name: unstacked(part) for name, part in with_room(definition.config, state, max_length).items()}
    return Context(tokens=arrays["tokens"], logits=jnp.asarray(arrays["logits"]), state=layers)


def _restored(
    arrays: Mapping[str, np.ndarray],
    rings: Mapping[str, Sequence[int]],
    declared: LMState,
    axes: Mapping[str, int],
    state_dtype: str,
) -> LMState:
    """The stacked state of one row from the arrays of a file; rings are whole again."""

    def restored(keys: Any, array: StateArray) -> jax.Array:
        name, dtype = _name(keys), state_dtype if array.dtype == "float32" else array.dtype
        if array.is_passing:
            return jnp.full(array.shape, array.initial, dtype)
        whole = _with_unwritten(arrays[name], axes[name], rings[name]) if name in rings else arrays[name]
        return jnp.asarray(np.expand_dims(whole, array.axes.index(Axis.BATCH)).astype(dtype))

    return jax.tree.map_with_path(restored, declared)


def _name(keys: Any) -> str:
    return "state/" + jax.tree_util.keystr(keys, simple=True, separator="/")


def _by_name(tree: Any) -> dict[str, Any]:
    """The leaves of a state's tree by the names that they have in a file."""
    return {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _on_host(state: LMState) -> LMState:
    """The state as stacked NumPy arrays."""

    def whole(leaf: Any) -> np.ndarray:
        return np.stack(leaf.arrays) if isinstance(leaf, PerLayer) else leaf

    return jax.tree.map(whole, jax.device_get(state), is_leaf=lambda leaf: isinstance(leaf, PerLayer))


def _of_one_row(name: str, declared: StateArray, array: np.ndarray) -> np.ndarray:
    """The array without its axis of rows, of which there must be one."""
    axis = declared.axes.index(Axis.BATCH)
    if array.shape[axis] != 1:
        raise InputError(f"a context is of one row, but {name} has {array.shape[axis]}: take one with taken_rows")
    return np.ascontiguousarray(np.squeeze(array, axis))


def _model(config: ModelConfig) -> dict[str, Any]:
    """What decides what a state means, flat; ids that only pad the vocabulary do not."""
    return {name: value for name, value in decisive(config).items() if name not in ("vocab_size", "vocab_multiple")}


def _ring_axes(config: ModelConfig) -> dict[str, int]:
    """The dimension that counts tokens, of arrays that have one; without the axis of rows."""
    least, most = (_by_name(declare(config, batch_size=1, max_length=length)) for length in (1, ANY_LENGTH))
    differ = {
        name: [
            dim
            for dim, sizes in enumerate(zip(_shape(least[name]), _shape(most[name]), strict=True))
            if len({*sizes}) > 1
        ]
        for name in most
    }
    return {name: dims[0] for name, dims in differ.items() if dims}


def _written(ring: np.ndarray, axis: int) -> tuple[int, int]:
    """The first slot that was written, and the one behind the last."""
    others = tuple(dim for dim in range(ring.ndim) if dim != axis)
    used = np.flatnonzero(np.any(ring != 0, axis=others))
    return (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 0)


def _with_unwritten(slots: np.ndarray, axis: int, place: Sequence[int]) -> np.ndarray:
    """The whole ring, from its written slots, the place of the first of them and the number of all."""
    begin, capacity = place
    padding = [(0, 0)] * slots.ndim
    padding[axis] = (begin, capacity - begin - slots.shape[axis])
    return np.pad(slots, padding)


def _rings(
    path: Path, header: Mapping[str, str], tensors: Mapping[str, StoredTensor], config: ModelConfig
) -> dict[str, list[int]]:
    """Where the slots of each ring stand, and how many it has, as the header says."""
    axes, rings = _ring_axes(config), {}
    try:
        rings = json.loads(header.get("rings", ""))
        room = max((capacity for _, capacity in rings.values()), default=1)
        whole = _by_name(declare(config, batch_size=1, max_length=room))
        places = [(*rings[name], tensors[name].shape[axis], _shape(whole[name])[axis]) for name, axis in axes.items()]
        are_right = rings.keys() == axes.keys() and all(
            type(begin) is type(capacity) is int and 0 <= begin <= capacity - size and 0 < capacity == declared
            for begin, capacity, size, declared in places
        )
    except (ValueError, RecursionError, TypeError, AttributeError, KeyError, IndexError):
        are_right = False
    if not are_right:
        raise InputError(f"{path} is damaged (it does not say how its state is stored): take another copy")
    return rings


def _check_names(path: Path, tensors: Mapping[str, StoredTensor], config: ModelConfig) -> None:
    declared = _by_name(declare(config, batch_size=1, max_length=1))
    expected = {*(name for name, array in declared.items() if not array.is_passing), "tokens", "logits"}
    if expected != tensors.keys():
        odd = min(expected ^ tensors.keys())
        raise InputError(
            f"{path} is damaged ({short(odd)} is {'missing' if odd in expected else 'one too many'}): take another copy"
        )


def _checksum(arrays: Mapping[str, np.ndarray], rings: Mapping[str, Sequence[int]]) -> str:
    digest = hashlib.sha256(json.dumps(rings, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _check_finite(origin: str, arrays: Mapping[str, np.ndarray], declared: Mapping[str, StateArray]) -> None:
    """Refuses NaN and infinity, but for what states begin with."""
    for name, array in arrays.items():
        is_right = np.isfinite(array.astype(np.float32))
        if name in declared:
            is_right |= array == declared[name].initial
        if not is_right.all():
            raise InputError(f"{origin}: {name} is not finite, so nothing can be continued from it: read the text anew")


def _check_header(path: Path, header: Mapping[str, str], config: ModelConfig, weights: str) -> None:
    """Refuses a file of something else, of another version, or of another model."""
    if header.get("format") != _FORMAT:
        raise InputError(f"{path} is a safetensors file, but holds no kept context: give one that was saved as such")
    if header.get("version") != _VERSION:
        raise InputError(
            f"{path} is of version {short(header.get('version'))} of its format, but this program reads {_VERSION}: "
            "save it anew"
        )
    try:
        # A field that came to be after the file was written has its default there.
        was, here = _model(from_json(ModelConfig, header.get("model", ""), origin="its model")), _model(config)
    except InputError as error:
        raise InputError(f"{path} does not say which model it is of ({error}): take another copy") from None
    differences = [
        f"model.{name} was {short(was.get(name))}, here {short(here.get(name))}"
        for name in dict.fromkeys([*was, *here])
        if was.get(name) != here.get(name)
    ]
    if differences:
        raise InputError(f"{path} is of another model: {first_few(differences)}; use it with the model that it is of")
    if header.get("weights") != weights:
        raise InputError(
            f"{path} is of other weights of this architecture (fingerprint {short(header.get('weights'))}, here "
            f"{weights!r}): use it with the weights that have read it"
        )


def _check_tensors(
    path: Path, tensors: Mapping[str, StoredTensor], rings: Mapping[str, Sequence[int]], config: ModelConfig
) -> int | None:
    """Compares names, shapes and dtypes with what a model declares; no values are read.

    Returns:
        How many tokens the state has room for, or None if it is of a fixed size.
    """
    room = max((capacity for _, capacity in rings.values()), default=None)
    shapes = {"tokens": tensors["tokens"].shape[:1], "logits": (config.padded_vocab_size,)}
    dtypes = {"tokens": "int32", "logits": "float32"}
    axes = _ring_axes(config)
    for name, array in _by_name(declare(config, batch_size=1, max_length=room or 1)).items():
        shapes[name], dtypes[name] = _shape(array), jnp.dtype(array.dtype).name
        if name in rings:
            axis = axes[name]
            shapes[name] = (*shapes[name][:axis], tensors[name].shape[axis], *shapes[name][axis + 1 :])
    for name, tensor in tensors.items():
        is_like = tensor.dtype == dtypes[name] or (tensor.dtype in _FLOATS and dtypes[name] in _FLOATS)
        if tensor.shape != shapes[name] or len(tensor.shape) == 0 or not is_like:
            raise InputError(
                f"{path} is damaged ({name} is {tensor.dtype}{list(tensor.shape)}, expected "
                f"{dtypes[name]}{list(shapes[name])}): take another copy"
            )
    return room


def _shape(declared: StateArray) -> tuple[int, ...]:
    """The shape without the axis of rows."""
    axis = declared.axes.index(Axis.BATCH)
    return (*declared.shape[:axis], *declared.shape[axis + 1 :])
