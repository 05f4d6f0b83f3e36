"""One warpgroup of an NVIDIA GPU, thread by thread: what Pallas kernels need beyond elementwise arithmetic.

In a kernel written with this module every array has shape (THREADS,): element i is a register of thread i, and
arithmetic on arrays is arithmetic in every thread. Mosaic GPU compiles that to scalar code with nothing in between.
Only memory access by computed address, exchange between the lanes of a warp and barriers need more than arithmetic:
`Device` emits them for the GPU, `Interpreted` states what they mean in terms of whole arrays, so that the same kernel
runs on a CPU.
"""

import abc
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, vector
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.partitioning import varying_like

# Sizes that the hardware fixes: 32 lanes a warp, 4 warps a warpgroup, which is what Mosaic GPU programs.
LANES = 32
WARPS = 4
THREADS = LANES * WARPS
# One element of an array in each thread, in a register.
_REGISTER = plgpu.Layout.WG_STRIDED((THREADS,), vec_size=1)
# The widest load or store of a thread.
_MAX_ACCESS_BYTES = 16
# Stands for any dynamic index in the position list of LLVM's getelementptr.
_DYNAMIC = -(2**31)


class Warpgroup(abc.ABC):
    """The operations of a warpgroup's threads on memory and on each other.

    A reference is seen as flat, and an address counts elements: `row * pitch + index + offset`, where `row` and `index`
    are int32 arrays of one value a thread, and the product is taken in 64 bits.
    """

    @abc.abstractmethod
    def thread_index(self) -> jax.Array:
        """Index of each thread, 0 .. THREADS - 1, int32."""

    @abc.abstractmethod
    def full(self, value: float) -> jax.Array:
        """The same float32 in every thread."""

    @abc.abstractmethod
    def load(
        self, ref, index: jax.Array, count: int, *, offset: int = 0, row: jax.Array | None = None, pitch: int = 0
    ) -> tuple[jax.Array, ...]:
        """Loads `count` neighbours per thread, as 32-bit words: an element each, or two bfloat16 as one int32.

        The address must be a multiple of the access size (4, 8 or 16 bytes). `row` marks memory that the kernel only
        reads.
        """

    @abc.abstractmethod
    def store(
        self,
        ref,
        index: jax.Array,
        values: Sequence[jax.Array],
        *,
        offset: int = 0,
        row: jax.Array | None = None,
        pitch: int = 0,
        mask: jax.Array | None = None,
    ) -> None:
        """Stores neighbours per thread, rounded to the reference's dtype; only where `mask` holds, if there is one."""

    @abc.abstractmethod
    def shuffle_xor(self, value: jax.Array, mask: int) -> jax.Array:
        """The value of the lane whose number differs in the bits of `mask`."""

    @abc.abstractmethod
    def reciprocal(self, value: jax.Array) -> jax.Array:
        """1 / value to within one unit in the last place; 0 for infinity."""

    @abc.abstractmethod
    def sync_warp(self) -> None:
        """Waits until memory accesses of the warp's lanes are visible to each other."""

    @abc.abstractmethod
    def sync_block(self) -> None:
        """The same for the whole warpgroup."""


def widen(words: Sequence[jax.Array], dtype: jnp.dtype) -> tuple[jax.Array, ...]:
    """The float32 values of words loaded from memory of a dtype."""
    if dtype == jnp.float32:
        return tuple(words)
    # A bfloat16 is the upper half of a float32: a shift for the first of a word, a mask for the second.
    values = []
    for word in words:
        for bits in (word << 16, word & np.int32(-65536)):
            values.append(jax.lax.bitcast_convert_type(bits, jnp.float32))
    return tuple(values)


def _scalar(array: mgpu.FragmentedArray) -> ir.Value:
    """The value that each thread holds of an array, as MLIR sees it."""
    # Arithmetic may leave a scalar or a vector of one.
    (register,) = array.registers.flat
    if isinstance(register.type, ir.VectorType):
        return vector.extract(register, [], [0])
    return register


def _array(scalar: ir.Value, *, is_signed: bool | None = None) -> mgpu.FragmentedArray:
    """The array of which each thread holds the given value."""
    register = vector.broadcast(ir.VectorType.get((1,), scalar.type), scalar)
    registers = np.empty((1,), dtype=object)
    registers[0] = register
    return mgpu.FragmentedArray(_registers=registers, _layout=_REGISTER.to_mgpu(), _is_signed=is_signed)


def _registers(dtype, count: int):
    """Types of `count` arrays with one value a thread, for results of inline code."""
    return tuple(plgpu.ShapeDtypeStruct((THREADS,), dtype, layout=_REGISTER) for _ in range(count))


def _pieces(count: int, itemsize: int) -> list[tuple[int, int]]:
    """(start, length) of the accesses that `count` elements take."""
    widest = _MAX_ACCESS_BYTES // itemsize
    return [(start, min(widest, count - start)) for start in range(0, count, widest)]


