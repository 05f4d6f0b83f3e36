"""An environment with torch and transformers, beside the one of the tests, which has neither."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

# The builds for CPUs have this label; one without it may be gigabytes for GPUs.
PACKAGES = ("torch==2.13.0+cpu", "transformers==5.24.0", "gguf==0.19.0", "accelerate==1.15.0", "peft==0.21.2")
# Builds for CPUs lie ready for some versions of Python only.
INTERPRETERS = ("python3.12", "python3.11", "python3.13", "python3.14")


def environment() -> dict[str, str]:
    """The variables for a program there, which must not see packages of this environment."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.fixture(scope="session")
def torch_python() -> str:
    """Its interpreter: what TORCH_PYTHON names, else what is made here and kept for the next time."""
    if "TORCH_PYTHON" in os.environ:
        return os.environ["TORCH_PYTHON"]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mamba-jax" / "transformers"
    made = folder / "packages"
    if made.is_file() and made.read_text() == " ".join(PACKAGES):
        return str(folder / "bin" / "python")
    reasons = []
    for name in filter(shutil.which, INTERPRETERS):
        if (reason := _failure_to_make(name, folder)) is None:
            made.write_text(" ".join(PACKAGES))
            return str(folder / "bin" / "python")
        reasons.append(f"{name}: {reason}")
    pytest.skip(f"TORCH_PYTHON names no interpreter, and none with {' and '.join(PACKAGES)} can be made: {reasons}")


def _failure_to_make(interpreter: str, folder: Path) -> str | None:
    """Makes the environment; returns the last line of what went wrong."""
    install = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *PACKAGES]
    for command in ([interpreter, "-m", "venv", "--clear", str(folder)], install):
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
        if done.returncode:
            return (done.stdout + done.stderr).strip().rpartition("\n")[2]
    return None
