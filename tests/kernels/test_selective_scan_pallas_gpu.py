"""The Mosaic GPU kernels of the selective scan: on a GPU if there is one, else interpreted; and lowered for a GPU.

Interpreting is slow, so without a GPU only small calls run, and the long ones are marked slow.
"""

import dataclasses
import functools
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import selective_scan
from pallas_kernels.common.ahead_of_time import tracing_for_kind
from pallas_kernels.common.arg_spec import DType
from pallas_kernels.selective_scan.arg_specs import FULL, SPECS, ScanSpec
from pallas_kernels.selective_scan.pallas_gpu import backward as pallas_gpu_backward
from pallas_kernels.selective_scan.pallas_gpu import edge as pallas_gpu_edge
from pallas_kernels.selective_scan.pallas_gpu import forward as pallas_gpu_forward
from pallas_kernels.selective_scan.pallas_gpu import op as pallas_gpu
from pallas_kernels.selective_scan.pallas_gpu.geometry import CHUNK, SLICE, Geometry, Tiling
from pallas_kernels.selective_scan.pallas_gpu.tilings import choose_tilings
from tests.kernels import op_contract, test_selective_scan
from tests.kernels.op_contract import make_call
from tests.kernels.test_selective_scan import OP

ON_GPU = jax.default_backend() == "gpu"
slow_interpreted = pytest.mark.slow if not ON_GPU else pytest.mark.filterwarnings("default")
# Shared memory that a block can have on a GPU of compute capability 9.0.
SHARED_MEMORY_BYTES = 227 * 1024

SMALL = dataclasses.replace(FULL, name="small", batch=1, length=21)
SMALL_SPECS = (
    SMALL,
    dataclasses.replace(
        SMALL, name="bfloat16_two_slices_of_groups", dtype="bfloat16", states=SLICE + 1, B="grouped", C="grouped"
    ),
    ScanSpec(
        name="small_bare",
        batch=2,
        length=16,
        has_skip=False,
        has_gate=False,
        has_bias=False,
        has_softplus=False,
        has_initial_state=False,
    ),
)
LARGE_SPECS = (
    dataclasses.replace(SMALL, name="two_slices", states=SLICE + 1, C="grouped"),
    *(spec for spec in SPECS if spec.discretization == "euler" and not spec.is_complex and spec.B != "constant"),
    dataclasses.replace(FULL, name="blocks", batch=3, length=150, channels=200, states=16),
    dataclasses.replace(FULL, name="blocks_bfloat16", length=150, channels=200, states=16, dtype="bfloat16"),
    dataclasses.replace(FULL, name="many_states", length=33, states=256, C="grouped"),
    dataclasses.replace(FULL, name="one_state", length=33, states=1, B="grouped"),
    dataclasses.replace(FULL, name="one_token", length=1, states=16),
)
TILINGS = tuple(
    (Tiling(lanes_per_channel=lanes, rows=rows, parts=parts), Tiling(lanes_per_channel=lanes, rows=rows, parts=parts))
    for lanes, rows in ((2, 1), (4, 1), (8, 1), (2, 2), (4, 2), (8, 2))
    for parts in (1, 3)
)


def call_name(value: object) -> str:
    if isinstance(value, tuple):
        return "-".join(f"{tiling.lanes_per_channel}x{tiling.rows}x{tiling.parts}" for tiling in value)
    return getattr(value, "name", str(value))


@pytest.mark.parametrize("spec", SMALL_SPECS, ids=call_name)
def test_values_and_gradients(spec: ScanSpec) -> None:
    limit = test_selective_scan.RELATIVE_ERROR[spec.dtype]
    op_contract.check_values_and_gradients(OP, "pallas_gpu", make_call(spec), relative=limit)


@slow_interpreted
@pytest.mark.parametrize("spec", LARGE_SPECS, ids=call_name)
def test_values_and_gradients_of_larger_calls(spec: ScanSpec) -> None:
    op_contract.check_values_and_gradients(OP, "pallas_gpu", make_call(spec))


@slow_interpreted
@pytest.mark.parametrize("tilings", TILINGS, ids=call_name)
def test_every_tiling(tilings: tuple[Tiling, Tiling], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pallas_gpu, "choose_tilings", lambda *shape: tilings)
    # Two slices of states; but the largest shares leave no shared memory for them.
    states = 20 if tilings[0].channels_per_block < 128 else 16
    spec = dataclasses.replace(FULL, batch=2, length=70, channels=10, states=states, B="grouped")
    op_contract.check_values_and_gradients(OP, "pallas_gpu", make_call(spec))


