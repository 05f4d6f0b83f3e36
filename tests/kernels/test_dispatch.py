"""Which implementation runs, what is said about it, and one-line errors for bad arguments."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec
from jaxtyping import config as jaxtyping_config

from pallas_kernels import (
    causal_conv1d,
    selective_scan,
    selective_scan_final_state,
    selective_scan_initial_cotangent,
    selective_state_update,
)
from pallas_kernels.common import dispatch
from pallas_kernels.common.ahead_of_time import tracing_for_kind
from pallas_kernels.common.devices import target_platform
from pallas_kernels.common.dispatch import Dispatcher


@pytest.fixture
def only_our_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the annotations' run-time checks, as in production."""
    monkeypatch.setattr(jaxtyping_config, "jaxtyping_disable", True)


@pytest.fixture(autouse=True)
def _nothing_logged_yet() -> None:
    dispatch._log_once.cache_clear()


def _declines(x: jax.Array) -> jax.Array:
    raise NotImplementedError("needs a length of 128")


def _double(x: jax.Array) -> jax.Array:
    return 2 * x


def test_falls_back_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    op = Dispatcher(op="op", implementations={"kernel": _declines, "xla": _double}, default_order=("kernel", "xla"))
    with caplog.at_level(logging.INFO, logger="pallas_kernels"):
        assert op(jnp.ones(()), implementation=None) == 2
        op(jnp.ones(()), implementation=None)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "'xla' on cpu" in record.message
    assert "needs a length of 128" in record.message


def test_named_implementation_runs_or_raises() -> None:
    op = Dispatcher(op="op", implementations={"kernel": _declines, "xla": _double})
    with pytest.raises(NotImplementedError, match="needs a length of 128"):
        op(jnp.ones(()), implementation="kernel")
    with pytest.raises(ValueError, match="unknown implementation 'typo'; choose None or one of kernel, xla"):
        op(jnp.ones(()), implementation="typo")


def test_every_reason_is_reported() -> None:
    op = Dispatcher(
        op="op", implementations={"first": _declines, "second": _declines}, platform_order={"cpu": ("first", "second")}
    )
    with pytest.raises(ExceptionGroup, match="no implementation for cpu") as caught:
        op(jnp.ones(()), implementation=None)
    assert [reason.__notes__ for reason in caught.value.exceptions] == [
        ["raised by implementation 'first'"],
        ["raised by implementation 'second'"],
    ]


def test_double_precision_is_declined_not_rounded() -> None:
    with jax.enable_x64(True):
        x = jnp.ones((1, 2, 3), jnp.float64)
        matrix = jnp.ones((1, 2, 4), jnp.float64)
        with pytest.raises(ExceptionGroup) as caught:
            selective_scan(x, x, -jnp.ones((3, 4)), matrix, matrix)
        (reason,) = caught.value.exceptions
        assert "cast them or use implementation='reference'" in str(reason)
        with pytest.raises(ExceptionGroup):
            causal_conv1d(x, jnp.ones((4, 3)))


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_abstract_device_names_the_platform(platform: str) -> None:
    assert target_platform() == "cpu"
    with tracing_for_kind(platform, "any"):
        assert target_platform() == platform


def test_tpu_kernels_are_not_split_by_the_compiler(caplog: pytest.LogCaptureFixture) -> None:
    """Under automatic axes over several TPUs XLA's form runs, and says why; mapped over them the kernel does."""
    target = AbstractDevice(platform="tpu", device_kind="TPU v5 lite", num_cores=1)
    mesh = AbstractMesh((4,), ("rows",), axis_types=(AxisType.Auto,), abstract_device=target)
    x = jnp.zeros((4, 8, 16))

    def convolve(x: jax.Array) -> jax.Array:
        return causal_conv1d(x, jnp.ones((4, 16))).y

    with jax.sharding.use_abstract_mesh(mesh):
        text = str(jax.make_jaxpr(convolve)(x))
        with pytest.raises(NotImplementedError, match=r"automatic mesh axes \(rows\); call it inside jax.shard_map"):
            jax.make_jaxpr(lambda x: causal_conv1d(x, jnp.ones((4, 16)), implementation="pallas_tpu").y)(x)
        spec = PartitionSpec("rows")
        mapped = str(jax.make_jaxpr(jax.shard_map(convolve, in_specs=spec, out_specs=spec))(x))
    assert "pallas_call" not in text
    assert "'xla' on tpu" in caplog.text
    assert "pallas_call" in mapped


X = jnp.zeros((2, 5, 4))
MATRIX = jnp.zeros((2, 5, 3))
A = -jnp.ones((4, 3))
SCAN = {"x": X, "dt": X, "A": A, "B": MATRIX, "C": MATRIX}
CONV = {"x": X, "weight": jnp.zeros((4, 4))}
ENTERING = {name: SCAN[name] for name in ("x", "dt", "A", "B")}
LEAVING = {"dy": X, "dt": X, "A": A, "C": MATRIX}
UPDATE = {
    "state": jnp.zeros((2, 4, 3)),
    "x": X[:, 0],
    "dt": X[:, 0],
    "A": A,
    "B": MATRIX[:, :1],
    "C": MATRIX[:, :1],
}


