"""What tests of steps of one token by Triton kernels share: runs in the interpreter, and compiled kernels."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common.triton import launch
from tests.kernels.triton_interpreter import HostArray, multiply_bfloat16, round_to_nearest

ON_GPU = jax.default_backend() == "gpu"
on_gpu = pytest.mark.skipif(not ON_GPU, reason="runs on a GPU")
without_gpu = pytest.mark.skipif(ON_GPU, reason="there is a GPU")


def drawn(shapes, seed: int = 0):
    """Arrays of these shapes: matrices whose products keep the size of their inputs, all else of order 1/2."""
    rng = np.random.default_rng(seed)

    def draw(shape: jax.ShapeDtypeStruct) -> jax.Array:
        is_matrix = shape.dtype == jnp.bfloat16 and shape.shape[0] > 128
        scale = shape.shape[0] ** -0.5 if is_matrix else 0.5
        return jnp.asarray(scale * rng.standard_normal(shape.shape, np.float32)).astype(shape.dtype)

    return jax.tree.map(draw, shapes)


def in_int8(weights, *names: str):
    """A step's weights with these matrices in int8, a scale for each column."""
    found = {}
    for name in names:
        matrix = np.asarray(getattr(weights, name), np.float32)
        scale = np.abs(matrix).max(axis=0) / 127
        found |= {name: jnp.asarray(np.round(matrix / scale), jnp.int8), f"{name}_scale": jnp.asarray(scale)}
    return dataclasses.replace(weights, **found)


def in_double(tree):
    """The numbers of a tree of arrays in double precision; integers stay what they are."""
    return jax.tree.map(
        lambda array: array if array.dtype == jnp.int8 else jnp.asarray(np.asarray(array, np.float64)), tree
    )


def int8_shapes(weights, *names: str):
    """`in_int8` of shapes."""
    found = {}
    for name in names:
        shape = getattr(weights, name).shape
        found |= {name: jax.ShapeDtypeStruct(shape, jnp.int8)}
        found |= {f"{name}_scale": jax.ShapeDtypeStruct(shape[1:], jnp.float32)}
    return dataclasses.replace(weights, **found)


def interpreted_run(kernel, inputs, outputs, constants, shape):
    """`launch.run` in the interpreter. What a kernel does not write is NaN, or what it stands in place of."""
    assert kernel.arg_names == [*inputs, *outputs, "constants"]

    def start(*arrays):
        host = {name: HostArray(np.array(array)) for name, array in zip(inputs, arrays, strict=True)}
        results = {
            name: host[shape.in_place[name]]
            if name in shape.in_place
            else HostArray(np.full(output.shape, np.nan, output.dtype))
            for name, output in outputs.items()
        }
        with np.errstate(all="ignore"):
            kernel[(shape.programs,)](*host.values(), *results.values(), constants=constants)
        return [result.array for result in results.values()]

    values = jax.pure_callback(start, list(outputs.values()), *inputs.values())
    return dict(zip(outputs, values, strict=True))


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the kernels in the interpreter."""
    round_to_nearest(monkeypatch)
    multiply_bfloat16(monkeypatch)
    monkeypatch.setattr(launch, "require_triton", lambda op: None)
    monkeypatch.setattr(launch, "run", interpreted_run)


def compiled_by(monkeypatch: pytest.MonkeyPatch) -> dict[str, launch.Compiled]:
    """Where kernels go, by name, that are compiled for Hopper from now on instead of being launched."""
    pytest.importorskip("triton")
    binaries = {}

    def compile_kernel(kernel, inputs, outputs, constants, shape):
        types = tuple(launch.POINTERS[str(array.dtype)] for array in [*inputs.values(), *outputs.values()])
        binaries[kernel.__name__] = launch.compiled(kernel, types, constants, shape.options, 90)
        return {name: jnp.zeros(output.shape, output.dtype) for name, output in outputs.items()}

    monkeypatch.setattr(launch, "require_triton", lambda op: None)
    monkeypatch.setattr(launch, "run", compile_kernel)
    return binaries


def check_binaries(binaries: dict[str, launch.Compiled]) -> None:
    """No arrays in local memory, and no more shared memory than there is."""
    for name, binary in binaries.items():
        assert ".target sm_90" in binary.ptx
        assert ".local" not in binary.ptx, f"{name} indexes its registers"
        assert binary.shared <= 227 * 1024, name