@slow_interpreted
def test_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three parts, one of them only partly used, with different tilings in the two directions."""
    tilings = Tiling(lanes_per_channel=8, rows=1, parts=3), Tiling(lanes_per_channel=4, rows=2, parts=2)
    monkeypatch.setattr(pallas_gpu, "choose_tilings", lambda *shape: tilings)
    op_contract.check_values_and_gradients(OP, "pallas_gpu", make_call(dataclasses.replace(SMALL, length=37)))


@slow_interpreted
def test_split_equals_one_pass() -> None:
    op_contract.check_split(OP, "pallas_gpu", make_call(test_selective_scan.UNSEGMENTED), at=21)


@slow_interpreted
def test_causality() -> None:
    op_contract.check_causality(OP, "pallas_gpu", make_call(test_selective_scan.UNSEGMENTED), at=33)


@slow_interpreted
def test_segments() -> None:
    op_contract.check_segments(OP, "pallas_gpu", make_call(test_selective_scan.UNSEGMENTED), starts=(43, 64))


@slow_interpreted
@pytest.mark.parametrize("call", ["extreme_decays", "hundreds_of_nats_per_chunk", "tiny_softplus"])
def test_extremes(call: str) -> None:
    op_contract.check_values_and_gradients(OP, "pallas_gpu", test_selective_scan.EXTREMES[call]())


@pytest.mark.skipif(not ON_GPU, reason="takes hours to interpret")
def test_beyond_61k_tokens() -> None:
    test_selective_scan.check_beyond_61k_tokens("pallas_gpu")


@pytest.mark.slow
@pytest.mark.skipif(not ON_GPU, reason="needs 70 GB of GPU memory, and XLA_PYTHON_CLIENT_MEM_FRACTION=0.95")
def test_more_than_2_31_elements() -> None:
    """Tensors whose elements 32 bits cannot count: the end of the sequence equals that of its second half alone."""
    length, channels, states = 2**20, 2304, 16
    half = length // 2
    keys = jax.random.split(jax.random.key(0), 8)
    A = -jnp.exp(jax.random.normal(keys[5], (channels, states)))
    D, dt_bias = jax.random.normal(keys[6], (channels,)), 0.3 * jax.random.normal(keys[7], (channels,))

    @jax.jit
    def sequences():
        x, dt, z = (jax.random.normal(key, (1, length, channels), jnp.bfloat16) for key in keys[:3])
        B, C = (jax.random.normal(key, (1, length, states), jnp.bfloat16) for key in keys[3:5])
        return x, dt - 4, z, B, C

    def scan(x, dt, z, B, C, state):
        options = {"D": D, "z": z, "dt_bias": dt_bias, "dt_softplus": True, "initial_state": state}
        return selective_scan(x, dt, A, B, C, **options, implementation="pallas_gpu")

    @jax.jit
    def tail(*arguments):
        """Outputs of the last tokens, the final state, and gradients of a loss in the last tokens."""

        def loss(*arguments):
            outputs = scan(*arguments)
            return jnp.sum(outputs.y[:, -64:].astype(jnp.float32)), (outputs.y[:, -4096:], outputs.final_state)

        gradients, kept = jax.grad(loss, argnums=(0, 1, 3, 4), has_aux=True)(*arguments)
        return *kept, *(gradient[:, -2048:] for gradient in gradients)

    whole = sequences()
    assert whole[0].size > 2**31
    actual = jax.block_until_ready(tail(*whole, jnp.zeros((1, channels, states))))
    first = [array[:, :half] for array in whole]
    state = jax.jit(lambda *arguments: scan(*arguments).final_state)(*first, jnp.zeros((1, channels, states)))
    expected = tail(*(array[:, half:] for array in whole), state)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-2, atol=1e-3)


@slow_interpreted
def test_zero_step_keeps_the_state() -> None:
    test_selective_scan.check_zero_step_keeps_the_state("pallas_gpu")


@slow_interpreted
@pytest.mark.parametrize(("dtype", "limit"), test_selective_scan.RELATIVE_ERROR.items())
def test_relative_error_of_many_channels(dtype: DType, limit: float) -> None:
    spec = dataclasses.replace(FULL, length=64, channels=16, states=16, dtype=dtype)
    op_contract.check_values_and_gradients(OP, "pallas_gpu", make_call(spec), relative=limit)


def _shapes(spec: ScanSpec) -> dict[str, jax.ShapeDtypeStruct]:
    return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), make_call(spec).arrays)


def _lowered(spec: ScanSpec, device_kind: str, implementation: str | None = None) -> str:
    """The gradient of a call, lowered for a GPU that need not be there."""
    call = make_call(spec)
    run = functools.partial(selective_scan, **call.integers, **call.static, implementation=implementation)
    gradient = jax.jit(jax.grad(lambda arrays: run(**arrays).y.astype(jnp.float32).sum()))
    with tracing_for_kind("gpu", device_kind):
        return gradient.trace(_shapes(spec)).lower(lowering_platforms=("cuda",)).as_text(debug_info=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lowers_for_hopper(dtype: DType) -> None:
    spec = dataclasses.replace(SMALL, dtype=dtype, length=2048, channels=64, states=16)
    text = _lowered(spec, "NVIDIA H100 80GB HBM3")
    kernels = [name for name in ("forward", "backward", "edge") if f"pallas_gpu_{name}" in text]
    assert kernels == ["forward", "backward", "edge"], "one batch row of 64 channels needs parts of the sequence"
    elements = spec.length * spec.channels * spec.states
    shapes = {line.split("tensor<")[-1].split(">")[0] for line in text.split("\n") if "tensor<" in line}
    for shape in shapes:
        sizes = [int(size) for size in shape.split("x")[:-1] if size.isdigit()]
        assert math.prod(sizes) < elements, f"tensor<{shape}> is as large as all states"


def test_chosen_on_hopper_and_not_before() -> None:
    assert "selective_scan.pallas_gpu" in _lowered(SMALL, "NVIDIA H200")
    assert "selective_scan.pallas_gpu" not in _lowered(SMALL, "NVIDIA A100-SXM4-80GB")
    with pytest.raises(NotImplementedError, match=r"needs an NVIDIA GPU of compute capability 9\.0 or more"):
        _lowered(SMALL, "NVIDIA A100-SXM4-80GB", implementation="pallas_gpu")


@pytest.mark.parametrize(("change", "reason"), test_selective_scan.DECLINED_BY_PALLAS, ids=str)
def test_declines(change: dict, reason: str) -> None:
    test_selective_scan.check_declines("pallas_gpu", change, reason)


@pytest.mark.parametrize("states", [1, 16, 17, 64, 65, 256])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 2**20, 64), (1, 2048, 2048), (8, 2048, 1536), (64, 512, 5120)], ids=str
)
def test_tilings_fit(shape: tuple[int, int, int], states: int) -> None:
    """Every chosen tiling fits into shared memory, and its parts are not empty."""
    batch, length, channels = shape
    for tiling in choose_tilings(*shape, states):
        geometry = Geometry(
            batch=batch,
            groups=1,
            channels=-(-channels // tiling.channels_per_block) * tiling.channels_per_block,
            states=-(-states // SLICE) * SLICE,
            length=-(-length // CHUNK) * CHUNK,
            valid_length=length,
            tiling=tiling,
        )
        assert (tiling.parts - 1) * geometry.chunks_per_part < geometry.chunks
        for module in (pallas_gpu_forward, pallas_gpu_backward, pallas_gpu_edge):
            scratch = module.scratch_types(geometry).values()
            assert sum(4 * math.prod(memory.shape) for memory in scratch) <= SHARED_MEMORY_BYTES


def test_declines_half_precision() -> None:
    call = make_call(SMALL)
    arrays = call.arrays | {"x": call.arrays["x"].astype(jnp.float16)}
    with pytest.raises(NotImplementedError, match="takes float32 and bfloat16, x has float16"):
        selective_scan(**arrays, **call.integers, **call.static, implementation="pallas_gpu")


def test_gradients_of_padding_are_dropped() -> None:
    test_selective_scan.check_padding_leaves_no_trace("pallas_gpu", length=CHUNK + 1)


CHUNKS = """
import jax, numpy as np, pallas_kernels

