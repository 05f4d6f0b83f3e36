"""Test-wide settings: eight CPU devices, strict rank promotion, runtime checks of every jaxtyping annotation.

JAX_PLATFORMS=cuda in the environment runs the same tests on a GPU.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
if os.environ["JAX_PLATFORMS"] == "cpu":
    # Nearly all the time of these tests is compilation of small programs; without LLVM's optimisation it halves.
    os.environ["XLA_FLAGS"] = (
        "--xla_force_host_platform_device_count=8 "
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    )

from jaxtyping import install_import_hook

install_import_hook(["mamba_jax", "pallas_kernels"], "beartype.beartype")

import jax  # noqa: E402  the environment and the import hook must come first

jax.config.update("jax_numpy_rank_promotion", "raise")
# Bounds are those of float32; a GPU rounds factors of float32 products to 11 bits unless told otherwise.
jax.config.update("jax_default_matmul_precision", "highest")
