"""Triton's interpreter, for tests of kernels without a GPU.

It replaces the compiler for a whole process, from before triton is imported, by the variable TRITON_INTERPRET.
"""

import os

import jax.numpy as jnp
import numpy as np
import pytest

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not IS_INTERPRETED, reason="runs in the process that interprets Triton")
compiled = pytest.mark.skipif(IS_INTERPRETED, reason="needs Triton's compiler")


class HostArray:
    """A NumPy array with what Triton's interpreter asks of a tensor; it is its own storage."""

    def __init__(self, array: np.ndarray | None = None):
        # Empty until `set_` gives it the array of another one.
        self.array = np.empty(0) if array is None else array

    @property
    def dtype(self) -> str:
        return str(self.array.dtype)

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> "HostArray":
        return self

    def cpu(self) -> "HostArray":
        return self

    def new_empty(self, size: int, *, device: str) -> "HostArray":
        return HostArray()

    def set_(self, storage: "HostArray", *place: int) -> None:
        self.array = storage.array

    def storage_offset(self) -> int:
        return 0

    def size(self) -> int:
        return self.array.size

    def stride(self) -> int:
        return 1

    def copy_(self, source: "HostArray") -> None:
        assert source.array is self.array


def round_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the interpreter round to the nearest bfloat16, as a GPU does."""
    import triton.language as tl  # pyrefly: ignore[missing-import]
    from triton.runtime.interpreter import (  # pyrefly: ignore[missing-import]
        InterpreterBuilder,
        TensorHandle,
    )

    def rounded(builder, source, dtype):
        if dtype.scalar != tl.bfloat16:
            return builder.cast_impl(source, dtype)
        return TensorHandle(source.data.astype(jnp.bfloat16).view(np.uint16), dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fp_trunc", rounded)


def multiply_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the interpreter multiply matrices of bfloat16, which it keeps as integers of 16 bits."""
    import triton.language as tl  # pyrefly: ignore[missing-import]
    from triton.runtime.interpreter import (  # pyrefly: ignore[missing-import]
        InterpreterBuilder,
        TensorHandle,
    )

    multiply = InterpreterBuilder.create_dot

    def widened(operand):
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def multiplied(builder, a, b, *rest):
        return multiply(builder, widened(a), widened(b), *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", multiplied)
