"""What pyproject.toml cannot say: the configs of configs/ are installed within the package."""

from pathlib import Path

from setuptools import find_packages, setup

CONFIGS = [folder for folder in (Path("configs"), *sorted(Path("configs").rglob("*"))) if any(folder.glob("*.py"))]

setup(
    packages=[
        *find_packages(include=["mamba_jax*", "pallas_kernels*"]),
        *(".".join(("mamba_jax", *folder.parts)) for folder in CONFIGS),
    ],
    package_dir={"mamba_jax.configs": "configs"},
)