rng = np.random.default_rng(0)
draw = lambda *shape: np.asarray(rng.normal(size=shape), np.float32)
arrays = dict(x=draw(1, 70, 64), dt=draw(1, 70, 64) - 2, A=-np.exp(draw(64, 16)), B=draw(1, 70, 16), C=draw(1, 70, 16))
arrays |= dict(D=draw(64), dt_bias=draw(64))

def gradients(implementation):
    loss = lambda a: (pallas_kernels.selective_scan(**a, dt_softplus=True, implementation=implementation).y ** 2).sum()
    return jax.jit(jax.grad(loss))(arrays)

for name, value in gradients("pallas_gpu").items():
    expected = gradients("xla")[name]
    # Sums of 70 x 16 terms in float32.
    assert np.max(np.abs(value - expected)) <= 8 * 2**-24 * (70 * 16) ** 0.5 * np.max(np.abs(expected)), name
"""


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() == "gpu", reason="interpreted")
def test_other_chunks_are_right_and_others_are_refused(tmp_path: Path) -> None:
    """Everything that follows from the tokens of a chunk is derived from it."""
    package = Path(__file__).parents[2] / "pallas_kernels"
    for chunk, problem in ((32, None), (24, "24 is not a power of two"), (8, "make CHUNK (8) larger")):
        folder = tmp_path / str(chunk)
        shutil.copytree(package, folder / "pallas_kernels", ignore=shutil.ignore_patterns("__pycache__"))
        path = folder / "pallas_kernels" / "selective_scan" / "pallas_gpu" / "geometry.py"
        path.write_text(path.read_text().replace("\nCHUNK = 16\n", f"\nCHUNK = {chunk}\n"))
        done = subprocess.run(
            [sys.executable, "-c", CHUNKS],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(folder)},
            capture_output=True,
        )
        assert (done.returncode == 0) == (problem is None), done.stderr.decode()
        assert problem is None or problem in done.stderr.decode()
