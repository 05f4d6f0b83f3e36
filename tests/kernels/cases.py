"""One small call of every op, for tests that differentiate, map, shard or export all of them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    TABLES,
    causal_conv1d,
    selective_scan,
    selective_scan_final_state,
    selective_scan_initial_cotangent,
    selective_state_update,
    ssd,
    ssd_state_update,
)
from pallas_kernels.causal_conv1d.arg_specs import ConvSpec
from pallas_kernels.selective_scan.arg_specs import ScanSpec
from pallas_kernels.ssd.arg_specs import SSDSpec
from tests.kernels.op_contract import make_call

SCAN = ScanSpec(name="scan", length=19, batch=4, channels=8, states=3, B="grouped", has_segments=True)
HEADS = SSDSpec(name="heads", length=19, batch=4, heads=8, width=2, states=3, has_segments=True)
CONV = ConvSpec(name="conv", length=9, batch=4, channels=8, has_segments=True)
# Two orders of summation of the same float32 equations: 4 x 19 tokens, 8 channels and 3 states.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


ON_GPU = jax.default_backend() == "gpu"


def with_ops(*default: str) -> pytest.MarkDecorator:
    """Every op; those that are not named by the slow tests only."""
    return pytest.mark.parametrize(
        "name", [name if name in default else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
    )


NAMES = ("scan", "convolution", "update", "final state", "initial cotangent", "heads", "token of heads")


def number(outputs: tuple[Any, ...]) -> jax.Array:
    return jnp.asarray(sum(jnp.sum(jnp.sin(output)) for output in outputs))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """An op with arguments; the letters B, E and H in `letters` are what devices may share out."""

    function: Callable[..., Any]
    arrays: dict[str, jax.Array]
    fixed: dict[str, jax.Array]
    static: dict[str, Any]

    @property
    def letters(self) -> dict[str, str]:
        """Letters of the dimensions of every array."""
        table = TABLES[self.function.__name__]
        return {name: table.letters(name, array) for name, array in (self.arrays | self.fixed).items()}

    @property
    def outputs(self) -> tuple[str, ...]:
        """Letters of the dimensions of every output."""
        return tuple(TABLES[self.function.__name__].outputs.values())

    def run(self, arrays: dict[str, Any], fixed: dict[str, Any], implementation: str | None = None) -> tuple[Any, ...]:
        """The outputs."""
        output = self.function(**arrays, **fixed, **self.static, implementation=implementation)
        return tuple(jax.tree.leaves(output))

    def loss(self, arrays: dict[str, Any], fixed: dict[str, Any], implementation: str | None = None) -> jax.Array:
        """A number that depends on every output."""
        return number(self.run(arrays, fixed, implementation))


def _cases() -> dict[str, Case]:
    scan, conv, heads = make_call(SCAN), make_call(CONV), make_call(HEADS)
    softplus = {"dt_softplus": True}

    def some(*names: str, **others: jax.Array) -> dict[str, jax.Array]:
        return {name: scan.arrays[name] for name in names} | others

    token = {name: array[:, 0] for name, array in some("x", "dt", "z", "B").items()}
    update = some("A", "D", "dt_bias", state=scan.arrays["initial_state"], C=scan.arrays["C"][:, :1]) | token
    of_heads = {name: heads.arrays[name] for name in ("A", "D", "dt_bias")}
    of_heads |= {name: heads.arrays[name][:, 0] for name in ("x", "dt", "B", "C")}
    of_heads["state"] = heads.arrays["initial_state"]
    ids = {"segment_ids": scan.integers["segment_ids"]}
    entering = some("x", "dt", "A", "B", "dt_bias")
    leaving = some("dt", "A", "C", "z", "dt_bias", dy=scan.arrays["x"])
    return {
        "scan": Case(function=selective_scan, arrays=scan.arrays, fixed=ids, static=softplus),
        "convolution": Case(
            function=causal_conv1d, arrays=conv.arrays, fixed=conv.integers, static={"activation": "silu"}
        ),
        "update": Case(function=selective_state_update, arrays=update, fixed={}, static=softplus),
        "final state": Case(function=selective_scan_final_state, arrays=entering, fixed=ids, static=softplus),
        "initial cotangent": Case(
            function=selective_scan_initial_cotangent, arrays=leaving, fixed=ids, static=softplus
        ),
        "heads": Case(function=ssd, arrays=heads.arrays, fixed=heads.integers, static=softplus),
        "token of heads": Case(function=ssd_state_update, arrays=of_heads, fixed={}, static=softplus),
    }


CASES = _cases()


def assert_close(actual: Any, expected: Any) -> None:
    for (path, value), reference in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(value, reference, **CLOSE, err_msg=jax.tree_util.keystr(path))


def outputs_and_gradients(run: Callable[..., tuple[Any, ...]], case: Case, arrays: Any) -> tuple[Any, Any]:
    """Of the case's arguments, with every gradient of `number`."""

    def loss(arrays: Any, fixed: Any) -> Any:
        outputs = run(arrays, fixed)
        return number(outputs), outputs

    gradients, outputs = jax.jit(jax.grad(loss, has_aux=True))(arrays, case.fixed)
    return outputs, gradients


@functools.cache
def unsharded(name: str) -> Any:
    """What one device gives."""
    case = CASES[name]
    return outputs_and_gradients(case.run, case, case.arrays)


def skip_off_platform(implementation: str) -> None:
    if implementation == "pallas_tpu" and ON_GPU:
        pytest.skip("for TPUs")
