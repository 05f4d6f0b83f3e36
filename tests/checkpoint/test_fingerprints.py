"""Fingerprints of arrays: every bit counts, the layout does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax.checkpoint.fingerprints import fingerprints
from mamba_jax.config import MeshConfig
from mamba_jax.sharding import Axis, make_mesh, parameter_sharding

SHAPE = (16, 24)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8"])
def test_every_flipped_bit_is_found(dtype: str) -> None:
    rng = np.random.default_rng(0)
    values = np.asarray(jnp.asarray(rng.normal(size=SHAPE) * 50).astype(dtype))
    before = fingerprints({"x": values})["x"]
    size = values.dtype.itemsize
    for _ in range(40):
        flipped = bytearray(values.tobytes())
        flipped[rng.integers(len(flipped))] ^= 1 << rng.integers(8)
        changed = np.frombuffer(bytes(flipped), values.dtype).reshape(SHAPE)
        assert fingerprints({"x": changed})["x"] != before, f"{8 * size} bits"


def test_place_of_an_element_counts() -> None:
    values = np.arange(6, dtype=np.float32)
    assert len({fingerprints({"x": np.roll(values, shift)})["x"] for shift in range(6)}) == 6
    assert fingerprints({"x": np.zeros(3, bool)})["x"] != fingerprints({"x": np.zeros(4, bool)})["x"]


@pytest.mark.parametrize(
    "mesh", [MeshConfig(data=8), MeshConfig(data=2, fsdp=4), MeshConfig(data=1, fsdp=2, sequence=2, tensor=2)]
)
def test_layout_does_not_count(mesh: MeshConfig) -> None:
    values = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
    sharding = parameter_sharding(make_mesh(mesh), SHAPE, (Axis.EMBED, Axis.INNER), name="x")
    assert fingerprints({"a": {"x": jax.device_put(values, sharding)}}) == {"a/x": fingerprints({"x": values})["x"]}
