"""The TPU kernels of the causal convolution: interpreted, with poisoned memory; and compiled for TPUs not at hand."""

import dataclasses
import functools
import importlib.util

import jax
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import causal_conv1d
from pallas_kernels.causal_conv1d.arg_specs import FULL, SPECS, ConvSpec
from pallas_kernels.causal_conv1d.pallas_tpu import geometry as pallas_tpu_geometry
from pallas_kernels.causal_conv1d.pallas_tpu import op as pallas_tpu
from pallas_kernels.common.ahead_of_time import compile_for, tpu_devices
from pallas_kernels.common.tpu_tiles import SPAN
from tests.kernels import op_contract
from tests.kernels.op_contract import make_call
from tests.kernels.test_causal_conv1d import OP, UNSEGMENTED
from tests.programs import text_of


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_values_and_gradients(spec: ConvSpec) -> None:
    op_contract.check_values_and_gradients(OP, "pallas_tpu", make_call(spec))


@pytest.mark.parametrize("length", [15, 16, 17, 34])
def test_ends_anywhere_in_a_group(length: int) -> None:
    call = make_call(dataclasses.replace(FULL, length=length, channels=3, dtype="bfloat16"))
    op_contract.check_values_and_gradients(OP, "pallas_tpu", call)


def test_many_blocks_without_races(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pallas_tpu_geometry, "TOKENS", SPAN)
    monkeypatch.setattr(pallas_tpu_geometry, "TILES", 1)
    monkeypatch.setattr(pallas_tpu, "INTERPRETER", pltpu.InterpretParams(detect_races=True))
    call = make_call(dataclasses.replace(FULL, length=45, channels=200))
    op_contract.check_values_and_gradients(OP, "pallas_tpu", call)
    races = interpret_pallas_call.races
    assert races is not None
    assert not races.races_found


def test_split_causality_and_segments() -> None:
    call = make_call(UNSEGMENTED)
    op_contract.check_split(OP, "pallas_tpu", call, at=21)
    op_contract.check_causality(OP, "pallas_tpu", call, at=33)
    op_contract.check_segments(OP, "pallas_tpu", call, starts=(43, 64))


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed")
@pytest.mark.parametrize(
    "topology",
    [
        "v5e:1x1",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("v4:1x1x1", "v5p:1x1x1", "v6e:1x1", "tpu7x:1x1x1")),
    ],
)
def test_compiles(topology: str) -> None:
    call = make_call(dataclasses.replace(FULL, batch=2, length=600, channels=1536, dtype="bfloat16"))

    def both(arrays, integers):
        run = functools.partial(causal_conv1d, **integers, **call.static)
        y, vjp = jax.vjp(lambda arrays: run(**arrays).y, arrays)
        return y, vjp(y)

    text = text_of(compile_for(tpu_devices(topology)[0], both, call.arrays, call.integers))
    assert "causal_conv1d_pallas_tpu_forward" in text
    assert "causal_conv1d_pallas_tpu_backward" in text


def test_declines() -> None:
    call = make_call(dataclasses.replace(UNSEGMENTED, width=9))
    with pytest.raises(NotImplementedError, match="takes at most 8 taps, got 9"):
        causal_conv1d(**call.arrays, **call.static, implementation="pallas_tpu")
