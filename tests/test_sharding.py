"""The rules table covers every logical axis, and sizes that do not divide are refused by name."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from mamba_jax.config import MeshConfig
from mamba_jax.errors import InputError
from mamba_jax.sharding import RULES, Axis, ShardingRules, batch_sharding, constrain, make_mesh, parameter_sharding


def test_rules_have_a_field_per_axis() -> None:
    assert {field.name for field in dataclasses.fields(ShardingRules)} == {axis.value for axis in Axis}
    assert RULES.spec((Axis.EMBED, None, Axis.INNER)) == PartitionSpec("fsdp", None, "tensor")


def test_mesh_fills_the_open_axis() -> None:
    assert dict(make_mesh(MeshConfig(fsdp=2, tensor=2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert make_mesh(MeshConfig(), jax.devices()[:1]).size == 1


@pytest.mark.parametrize("config", [MeshConfig(tensor=3), MeshConfig(data=2, fsdp=2, tensor=4), MeshConfig(data=1)])
def test_mesh_that_does_not_fit_is_refused(config: MeshConfig) -> None:
    with pytest.raises(InputError, match="does not fit 8 devices"):
        make_mesh(config)


def test_uneven_parameter_is_refused_by_name() -> None:
    mesh = make_mesh(MeshConfig(tensor=8))
    axes = (Axis.EMBED, Axis.INNER)
    assert parameter_sharding(mesh, (4, 16), axes, name="w").spec == PartitionSpec("fsdp", "tensor")
    with pytest.raises(InputError, match="parameter w: dimension inner of size 12 cannot be split over 8 devices"):
        parameter_sharding(mesh, (4, 12), axes, name="w")


def test_constrain_splits_activations_under_a_mesh_only() -> None:
    x = jnp.zeros((8, 4, 6))
    assert constrain(x, Axis.BATCH, Axis.LENGTH, None) is x
    mesh = make_mesh(MeshConfig(data=4, tensor=2))
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: constrain(x, Axis.BATCH, Axis.LENGTH, Axis.INNER))(x)
    assert y.addressable_shards[0].data.shape == (2, 4, 3)
    assert batch_sharding(mesh).spec == PartitionSpec(("data", "fsdp"), None)