@dataclasses.dataclass(frozen=True)
class _Address:
    """How to reach an element: what is static about it."""

    offset: int
    pitch: int | None

    def pointer(self, ref: ir.Value, coordinates: Sequence[mgpu.FragmentedArray]) -> ir.Value:
        """Pointer to the first element, from the arrays index and, if there is a pitch, row."""
        base = utils.memref_ptr(ref)
        element = ir.MemRefType(ref.type).element_type
        position = _scalar(coordinates[0])
        # Only rows of global memory need 64 bits: tensors may exceed 2^31 elements, shared memory cannot.
        if self.pitch is not None:
            i64 = ir.IntegerType.get_signless(64)
            row = arith.muli(arith.extsi(i64, _scalar(coordinates[1])), utils.c(self.pitch, i64))
            position = arith.addi(row, arith.extsi(i64, position))
        # The constant comes last and by itself, so it becomes the immediate offset of the instruction.
        return self._moved(self._moved(base, element, [position], [_DYNAMIC]), element, [], [self.offset])

    @staticmethod
    def _moved(pointer: ir.Value, element: ir.Type, dynamic, constant) -> ir.Value:
        return llvm.getelementptr(pointer.type, pointer, dynamic, constant, element, llvm.GEPNoWrapFlags.none)

    def later(self, elements: int) -> "_Address":
        return dataclasses.replace(self, offset=self.offset + elements)


