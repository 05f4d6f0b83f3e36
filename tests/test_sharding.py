"""The rules table covers every logical axis, and sizes that do not divide are refused by name."""

import dataclasses
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from mamba_jax.config import (
    DataConfig,
    EvaluationConfig,
    ExperimentConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    ShardSource,
    TrainConfig,
)
from mamba_jax.errors import InputError
from mamba_jax.sharding import (
    RULES,
    Axis,
    ShardingRules,
    batch_sharding,
    constrain,
    make_mesh,
    parameter_sharding,
    parts,
    process_rows,
    put_batch,
)
from mamba_jax.training.program import TrainProgram, check_rows
from pallas_kernels.common.ahead_of_time import tpu_devices


def test_rules_have_a_field_per_axis() -> None:
    assert {field.name for field in dataclasses.fields(ShardingRules)} == {axis.value for axis in Axis}
    assert RULES.spec((Axis.EMBED, None, Axis.INNER)) == PartitionSpec(("fsdp", "sequence"), None, "tensor")
    assert RULES.spec(((Axis.BATCH, Axis.LENGTH), None)) == PartitionSpec(("data", "fsdp", "expert", "sequence"), None)


def test_mesh_fills_the_open_axis() -> None:
    sizes = {"data": 2, "fsdp": 2, "expert": 1, "sequence": 1, "tensor": 2}
    assert dict(make_mesh(MeshConfig(fsdp=2, tensor=2)).shape) == sizes
    assert make_mesh(MeshConfig(data=1, sequence=-1)).shape["sequence"] == 8
    assert make_mesh(MeshConfig(), jax.devices()[:1]).size == 1


@pytest.mark.parametrize(
    "config",
    [MeshConfig(tensor=3), MeshConfig(data=2, fsdp=2, tensor=4), MeshConfig(data=1), MeshConfig(sequence=16)],
)
def test_mesh_that_does_not_fit_is_refused(config: MeshConfig) -> None:
    sizes = " x ".join(f"{name}={size}" for name, size in dataclasses.asdict(config).items())
    with pytest.raises(InputError, match=f"mesh {sizes} does not fit 8 devices"):
        make_mesh(config)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed")
def test_slices_split_the_data_axis_first() -> None:
    devices = tpu_devices("v5e:2x2", num_slices=2)
    # Slices alternate in the list, so the order of the list is not that of the mesh.
    devices = [device for pair in zip(devices[:4], devices[4:], strict=True) for device in pair]
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, sequence=2), devices)
    assert [[device.slice_index for device in half.flat] for half in mesh.devices] == [[0] * 4, [1] * 4]
    with pytest.raises(InputError, match="data axis of 1 cannot be split over 2 slices"):
        make_mesh(MeshConfig(data=1, fsdp=4, sequence=2), devices)


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """What `process_rows` asks of a device."""

    id: int
    process_index: int


@pytest.mark.parametrize(
    ("sizes", "owners", "expected"),
    [
        pytest.param((4, 1, 2, 1, 1), [0, 0, 1, 1, 2, 2, 3, 3], [(0, 4), (1, 4), (2, 4), (3, 4)], id="batch"),
        pytest.param((2, 1, 1, 4, 1), [0, 0, 1, 1, 2, 2, 3, 3], [(0, 2), (0, 2), (1, 2), (1, 2)], id="shared rows"),
        pytest.param((1, 1, 1, 8, 1), [0, 0, 0, 0, 1, 1, 1, 1], [(0, 1), (0, 1)], id="one row"),
        pytest.param((8, 1, 1, 1, 1), [0, 0, 1, 1, 0, 0, 1, 1], [(0, 1), (0, 1)], id="rows that are not neighbours"),
        pytest.param((8, 1, 1, 1, 1), [0, 1, 0, 1, 2, 3, 2, 3], [(0, 2), (0, 2), (1, 2), (1, 2)], id="blocks"),
    ],
)
def test_processes_supply_the_rows_of_their_devices(
    sizes: tuple[int, ...], owners: list[int], expected: list[tuple[int, int]]
) -> None:
    devices = [FakeDevice(id=index, process_index=owner) for index, owner in enumerate(owners)]
    mesh = Mesh(np.array(devices).reshape(sizes), ("data", "fsdp", "expert", "sequence", "tensor"))
    assert [process_rows(mesh, process) for process in range(len(expected))] == expected


