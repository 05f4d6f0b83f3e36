"""Test-wide settings: eight CPU devices, strict rank promotion, runtime checks of every jaxtyping annotation.

JAX_PLATFORMS=cuda in the environment runs the same tests on a GPU.
"""

import gc
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
if os.environ["JAX_PLATFORMS"] == "cpu":
    # Nearly all the time of these tests is compilation of small programs; without LLVM's optimisation it halves.
    os.environ["XLA_FLAGS"] = (
        "--xla_force_host_platform_device_count=8 "
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    )

# Programs are compiled once for all workers and all runs of the tests. One made for another processor may not run.
PROGRAMS = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mamba-jax" / "test-programs"
MAX_PROGRAM_BYTES = 4 * 2**30
processor = hashlib.sha256(Path("/proc/cpuinfo").read_bytes().partition(b"flags")[2].partition(b"\n")[0])
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(PROGRAMS / processor.hexdigest()[:16]))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook(["mamba_jax", "pallas_kernels"], "beartype.beartype")

import jax  # noqa: E402  the environment and the import hook must come first
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
# Bounds are those of float32; a GPU rounds factors of float32 products to 11 bits unless told otherwise.
jax.config.update("jax_default_matmul_precision", "highest")

# A writer that a test leaves open has a thread that fails in the middle of a later test. One test takes the module.
sys.modules["tensorboardX"] = None  # type: ignore[assignment]


# A process may have 65,530 areas of memory, and crashes in the compiler beyond. A program for a CPU takes some twenty.
MAPS, MAX_MAPS = Path("/proc/self/maps"), 20_000


@pytest.fixture(scope="module", autouse=True)
def room_for_programs() -> Iterator[None]:
    """After a file of tests, programs are let go of if there are many; those on disk are read again."""
    yield
    if MAPS.is_file() and MAPS.read_bytes().count(b"\n") > MAX_MAPS:
        jax.clear_caches()
        gc.collect()


def pytest_configure(config) -> None:
    """Before any test, programs of old code make room for new ones."""
    if not hasattr(config, "workerinput") and PROGRAMS.is_dir():
        size = sum(path.stat().st_size for path in PROGRAMS.rglob("*") if path.is_file())
        if size > MAX_PROGRAM_BYTES:
            shutil.rmtree(PROGRAMS, ignore_errors=True)
