"""The TPU kernels of state-space duality: interpreted, with poisoned memory; and compiled for TPUs not at hand.

With float32 sequences the kernels are held to the contract of every implementation. Those of bfloat16 they multiply as
such, and the results of the core are compared as vectors, as those of the GPU kernels are.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import ssd
from pallas_kernels.common.ahead_of_time import compile_for, tpu_devices
from pallas_kernels.common.tpu_tiles import LANES
from pallas_kernels.ssd.arg_specs import SPECS, SSDSpec
from pallas_kernels.ssd.pallas_tpu import op as pallas_tpu
from pallas_kernels.ssd.pallas_tpu.geometry import GENERATIONS, Generation, choose_geometry
from tests.kernels import op_contract, test_ssd
from tests.kernels.op_contract import make_call
from tests.kernels.test_selective_scan_pallas_tpu import needs_tpu_compiler
from tests.kernels.test_ssd_pallas_gpu import LARGE, SMALL, check_values_and_gradients, narrowed
from tests.programs import temporary_bytes, text_of

# Two chunks, and three heads of which two share a tile.
EXACT = dataclasses.replace(SMALL, name="exact", length=131, heads=3, width=40, dtype="float32")
# Small blocks: several along every axis of the grid.
TINY = Generation(tiles=1, strip_bytes=2**18, vmem_bytes=2**23, cores=2)
BLOCKS = dataclasses.replace(EXACT, name="blocks", heads=12, groups=2)


def test_values_and_gradients() -> None:
    op_contract.check_values_and_gradients(test_ssd.OP, "pallas_tpu", make_call(EXACT))


def test_values_and_gradients_in_bfloat16() -> None:
    check_values_and_gradients(make_call(SMALL), "pallas_tpu")


@pytest.mark.slow
@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.dtype == "float32"], ids=lambda spec: spec.name)
def test_values_and_gradients_of_larger_calls(spec: SSDSpec) -> None:
    op_contract.check_values_and_gradients(test_ssd.OP, "pallas_tpu", make_call(spec))


@pytest.mark.slow
@pytest.mark.parametrize("spec", LARGE, ids=lambda spec: spec.name)
def test_values_and_gradients_of_larger_calls_in_bfloat16(spec: SSDSpec) -> None:
    check_values_and_gradients(make_call(spec), "pallas_tpu")


@pytest.mark.slow
@pytest.mark.parametrize("name", test_ssd.EXTREMES)
def test_extreme_decays(name: str) -> None:
    call = test_ssd.EXTREMES[name]()
    op_contract.check_values_and_gradients(test_ssd.OP, "pallas_tpu", call)
    check_values_and_gradients(narrowed(call), "pallas_tpu")


@pytest.mark.slow
def test_split_causality_and_segments() -> None:
    call = make_call(test_ssd.UNSEGMENTED)
    op_contract.check_split(test_ssd.OP, "pallas_tpu", call, at=41)
    op_contract.check_causality(test_ssd.OP, "pallas_tpu", call, at=70)
    op_contract.check_segments(test_ssd.OP, "pallas_tpu", call, starts=(43, 64, 128))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_document_does_not_move_another_by_a_bit(dtype: str) -> None:
    call = make_call(test_ssd.UNSEGMENTED)
    test_ssd.check_documents("pallas_tpu", narrowed(call) if dtype == "bfloat16" else call)


def test_zero_step_keeps_the_state() -> None:
    arrays = make_call(dataclasses.replace(EXACT, has_segments=False)).arrays
    arrays = {name: arrays[name] for name in ("x", "A", "B", "C", "initial_state")}
    outputs = ssd(**arrays, dt=jnp.zeros(arrays["x"].shape[:3]), implementation="pallas_tpu")
    np.testing.assert_array_equal(outputs.final_state, arrays["initial_state"])


@pytest.mark.slow
def test_many_blocks_and_strips_without_races(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pallas_tpu, "generation", lambda kind: TINY)
    monkeypatch.setattr(pallas_tpu, "INTERPRETER", pltpu.InterpretParams(detect_races=True))
    geometry = choose_geometry(
        TINY, batch=1, length=131, heads=12, groups=2, width=40, states=6, packed=True, exact=True
    )
    assert geometry.grid == (1, 2, 2, 3)
    op_contract.check_values_and_gradients(test_ssd.OP, "pallas_tpu", make_call(BLOCKS))
    one_group = dataclasses.replace(BLOCKS, name="strips", groups=1)
    op_contract.check_values_and_gradients(test_ssd.OP, "pallas_tpu", make_call(one_group))
    races = interpret_pallas_call.races
    assert races is not None
    assert not races.races_found


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 1, 1, 1, 1),
        (4, 2048, 24, 1, 64, 128),
        (1, 70000, 80, 8, 64, 256),
        (8, 512, 3, 3, 300, 20),
        (2, 9, 40, 1, 5, 6),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", GENERATIONS)
def test_blocks_cover_the_heads(kind: str, sizes: tuple[int, ...], exact: bool) -> None:
    named: dict[str, Any] = dict(zip(("batch", "length", "heads", "groups", "width", "states"), sizes, strict=True))
    chip = GENERATIONS[kind]
    geometry = choose_geometry(chip, **named, packed=False, exact=exact)
    group_heads = named["heads"] // named["groups"] * geometry.pieces
    assert geometry.pieces * geometry.width >= named["width"]
    assert geometry.group_heads >= group_heads
    # No strip is without heads.
    assert (geometry.strips_per_group - 1) * geometry.blocks * geometry.heads < group_heads
    assert (
        geometry.blocks * geometry.states * geometry.lanes * 4
        <= chip.strip_bytes + geometry.states * geometry.lanes * 4
    )
    # What `turn_vectors` puts side by side.
    assert (len(geometry.vectors) + 2) * geometry.vector_rows <= LANES


def test_declines() -> None:
    call = make_call(dataclasses.replace(SMALL, states=257))
    with pytest.raises(NotImplementedError, match="takes at most 256 states, got 257"):
        ssd(**call.arrays, **call.integers, **call.static, implementation="pallas_tpu")
    arrays = make_call(SMALL).arrays
    arrays = arrays | {"x": arrays["x"].astype(jnp.float16)}
    with pytest.raises(NotImplementedError, match="takes float32 and bfloat16, x has float16"):
        ssd(**arrays, implementation="pallas_tpu")


def compiled_pass(spec: SSDSpec, topology: str, implementation: str | None = None) -> jax.stages.Compiled:
    """Forward and backward pass of a call without initial state, compiled for a device of a topology.

    As a convolution leaves them, heads lie side by side.
    """
    small = make_call(dataclasses.replace(spec, batch=1, length=1))
    tokens = spec.batch, spec.length
    shapes = {
        name: (*tokens, array[0, 0].size)
        if array.ndim == 4
        else (*tokens, *array.shape[2:])
        if name == "dt"
        else array.shape
        for name, array in small.arrays.items()
        if name != "initial_state"
    }
    arguments = {name: jax.ShapeDtypeStruct(shape, small.arrays[name].dtype) for name, shape in shapes.items()}

    def both(arrays, cotangent):
        def run(arrays):
            by_head = {
                name: array.reshape(*tokens, *small.arrays[name].shape[2:]) if array.ndim == 3 else array
                for name, array in arrays.items()
            }
            ids = jnp.zeros(tokens, jnp.int32) if spec.has_segments else None
            output = ssd(**by_head, segment_ids=ids, **small.static, implementation=implementation)
            return output.y.reshape(cotangent.shape)

        y, vjp = jax.vjp(run, arrays)
        return y, vjp(cotangent)

    return compile_for(tpu_devices(topology)[0], both, arguments, arguments["x"])


PUBLISHED = SSDSpec(
    name="130M",
    batch=4,
    length=2048,
    heads=24,
    width=64,
    states=128,
    groups=1,
    dtype="bfloat16",
    has_initial_state=False,
)


@needs_tpu_compiler
@pytest.mark.parametrize(
    "spec",
    [
        dataclasses.replace(PUBLISHED, name="two_tiles", batch=1, length=256, heads=4, has_segments=True),
        *(
            pytest.param(spec, marks=pytest.mark.slow)
            for spec in (
                PUBLISHED,
                dataclasses.replace(PUBLISHED, name="2.7B", batch=1, heads=80),
                dataclasses.replace(PUBLISHED, name="exact", dtype="float32"),
                dataclasses.replace(PUBLISHED, name="small_heads", batch=1, length=300, heads=16, width=10, groups=2),
                dataclasses.replace(PUBLISHED, name="wide_heads", batch=1, length=300, heads=3, width=200, states=256),
            )
        ),
    ],
    ids=lambda spec: spec.name,
)
@pytest.mark.parametrize(
    "topology",
    [
        "v5e:1x1",
        *(pytest.param(t, marks=pytest.mark.slow) for t in ("v4:1x1x1", "v5p:1x1x1", "v6e:1x1", "tpu7x:1x1x1")),
    ],
)
def test_compiles_within_memory(topology: str, spec: SSDSpec) -> None:
    """For every generation of the table; the memory that nothing but the kernels' own arrays takes stays small."""
    compiled = compiled_pass(spec, topology)
    text = text_of(compiled)
    assert "ssd_pallas_tpu_forward" in text
    assert "ssd_pallas_tpu_backward" in text
    assert temporary_bytes(compiled) < 183e6