@pytest.mark.usefixtures("only_our_checks")
@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (selective_scan, SCAN | {"x": X[0]}, r"x has shape \(5, 4\), expected non-empty \(B, L, E\)"),
        (selective_scan, SCAN | {"x": X[:, :0], "dt": X[:, :0]}, r"x has shape \(2, 0, 4\), expected non-empty"),
        (selective_scan, SCAN | {"dt": X[:, :4]}, r"dt has shape \(2, 4, 4\), expected \(B, L, E\) = \(2, 5, 4\)"),
        (selective_scan, SCAN | {"A": A.T}, r"A has shape \(3, 4\), expected \(E, N\) = \(4, N\)"),
        (selective_scan, SCAN | {"B": MATRIX[:, 1:]}, r"B has shape \(2, 4, 3\), expected \(B, L, N\)"),
        (selective_scan, SCAN | {"B": jnp.zeros((2, 5, 3, 3))}, "B has 3 groups, which do not divide E=4"),
        (
            selective_scan,
            SCAN | {"B": jnp.zeros((2, 5, 2, 3)), "C": jnp.zeros((2, 5, 4, 3))},
            "C has 4 groups, another array has 2: make them equal",
        ),
        (selective_scan, SCAN | {"C": MATRIX.astype(jnp.complex64)}, "C has dtype complex64 but A is real"),
        (selective_scan, SCAN | {"x": X.astype(jnp.int32)}, "x has dtype int32, expected a real floating dtype"),
        (selective_scan, SCAN | {"segment_ids": X[:, :, 0]}, "segment_ids has dtype float32, expected an integer"),
        (selective_scan, SCAN | {"discretization": "bilinear"}, "unknown discretization 'bilinear'"),
        (selective_scan, SCAN | {"initial_state": jnp.zeros((2, 3, 4))}, r"expected \(B, E, N\) = \(2, 4, 3\)"),
        (causal_conv1d, CONV | {"weight": jnp.zeros((4, 1, 4))}, r"weight has shape \(4, 1, 4\), expected \(K, E\)"),
        (causal_conv1d, CONV | {"bias": jnp.zeros(3)}, r"bias has shape \(3,\), expected \(E,\) = \(4,\)"),
        (causal_conv1d, CONV | {"initial_window": X[:, :4]}, r"expected \(B, K - 1, E\) = \(2, 3, 4\)"),
        (causal_conv1d, CONV | {"activation": "gelu"}, "unknown activation 'gelu'; choose None or 'silu'"),
        (selective_state_update, UPDATE | {"x": X}, r"x has shape \(2, 5, 4\), expected non-empty \(B, E\)"),
        (selective_state_update, UPDATE | {"state": X}, r"state has shape \(2, 5, 4\), expected \(B, E, N\)"),
        (selective_state_update, UPDATE | {"B": jnp.zeros((5, 3))}, r"B has shape \(5, 3\), expected \(B, G, N\)"),
        (selective_state_update, UPDATE | {"state": UPDATE["state"].astype(int)}, "state has dtype int32, expected a"),
        (selective_scan_final_state, ENTERING | {"dt": X[:, :4]}, r"dt has shape \(2, 4, 4\), expected \(B, L, E\)"),
        (selective_scan_final_state, ENTERING | {"B": MATRIX[:1]}, r"B has shape \(1, 5, 3\), expected \(B, L, N\)"),
        (selective_scan_final_state, ENTERING | {"x": X[:0]}, r"x has shape \(0, 5, 4\), expected non-empty"),
        (
            selective_scan_initial_cotangent,
            LEAVING | {"dt": X[:, :4]},
            r"dt has .*, expected \(B, L, E\) = \(2, 5, 4\)",
        ),
        (
            selective_scan_initial_cotangent,
            LEAVING | {"C": MATRIX.astype(int)},
            "C has dtype int32, expected a floating",
        ),
        (selective_scan, SCAN | {"x": None}, r"x is not an array but NoneType"),
        (selective_scan, SCAN | {"z": "gate"}, r"z is not an array but str"),
        (
            selective_scan,
            SCAN | {"x": [[[1.0, 2.0]], [[1.0]]]},
            r"x is not an array but list \(setting an array",
        ),
        (selective_scan, SCAN | {"x": X.astype(int).tolist()}, "x has dtype int32, expected a real floating dtype"),
        (
            selective_scan,
            SCAN | {"segment_ids": np.zeros((2, 5), bool)},
            "segment_ids has dtype bool, expected an integer",
        ),
        (causal_conv1d, CONV | {"weight": 1.0}, r"weight has shape \(\), expected \(K, E\)"),
    ],
)
def test_bad_arguments_are_one_line(function, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        function(**arguments)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(function.__name__)
