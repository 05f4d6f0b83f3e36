"""A part of JAX that cannot be imported takes down the implementations that use it, and no other."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.startswith(tuple(sys.argv[1].split(","))):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
import numpy as np
import pallas_kernels as pk

x = np.ones((1, 5, 2), np.float32)
matrix = np.ones((1, 5, 3), np.float32)
A = -np.ones((2, 3), np.float32)
for name in ("reference", "xla", "xla_sequential"):
    scan = pk.selective_scan(x, x, A, matrix, matrix, implementation=name)
    assert np.isfinite(scan.y).all()
assert np.isfinite(pk.selective_scan_final_state(x, x, A, matrix, implementation="xla")).all()
for name in ("reference", "xla"):
    assert np.isfinite(pk.causal_conv1d(x, np.ones((4, 2), np.float32), implementation=name).y).all()
    update = pk.selective_state_update(np.zeros((1, 2, 3)), x[:, 0], x[:, 0], A, A, A, implementation=name)
    assert np.isfinite(update.y).all()
    heads = np.ones((1, 5, 2, 3), np.float32)
    assert np.isfinite(pk.ssd(heads, x, A[:, 0], heads[:, :, :1], heads[:, :, :1], implementation=name).y).all()
for name in sys.argv[2].split(","):
    try:
        pk.selective_scan(x, x, A, matrix, matrix, implementation=name)
    except NotImplementedError as error:
        print(name, "|", error)
"""


@pytest.mark.parametrize(
    ("blocked", "lost"),
    [
        ("jax.experimental.mosaic,jax.experimental.pallas.mosaic_gpu", ("pallas_gpu",)),
        ("jax.experimental.pallas", ("pallas_gpu", "pallas_tpu")),
    ],
)
def test_other_implementations_go_on(blocked: str, lost: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, blocked, ",".join(lost)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(" | ")[0] for line in lines] == list(lost)
    assert all("cannot be imported here" in line and "is blocked" in line for line in lines)
