"""What implementations decline: calls that others can take."""

import jax
import jax.numpy as jnp

from pallas_kernels.common.arguments import Arguments
from pallas_kernels.common.devices import target_platform


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


def decline_double_precision(implementation: str, arguments: Arguments) -> None:
    """Raises NotImplementedError if an array is float64 or complex128, which only the references compute in."""
    for array in arguments.arrays().values():
        if array.dtype in (jnp.float64, jnp.complex128):
            raise NotImplementedError(
                f"{arguments.op}: {implementation!r} keeps its state in float32 and would round {array.dtype} "
                "arguments; cast them or use implementation='reference'"
            )
