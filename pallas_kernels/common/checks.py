"""One-line errors for arguments that no implementation could take."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common.array_types import Size
from pallas_kernels.common.devices import target_platform


def as_arrays(op: str, required: Mapping[str, Any], optional: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as JAX arrays: NumPy's, nested lists of numbers, and whatever else `jnp.asarray` takes.

    Args:
        op: name of the op, for messages.
        required: arguments by name.
        optional: arguments by name; None stays None.

    Raises:
        ValueError: an argument is no array.
    """

    def convert(name: str, value: Any) -> jax.Array:
        try:
            return jnp.asarray(value)
        except (TypeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{op}: {name} is no array but {type(value).__name__} ({reason})") from error

    given = {name: value for name, value in optional.items() if value is not None}
    return dict.fromkeys(optional) | {name: convert(name, value) for name, value in (dict(required) | given).items()}


def require(condition: bool, message: str) -> None:
    """Raises ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def require_shape(op: str, name: str, array: jax.Array | None, *expected: tuple[Size, ...], meaning: str) -> None:
    """Raises ValueError unless `array` is None or has one of the expected shapes.

    Args:
        op: name of the op, for the message.
        name: of the argument, for the message.
        array: the argument.
        *expected: shapes that are allowed; a size may be a symbol.
        meaning: the allowed shapes in letters, for the message.
    """
    if array is None or array.shape in expected:
        return
    allowed = " or ".join(map(str, dict.fromkeys(expected)))
    raise ValueError(f"{op}: {name} has shape {array.shape}, expected {meaning} = {allowed}")


def require_float(op: str, **arrays: jax.Array | None) -> None:
    """Raises ValueError unless every array is None or of a real floating dtype."""
    for name, array in arrays.items():
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{op}: {name} has dtype {array.dtype}, expected a real floating dtype")


def require_inexact(op: str, *, complex_allowed: bool, **arrays: jax.Array | None) -> None:
    """Raises ValueError unless every array is None, real floating, or complex where that is allowed."""
    for name, array in arrays.items():
        if array is None or jnp.issubdtype(array.dtype, jnp.floating):
            continue
        if not jnp.issubdtype(array.dtype, jnp.complexfloating):
            raise ValueError(f"{op}: {name} has dtype {array.dtype}, expected a floating or complex dtype")
        if not complex_allowed:
            raise ValueError(f"{op}: {name} has dtype {array.dtype} but A is real; give a complex A or a real {name}")


def require_integer(op: str, **arrays: jax.Array | None) -> None:
    """Raises ValueError unless every array is None or of an integer dtype."""
    for name, array in arrays.items():
        if array is not None and not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{op}: {name} has dtype {array.dtype}, expected an integer dtype")


def decline_symbolic_sizes(op: str, implementation: str, *arrays: jax.Array | None) -> None:
    """Raises NotImplementedError if a size is a symbol, as in an export for any length: kernels are built for sizes."""
    for array in arrays:
        if array is not None and not all(isinstance(size, int) for size in array.shape):
            raise NotImplementedError(
                f"{op}: {implementation!r} takes known sizes only, got {array.shape}; use implementation='xla'"
            )


def decline_off_tpu(op: str) -> None:
    """Raises NotImplementedError unless 'pallas_tpu' can run: on a TPU, and interpreted on a CPU.

    The compiler cannot split a kernel over devices by itself.
    """
    platform = target_platform()
    if platform not in ("cpu", "tpu"):
        raise NotImplementedError(f"{op}: 'pallas_tpu' needs a TPU")
    mesh = jax.sharding.get_abstract_mesh()
    automatic = [name for name in mesh.auto_axes if mesh.shape[name] > 1]
    if platform == "tpu" and automatic:
        raise NotImplementedError(
            f"{op}: 'pallas_tpu' is not split over automatic mesh axes ({', '.join(automatic)}); call it inside "
            "jax.shard_map, or make the axes explicit"
        )


def decline_double_precision(op: str, *arrays: jax.Array | None) -> None:
    """Raises NotImplementedError if an array is float64 or complex128, which only the references compute in."""
    for array in arrays:
        if array is not None and array.dtype in (jnp.float64, jnp.complex128):
            raise NotImplementedError(
                f"{op}: 'xla' keeps its state in float32 and would round {array.dtype} arguments; cast them or use "
                "implementation='reference'"
            )
