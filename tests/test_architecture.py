"""Imports go downwards only, files stay readable, and nothing private to a machine is committed."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# From the bottom up: a module may import modules of its own room and of rooms above it in this list.
ROOMS = (
    "pallas_kernels",
    "mamba_jax.errors",
    "mamba_jax.files",
    "mamba_jax.chips",
    "mamba_jax.config_base",
    "mamba_jax.sharding",
    "mamba_jax.models",
    "mamba_jax.data",
    "mamba_jax.training.config",
    "mamba_jax.evaluation.config",
    "mamba_jax.experiment",
    "mamba_jax.config",
    "mamba_jax.cli",
    "mamba_jax.config_files",
    "mamba_jax.data.prepare",
    "mamba_jax.data.train_tokenizer",
    "mamba_jax.data.pipeline",
    "mamba_jax.training",
    "mamba_jax.run.distributed",
    "mamba_jax.checkpoint",
    "mamba_jax.export",
    "mamba_jax.generation",
    "mamba_jax.evaluation",
    "mamba_jax.telemetry",
    "mamba_jax.run",
    "mamba_jax.pods",
    "mamba_jax.report",
    "mamba_jax.sweep",
    "mamba_jax.experiments",
    "mamba_jax.loaded",
    "mamba_jax.generator",
    "mamba_jax.evaluation.harness",
    "mamba_jax.evaluation.lm_eval",
    "mamba_jax.commands",
    "mamba_jax.generate",
    "mamba_jax.serve",
    "mamba_jax.renamed",
    "mamba_jax",
    "mamba_jax.__main__",
    "setup",
    "train",
    "eval",
    "configs",
    "benchmarks",
)
KERNEL_DEPENDENCIES = {"jax", "jaxtyping", "jax_triton", "numpy", "pallas_kernels", "triton"}


def _source_files() -> list[Path]:
    roots = ["mamba_jax", "pallas_kernels", "configs", "benchmarks"]
    files = [path for root in roots for path in sorted((ROOT / root).rglob("*.py"))]
    return [*files, ROOT / "train.py", ROOT / "eval.py", ROOT / "setup.py"]


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
            if node.module != "mamba_jax":
                names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def _room(name: str) -> str | None:
    parts = name.split(".")
    return next((room for end in range(len(parts), 0, -1) if (room := ".".join(parts[:end])) in ROOMS), None)


def test_imports_go_upwards_in_the_list_of_rooms() -> None:
    for path in _source_files():
        own = _room(_module_name(path))
        assert own is not None, f"{path} belongs to no room: add it to ROOMS"
        for name in _imports(path):
            room = _room(name)
            is_above = room is None or ROOMS.index(room) <= ROOMS.index(own)
            assert is_above, f"{_module_name(path)} ({own}) imports {name}"
            if own.startswith(("mamba_jax", "pallas_kernels")):
                assert not name.startswith("configs"), f"{_module_name(path)} imports the config file {name}"


def test_packages_are_acyclic() -> None:
    graph: dict[str, set[str]] = {}
    for path in _source_files():
        name = _module_name(path).split(".")
        if name[0] == "mamba_jax" and len(name) > 2:
            imported = {tuple(other.split(".")[:2]) for other in _imports(path) if other.startswith("mamba_jax.")}
            folders = {second for _, second in imported if (ROOT / "mamba_jax" / second).is_dir()}
            graph.setdefault(name[1], set()).update(folders - {name[1]})
    order = graphlib.TopologicalSorter(graph)
    order.prepare()


def test_kernels_depend_on_jax_only() -> None:
    for path in (ROOT / "pallas_kernels").rglob("*.py"):
        for name in _imports(path):
            top = name.split(".")[0]
            assert top in KERNEL_DEPENDENCIES or top in sys.stdlib_module_names, f"{path} imports {name}"


def test_models_call_public_kernels_only() -> None:
    for path in (ROOT / "mamba_jax").rglob("*.py"):
        for name in _imports(path):
            depth = name.count(".")
            is_common = name.startswith("pallas_kernels.common.")
            assert not name.startswith("pallas_kernels.") or depth < 2 or is_common, (
                f"{path} reaches into a backend: {name}"
            )


def test_files_are_short() -> None:
    for path in [*_source_files(), *(ROOT / "tests").rglob("*.py")]:
        lines = path.read_text().count("\n")
        # Doors to programs of the package.
        limit = 10 if path in (ROOT / "train.py", ROOT / "eval.py") else 400
        assert lines <= limit, f"{path} has {lines} lines, limit {limit}"


def test_only_sharding_names_mesh_axes() -> None:
    forbidden = re.compile(r"with_sharding_constraint|shard_map|PartitionSpec\(")
    for path in (ROOT / "mamba_jax").rglob("*.py"):
        if path.parent.name != "sharding":
            assert not forbidden.search(path.read_text()), f"{path}: sharding belongs in mamba_jax/sharding"


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
