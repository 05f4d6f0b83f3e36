"""The Mosaic GPU kernels of the causal convolution: on a GPU, or else interpreted; and lowered for a GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import causal_conv1d
from pallas_kernels.causal_conv1d.arg_specs import FULL, SPECS, ConvSpec
from pallas_kernels.common.ahead_of_time import tracing_for_kind
from pallas_kernels.common.arg_spec import DType
from tests.kernels import op_contract
from tests.kernels.op_contract import make_call
from tests.kernels.test_causal_conv1d import OP

ON_GPU = jax.default_backend() == "gpu"
UNSEGMENTED = dataclasses.replace(FULL, has_segments=False)
LARGE = dataclasses.replace(FULL, batch=3, length=300, channels=200)


# The others take 5 s each to interpret.
QUICK = ("full", "bfloat16", "shorter_than_window")


@pytest.mark.parametrize(
    "spec",
    [spec if ON_GPU or spec.name in QUICK else pytest.param(spec, marks=pytest.mark.slow) for spec in SPECS],
    ids=lambda spec: spec.name,
)
def test_values_and_gradients(spec: ConvSpec) -> None:
    op_contract.check_values_and_gradients(OP, "pallas_gpu", make_call(spec))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_many_runs_and_columns(dtype: DType) -> None:
    op_contract.check_values_and_gradients(OP, "pallas_gpu", make_call(dataclasses.replace(LARGE, dtype=dtype)))


@pytest.mark.slow
def test_split_causality_and_segments() -> None:
    call = make_call(UNSEGMENTED)
    op_contract.check_split(OP, "pallas_gpu", call, at=21)
    op_contract.check_causality(OP, "pallas_gpu", call, at=33)
    op_contract.check_segments(OP, "pallas_gpu", call, starts=(43, 64))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lowers_for_hopper(dtype: DType) -> None:
    call = make_call(dataclasses.replace(LARGE, dtype=dtype))
    run = functools.partial(causal_conv1d, **call.integers, **call.static, implementation="pallas_gpu")
    gradient = jax.jit(jax.value_and_grad(lambda arrays: run(**arrays).y.astype(jnp.float32).sum()))
    shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), call.arrays)
    with tracing_for_kind("gpu", "NVIDIA H100 80GB HBM3"):
        text = gradient.trace(shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert "causal_conv1d_forward" in text
    assert "causal_conv1d_backward" in text


def test_declines() -> None:
    call = make_call(dataclasses.replace(UNSEGMENTED, width=9))
    with pytest.raises(NotImplementedError, match="takes at most 8 taps, got 9"):
        causal_conv1d(**call.arrays, **call.static, implementation="pallas_gpu")