def test_batch_is_put_in_its_shards() -> None:
    mesh = make_mesh(MeshConfig(data=2, sequence=2, tensor=2))
    rows = {"tokens": np.arange(24).reshape(4, 6), "continues": np.arange(4)}
    put: Any = put_batch(mesh, rows)
    for name, array in rows.items():
        np.testing.assert_array_equal(put[name], array)
        assert put[name].sharding == batch_sharding(mesh, dims=array.ndim)
    assert put["tokens"].addressable_shards[0].data.shape == (2, 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, None),
        ({"global_batch": 3}, "data.global_batch / train.accumulation_steps = 3 sequences cannot be split over 2"),
        ({"batch_size": 5}, "evaluation.batch_size = 5 sequences"),
        ({"seq_len": 26}, "train.windows = 26 tokens cannot be split over 4 devices .* parts of at least 3 tokens"),
        ({"windows": 2}, None),
        ({"windows": 4}, "train.windows = 6 tokens cannot"),
        ({"windows": 3}, "train.windows = 8 tokens cannot"),
    ],
)
def test_batches_that_do_not_fit_the_mesh_are_refused(fields: dict[str, int], message: str | None) -> None:
    values = {"global_batch": 4, "seq_len": 24, "windows": 1, "batch_size": 4, **fields}
    config = ExperimentConfig(
        name="test",
        model=ModelConfig(vocab_size=29, d_model=16, num_layers=1),
        data=DataConfig(
            train=ShardSource(path="shards"), seq_len=values["seq_len"], global_batch=values["global_batch"]
        ),
        optimizer=OptimizerConfig(peak_lr=1e-3),
        train=TrainConfig(num_steps=1, run_dir="run", windows=values["windows"]),
        evaluation=EvaluationConfig(batch_size=values["batch_size"]),
    )
    mesh = make_mesh(MeshConfig(data=2, sequence=4))

    def check() -> None:
        check_rows(mesh, "evaluation.batch_size", config.evaluation_batch_size)
        TrainProgram(config.program, mesh)

    if message is None:
        check()
        return
    with pytest.raises(InputError, match=message):
        check()


def test_uneven_parameter_is_refused_by_name() -> None:
    mesh = make_mesh(MeshConfig(tensor=8))
    axes = (Axis.EMBED, Axis.INNER)
    assert parameter_sharding(mesh, (4, 16), axes, name="w").spec == PartitionSpec(("fsdp", "sequence"), "tensor")
    with pytest.raises(InputError, match="parameter w: dimension inner of size 12 cannot be split over 8 devices"):
        parameter_sharding(mesh, (4, 12), axes, name="w")


def test_constrain_splits_activations_under_a_mesh_only() -> None:
    x = jnp.zeros((8, 4, 6))
    assert constrain(x, Axis.BATCH, Axis.LENGTH, None) is x
    mesh = make_mesh(MeshConfig(data=4, tensor=2))
    with jax.set_mesh(mesh):
        split = jax.jit(lambda x: constrain(x, Axis.BATCH, Axis.LENGTH, Axis.INNER))
        y, uneven = split(x), split(x[:, :, :5])
    assert y.addressable_shards[0].data.shape == (2, 4, 3)
    assert uneven.addressable_shards[0].data.shape == (2, 4, 5)
    assert batch_sharding(mesh).spec == PartitionSpec(("data", "fsdp", "expert"), "sequence")


def test_rules_leave_axes_that_are_not_ours_alone() -> None:
    """Other names, and our names where arrays say themselves how they are split."""
    kinds = {"data": AxisType.Auto, "pipe": AxisType.Auto, "tensor": AxisType.Explicit}
    mesh = jax.make_mesh((2, 2, 2), tuple(kinds), axis_types=tuple(kinds.values()))
    rules = RULES.within(mesh)
    none = dict.fromkeys(("length", "embed", "inner", "heads", "kv_heads", "expert", "vocab"), ())
    assert rules == ShardingRules(batch=("data",), **none)
    assert RULES.within(make_mesh(MeshConfig())) == RULES
    x = jnp.zeros((8, 4, 6))
    with jax.set_mesh(mesh):
        split = jax.jit(lambda x: constrain(x, Axis.BATCH, Axis.LENGTH, Axis.INNER))(x)
        assert parts(Axis.BATCH, 8) == 2
        assert parts(Axis.INNER, 6) == 1
    assert split.addressable_shards[0].data.shape == (4, 4, 6)
    with jax.set_mesh(jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))):
        assert constrain(x, Axis.BATCH, Axis.LENGTH, None) is x
        assert parts(Axis.BATCH, 8) == 1
