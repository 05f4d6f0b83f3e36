"""Triton kernels as launches of XLA's own, which it records in command buffers; triton is imported when first needed.

A call of jax-triton is opaque to XLA: it breaks the command buffer of a loop, and every launch then waits for the host.
Here Triton compiles a kernel to PTX, and XLA launches it as it does its own.
"""

import dataclasses
import functools
import importlib
import os
import tempfile
from collections.abc import Hashable, Mapping
from typing import Any

import jax
import numpy as np

from pallas_kernels.common.devices import cuda_compute_capability
from pallas_kernels.common.partitioning import varying_like

# Ampere, the first generation whose matrix units take bfloat16.
MINIMUM_COMPUTE_CAPABILITY = 80
POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "int32": "*i32", "int8": "*i8"}
_THREADS_OF_A_WARP = 32
# Bytes of shared memory that a program may have, by compute capability; others have the least.
_SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
_LEAST_SHARED_MEMORY = 99 * 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """How a kernel is launched.

    Attributes:
        programs: size of the grid.
        warps: number of warps (32 threads each) of a program.
        stages: loads of a loop that are under way at a time.
        registers: that a thread may have, so that more programs fit on a multiprocessor; None is as many as it likes.
        in_place: by output, the input that it takes the place of.
    """

    programs: int
    warps: int
    stages: int = 1
    registers: int | None = None
    in_place: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def options(self) -> tuple[tuple[str, int | None], ...]:
        """What Triton's compiler is told, by its names."""
        return ("num_warps", self.warps), ("num_stages", self.stages), ("maxnreg", self.registers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """A compiled kernel.

    Attributes:
        name: of its entry.
        ptx: its code.
        shared: bytes of shared memory of a program.
        parameters: of its entry: all arrays, and pointers to scratch that Triton adds at the end and does not use here.
    """

    name: str
    ptx: str
    shared: int
    parameters: int


def require_triton(op: str) -> None:
    """Raises NotImplementedError unless the target is a GPU that kernels are written for, and triton is installed."""
    # Asked first: without such a GPU the answer is the same whether or not the package is there.
    capability = cuda_compute_capability()
    if capability is None or capability < MINIMUM_COMPUTE_CAPABILITY:
        raise NotImplementedError(f"{op}: 'triton' needs a CUDA GPU of compute capability 8.0 or more")
    try:
        importlib.import_module("triton")
    except ImportError as error:
        raise NotImplementedError(f"{op}: 'triton' needs triton; install the cuda extra") from error


def has_triton() -> bool:
    """Whether the target is a GPU that kernels are written for, and triton is installed."""
    try:
        require_triton("")
    except NotImplementedError:
        return False
    return True


def run(
    kernel: Any,
    inputs: Mapping[str, jax.Array],
    outputs: Mapping[str, jax.ShapeDtypeStruct],
    constants: Hashable,
    launch: Launch,
) -> dict[str, jax.Array]:
    """Runs a kernel whose parameters are the inputs, the outputs and `constants`, in this order.

    Args:
        kernel: a function under `triton.jit`.
        inputs: arrays, row-major.
        outputs: shapes and dtypes.
        constants: a frozen dataclass whose attributes the kernel reads when it is compiled.
        launch: how it is launched.

    Returns:
        The outputs.

    Raises:
        NotImplementedError: a program wants more shared memory than the target has.
    """
    # Arguments go by position; this catches a kernel and a caller that disagree about the order.
    assert kernel.arg_names == [*inputs, *outputs, "constants"]
    types = tuple(POINTERS[str(array.dtype)] for array in [*inputs.values(), *outputs.values()])
    capability = cuda_compute_capability() or 0
    built = compiled(kernel, types, constants, launch.options, capability)
    if built.shared > (most := _SHARED_MEMORY.get(capability, _LEAST_SHARED_MEMORY)):
        raise NotImplementedError(f"{built.name} wants {built.shared} bytes of shared memory, and there are {most}")
    places, results = list(inputs), list(outputs)
    # An array that no output replaces: one that is replaced would have to be copied to stay readable.
    unread = next(array for name, array in inputs.items() if name not in launch.in_place.values())
    call = jax.ffi.ffi_call(
        "__gpu$xla.gpu.ptx",
        list(outputs.values()),
        input_output_aliases={places.index(old): results.index(new) for new, old in launch.in_place.items()},
    )
    grid = {"grid_x": launch.programs, "block_x": launch.warps * _THREADS_OF_A_WARP, "shared_mem_bytes": built.shared}
    values = call(
        *inputs.values(),
        *[unread] * (built.parameters - len(types)),
        name=built.name,
        kernel_type="ptx",
        kernel_data=built.ptx,
        output_indices=tuple(np.int32(len(inputs) + index) for index in range(len(outputs))),
        **{name: np.int32(size) for name, size in grid.items()},
        **{f"{kind}_{axis}": np.int32(1) for kind in ("grid", "block") for axis in "yz"},
    )
    return varying_like(unread, dict(zip(outputs, values, strict=True)))


@functools.cache
def compiled(
    kernel: Any,
    types: tuple[str, ...],
    constants: Hashable,
    options: tuple[tuple[str, int | None], ...],
    capability: int,
) -> Compiled:
    """Compiles a kernel for arrays of these types, which start at multiples of 16 bytes; see `Launch.options`."""
    triton = importlib.import_module("triton")
    compiler = importlib.import_module("triton.compiler")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", capability, _THREADS_OF_A_WARP)
    # jax-triton empties this variable when it is imported, and Triton's compiler needs a folder.
    os.environ["TRITON_CACHE_DIR"] = os.environ.get("TRITON_CACHE_DIR") or os.path.join(tempfile.gettempdir(), "triton")
    source = compiler.ASTSource(
        kernel,
        dict(zip(kernel.arg_names, [*types, "constexpr"], strict=True)),
        constexprs={"constants": constants},
        attrs={(index,): [["tt.divisibility", 16]] for index in range(len(types))},
    )
    binary = triton.compile(source, target=target, options=dict(options) | {"enable_fp_fusion": True})
    ptx = binary.asm["ptx"]
    header = ptx[ptx.index(".entry") :]
    parameters = header[: header.index(")")].count(".param")
    return Compiled(name=binary.metadata.name, ptx=ptx, shared=binary.metadata.shared, parameters=parameters)