# Cached, so that the same access is the same function however often a kernel is traced.
@functools.cache
def _load_function(address: _Address, count: int, dtype: jnp.dtype, constant: bool):
    """Inline code that loads `count` elements of a dtype."""
    itemsize = dtype.itemsize
    word_dtype = dtype if itemsize == 4 else jnp.dtype(jnp.int32)
    coordinates = (_REGISTER,) * (1 if address.pitch is None else 2)
    num_words = count * itemsize // 4

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *coordinates), return_type=_registers(word_dtype, num_words))
    def load(ctx, ref, *coordinates):
        del ctx
        word = utils.dtype_to_ir_type(word_dtype)
        is_signed = True if isinstance(word, ir.IntegerType) else None
        words = []
        for start, length in _pieces(count, itemsize):
            size = length * itemsize
            pointer = address.later(start).pointer(ref, coordinates)
            # Invariant loads may be moved across barriers and stores: only memory that the kernel never writes.
            loaded = llvm.load(
                ir.VectorType.get((size // 4,), word), pointer, alignment=size, invariant=constant or None
            )
            words += [_array(vector.extract(loaded, [], [i]), is_signed=is_signed) for i in range(size // 4)]
        return tuple(words)

    return load


@functools.cache
def _store_function(address: _Address, count: int, dtype: jnp.dtype, is_masked: bool):
    """Inline code that stores `count` float32 values as elements of a dtype."""
    coordinates = (_REGISTER,) * (1 if address.pitch is None else 2)
    masks = (_REGISTER,) * is_masked

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *coordinates, *(_REGISTER,) * count, *masks))
    def store(ctx, ref, *arrays):
        del ctx
        values = [_scalar(array) for array in arrays[len(coordinates) :]]
        # A branch around the store, not a select: there is nothing to write elsewhere.
        with utils.when(values.pop()) if is_masked else contextlib.nullcontext():
            write(ref, arrays[: len(coordinates)], values)

    def write(ref, coordinates, values):
        element = utils.dtype_to_ir_type(dtype)
        for start, length in _pieces(count, dtype.itemsize):
            wide = vector.from_elements(ir.VectorType.get((length,), values[0].type), values[start : start + length])
            # One conversion of the vector, which rounds two values an instruction.
            if element != values[0].type:
                wide = arith.truncf(ir.VectorType.get((length,), element), wide)
            pointer = address.later(start).pointer(ref, coordinates)
            llvm.store(wide, pointer, alignment=length * dtype.itemsize)

    return store


@functools.cache
def _shuffle_function(mask: int):
    """Inline code that exchanges a value with the lane whose number differs in the bits of `mask`."""

    @plgpu.inline_mgpu(arg_types=(_REGISTER,), return_type=_registers(jnp.float32, 1)[0])
    def shuffle(ctx, value):
        del ctx
        return _array(utils.shfl_bfly(_scalar(value), mask))

    return shuffle


@plgpu.inline_mgpu(arg_types=(_REGISTER,), return_type=_registers(jnp.float32, 1)[0])
def _reciprocal(ctx, value):
    # One instruction of the special-function unit; a division takes several. Infinity gives 0, as sigmoid needs.
    del ctx
    return _array(utils.inline_ptx("rcp.approx.ftz.f32 $0, $1;", _scalar(value), result_types=ir.F32Type.get()))


@plgpu.inline_mgpu(return_type=_registers(jnp.int32, 1)[0])
def _thread_index(ctx):
    del ctx
    i32 = ir.IntegerType.get_signless(32)
    # The index within the warpgroup; the mask also tells the compiler how large it can be.
    return _array(arith.andi(utils.thread_idx(), utils.c(THREADS - 1, i32)), is_signed=True)


@plgpu.inline_mgpu()
def _sync_warp(ctx):
    del ctx
    utils.warp_barrier()


@plgpu.inline_mgpu()
def _sync_block(ctx):
    del ctx
    utils.warpgroup_barrier()


class Device(Warpgroup):
    """The operations as machine code."""

    def thread_index(self):
        return _thread_index()

    def full(self, value):
        return plgpu.layout_cast(jnp.full((THREADS,), value, jnp.float32), _REGISTER)

    def load(self, ref, index, count, *, offset=0, row=None, pitch=0):
        address = _Address(offset, None if row is None else pitch)
        load = _load_function(address, count, jnp.dtype(ref.dtype), row is not None)
        return load(ref, index) if row is None else load(ref, index, row)

    def store(self, ref, index, values, *, offset=0, row=None, pitch=0, mask=None):
        address = _Address(offset, None if row is None else pitch)
        store = _store_function(address, len(values), jnp.dtype(ref.dtype), mask is not None)
        coordinates = (index,) if row is None else (index, row)
        masks = () if mask is None else (mask,)
        store(ref, *coordinates, *(plgpu.layout_cast(value, _REGISTER) for value in values), *masks)

    def shuffle_xor(self, value, mask):
        return _shuffle_function(mask)(value)

    def reciprocal(self, value):
        return _reciprocal(value)

    def sync_warp(self):
        _sync_warp()

    def sync_block(self):
        _sync_block()


class Interpreted(Warpgroup):
    """The operations in terms of whole arrays; threads run in step, so barriers are empty."""

    def thread_index(self):
        return jnp.arange(THREADS, dtype=jnp.int32)

    def full(self, value):
        return jnp.full((THREADS,), value, jnp.float32)

    @staticmethod
    def _positions(index, count, offset, row, pitch):
        first = index + offset if row is None else row * pitch + index + offset
        return first[:, None] + jnp.arange(count, dtype=jnp.int32)[None]

    def load(self, ref, index, count, *, offset=0, row=None, pitch=0):
        elements = ref[...].reshape(-1)[self._positions(index, count, offset, row, pitch)]
        # As on the device, two bfloat16 come as one word, the first in its lower half.
        if elements.dtype.itemsize == 2:
            elements = jax.lax.bitcast_convert_type(elements.reshape(THREADS, -1, 2), jnp.int32)
        return tuple(elements[:, i] for i in range(elements.shape[1]))

    def store(self, ref, index, values, *, offset=0, row=None, pitch=0, mask=None):
        positions = self._positions(index, len(values), offset, row, pitch)
        # Threads that the mask excludes get a position past the end, where `mode="drop"` discards their values.
        if mask is not None:
            positions = jnp.where(mask[:, None], positions, ref.size)
        columns = [jnp.broadcast_to(value, (THREADS,)) for value in values]
        flat = ref[...].reshape(-1).at[positions].set(jnp.stack(columns, axis=1).astype(ref.dtype), mode="drop")
        ref[...] = flat.reshape(ref.shape)

    def shuffle_xor(self, value, mask):
        return value[jnp.arange(THREADS, dtype=jnp.int32) ^ mask]

    def reciprocal(self, value):
        return 1.0 / value

    def sync_warp(self):
        pass

    def sync_block(self):
        pass


def launch(
    kernel: Callable[..., None],
    *,
    inputs: Mapping[str, jax.Array],
    outputs: Mapping[str, jax.ShapeDtypeStruct],
    scratch: Mapping[str, Any],
    grid: Mapping[str, int],
    name: str,
    interpreted: bool,
) -> dict[str, jax.Array]:
    """Runs a kernel of one warpgroup a block.

    Args:
        kernel: called with the warpgroup and, by name, the references to inputs, outputs and scratch memory.
        inputs: input arrays by name.
        outputs: shape and dtype of each output, by name.
        scratch: type of each piece of scratch memory, by name.
        grid: number of blocks along each axis; neighbours along the last axis run at the same time.
        name: name of the kernel in profiles.
        interpreted: run in Pallas' interpreter instead of on a GPU.

    Returns:
        The outputs.
    """
    warpgroup = Interpreted() if interpreted else Device()

    # Pallas passes references by position; the kernel takes them by name.
    def body(*refs):
        remaining = iter(refs)
        kernel(warpgroup, *({key: next(remaining) for key in group} for group in (inputs, outputs, scratch)))

    results = plgpu.kernel(
        body,
        out_type=list(outputs.values()),
        scratch_types=list(scratch.values()),
        # Barriers are the kernel's own; exp2 is one instruction; one thread's code is what is written.
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=mgpu.LoweringSemantics.Lane
        ),
        interpret=plgpu.InterpretGPUParams() if interpreted else None,
        kernel_name=name,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
    )(*inputs.values())
    return varying_like(next(iter(inputs.values())), dict(zip(outputs, results, strict=True)))
