"""The manifests of ops: the documents say what they say, and they say it of calls that the ops take."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import TABLES
from pallas_kernels.common.arg_spec import (
    BFLOAT16_ROUNDING,
    Manifest,
    Work,
    allowed_error,
    evaluate,
    tolerance_table,
    work_table,
    written,
)
from pallas_kernels.manifests import MANIFESTS

DOCS = Path(__file__).parents[2] / "docs"
# Ops that the library knows: the toy of another test module registers itself.
OWN = {op: manifest for op, manifest in MANIFESTS.items() if hasattr(pallas_kernels, op)}
SIZES = {"B": 2, "L": 3, "E": 5, "N": 7}


@pytest.mark.parametrize(
    ("page", "table"),
    [("numerics.md", tolerance_table(OWN)), ("kernels.md", work_table(OWN))],
    ids=lambda text: text[:8],
)
def test_documents_hold_the_tables(page: str, table: str) -> None:
    assert table in (DOCS / page).read_text(), f"docs/{page} does not hold this table:\n{table}"


def test_every_op_that_models_call_has_a_manifest() -> None:
    edges = {"selective_scan_final_state", "selective_scan_initial_cotangent"}
    assert OWN.keys() == {op for op in TABLES if hasattr(pallas_kernels, op)} - edges


@pytest.mark.parametrize("op", OWN)
def test_the_op_takes_its_workloads(op: str) -> None:
    """Every timed call, with its long sizes cut short, and counts in letters that the op has."""
    manifest, table = OWN[op], TABLES[op]
    specs = [spec for specs in manifest.timed.values() for spec in specs]
    assert {"cpu", "accelerator"} == manifest.timed.keys()
    assert len({spec.name for spec in specs}) == len(specs) > 1
    for spec in specs:
        assert manifest.workload(spec.name) == spec
        assert manifest.shape_text(manifest.workload_of(manifest.shape_text(spec))) == manifest.shape_text(spec)
        small = manifest.workload_of("x".join("4" for _ in manifest.sizes))
        small = dataclasses.replace(spec, **{name: getattr(small, name) for name in manifest.sizes})  # type: ignore
        drawn = small.arguments()
        arrays = drawn.rounded("bfloat16")
        assert arrays["x"].dtype == jnp.bfloat16
        outputs = jax.eval_shape(lambda a, o=drawn.static: getattr(pallas_kernels, op)(**a, **o), arrays)
        assert outputs.y.shape == arrays["x"].shape
        sizes = table.sizes(arrays)
        counts = (manifest.tolerance.longest_sum, manifest.forward.vector, manifest.backward.vector)
        assert all(evaluate(count, sizes) > 0 for count in counts)


def test_unknown_workloads_and_shapes_say_what_there_is() -> None:
    scan = MANIFESTS["selective_scan"]
    with pytest.raises(ValueError, match=r"unknown workload 'mamba_7b'; there are long, mamba_130m, .*small_long"):
        scan.workload("mamba_7b")
    for text in ("8x2048x1536", "8x2048x1536x0", "8x2048x1536xN", ""):
        with pytest.raises(ValueError, match=r"expected batch x length x channels x states, for example 2x1024x512x16"):
            scan.workload_of(text)


def test_counts() -> None:
    count = {"BLEN": 6, "E": 1}
    assert evaluate(count, SIZES) == 6 * 210 + 5
    assert written(count) == "6 B L E N + E"
    assert written({}) == "0"


def test_allowed_error() -> None:
    exact = np.array([4.0, -1.0])
    allowed = allowed_error(exact, jnp.float32, terms=100)
    np.testing.assert_allclose(allowed, 8 * 2.0**-24 * 10 * 4.0, rtol=1e-12)
    np.testing.assert_allclose(
        allowed_error(exact, jnp.dtype(jnp.bfloat16), terms=100) - allowed, BFLOAT16_ROUNDING * np.abs(exact), rtol=1e-9
    )
    assert BFLOAT16_ROUNDING == 2.0**-8


def test_the_scan_counts_an_exponential_for_every_state() -> None:
    scan: Manifest = MANIFESTS["selective_scan"]
    update: Work = MANIFESTS["selective_state_update"].forward
    one_token = SIZES | {"L": 1}
    assert evaluate(scan.forward.special, SIZES) >= math.prod(SIZES.values())
    assert evaluate(update.vector, one_token) == evaluate(scan.forward.vector, one_token)
