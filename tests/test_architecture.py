"""Imports go downwards only, files stay readable, and nothing private to a machine is committed."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Lower number = lower layer. A module may import modules of its own number or below.
LAYERS = {
    "pallas_kernels": 0,
    "mamba_jax.errors": 1,
    "mamba_jax.config": 2,
    "mamba_jax.config_base": 2,
    "mamba_jax.cli": 3,
    "mamba_jax.distributed": 3,
    "mamba_jax.sharding": 3,
    "mamba_jax.models": 4,
    "mamba_jax.data": 4,
    "mamba_jax.checkpoint": 5,
    "mamba_jax.fingerprints": 5,
    "mamba_jax.training": 6,
    "mamba_jax.generation": 6,
    "mamba_jax.export": 6,
    "mamba_jax.evaluation": 6,
    "mamba_jax.report": 7,
    "train": 7,
    "eval": 7,
    "configs": 7,
    "benchmarks": 7,
}
KERNEL_DEPENDENCIES = {"jax", "jaxtyping", "jax_triton", "numpy", "pallas_kernels", "triton"}


def _source_files() -> list[Path]:
    roots = ["mamba_jax", "pallas_kernels", "configs", "benchmarks"]
    files = [path for root in roots for path in sorted((ROOT / root).rglob("*.py"))]
    return [*files, ROOT / "train.py", ROOT / "eval.py"]


def _module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def _layer(name: str) -> int | None:
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        if (layer := LAYERS.get(".".join(parts[:length]))) is not None:
            return layer
    return None


@pytest.mark.parametrize("path", _source_files(), ids=_module_name)
def test_imports_go_downwards(path: Path) -> None:
    own = _layer(_module_name(path))
    if _module_name(path) == "mamba_jax":
        return
    assert own is not None, f"{path} belongs to no layer: add it to LAYERS"
    for name in _imports(path):
        layer = _layer(name)
        assert layer is None or layer <= own, f"{_module_name(path)} (layer {own}) imports {name} (layer {layer})"
        if own < LAYERS["configs"]:
            assert not name.startswith("configs"), (
                f"{_module_name(path)} imports {name}: library code knows no config file"
            )


@pytest.mark.parametrize("path", [p for p in _source_files() if "pallas_kernels" in p.parts], ids=_module_name)
def test_kernels_depend_on_jax_only(path: Path) -> None:
    import sys

    for name in _imports(path):
        top = name.split(".")[0]
        assert top in KERNEL_DEPENDENCIES or top in sys.stdlib_module_names, f"{path} imports {name}"


def test_models_call_public_kernels_only() -> None:
    for path in (ROOT / "mamba_jax").rglob("*.py"):
        for name in _imports(path):
            depth = name.count(".")
            assert not (name.startswith("pallas_kernels.") and depth > 1), f"{path} reaches into a backend: {name}"


@pytest.mark.parametrize("path", _source_files(), ids=_module_name)
def test_files_are_short(path: Path) -> None:
    lines = path.read_text().count("\n")
    limit = {"train.py": 60, "eval.py": 60, "config.py": 550}.get(path.name, 400)
    assert lines <= limit, f"{path} has {lines} lines, limit {limit}"


def test_only_sharding_names_mesh_axes() -> None:
    forbidden = re.compile(r"with_sharding_constraint|shard_map|PartitionSpec\(")
    for path in (ROOT / "mamba_jax").rglob("*.py"):
        if path.name != "sharding.py":
            assert not forbidden.search(path.read_text()), f"{path}: sharding belongs in sharding.py"


def test_tracked_files_name_no_machine() -> None:
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    pattern = re.compile(rb"/(?:root|home|work|Users)/[a-z]|file:///|extra-index-url|--index-url")
    for name in filter(None, tracked.decode().split("\0")):
        path = ROOT / name
        if path.is_file() and path != Path(__file__):
            match = pattern.search(path.read_bytes())
            assert match is None, f"{name} holds {match.group()!r}"


def test_requirements_lock_is_plain() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    assert lines
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9_.\-]+==[A-Za-z0-9_.+!\-]+", line), line
