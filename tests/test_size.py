"""The code stays in small pieces, and nothing is said twice: limits on files, folders, functions and repeated lines."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_architecture import ROOT, _module_name, _source_files

MAX_MODULES = 16
MAX_LINES, MAX_ARGUMENTS = 50, 7
# A kernel is one program for a device: splitting it hides the order of its loads and stores.
MAX_KERNEL_LINES = 120
KERNEL_MODULES = {"kernel", "kernels", "forward", "backward", "edge", "tiles"}
# The paper's equations have this many terms, and callers pass them by name. Wrappers take the same arguments.
SIGNATURES_OF_OPS = {
    "selective_scan",
    "selective_state_update",
    "selective_scan_final_state",
    "selective_scan_initial_cotangent",
    "ssd",
    "ssd_state_update",
    "scan",
    "unchunked_associative_scan",
    "peer_scan",
    "edge_state",
    "generate",
}
# Above the limit, and to be split: a test that passes is to be taken off this list.
TO_BE_SPLIT = {
    ("pallas_kernels.selective_scan.triton.kernels", "backward"),
}
REPEATED_LINES = 6
MAX_REPEATS = 32


def _is_kernel(path: Path) -> bool:
    """Whether the file is one of kernel bodies: in a backend's folder, two below an op's."""
    parts = path.relative_to(ROOT).parts
    return parts[0] == "pallas_kernels" and len(parts) == 4 and path.stem in KERNEL_MODULES and parts[2] != "xla"


def _functions() -> Iterator:
    for path in _source_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                name = (_module_name(path), node.name)
                marks = [pytest.mark.xfail(reason="to be split", strict=False)] if name in TO_BE_SPLIT else []
                yield pytest.param(path, node, id=f"{name[0]}:{node.lineno}", marks=marks)


def _lines(function: ast.FunctionDef) -> int:
    """Lines from `def` to the last statement, without the docstring, which the rules of the house want long."""
    assert function.end_lineno is not None
    docstring = 0
    if ast.get_docstring(function) is not None:
        docstring = (function.body[0].end_lineno or 0) - function.body[0].lineno + 1
    return function.end_lineno - function.lineno + 1 - docstring


@pytest.mark.parametrize(("path", "function"), list(_functions()))
def test_functions_are_short(path: Path, function: ast.FunctionDef) -> None:
    limit = MAX_KERNEL_LINES if _is_kernel(path) else MAX_LINES
    lines = _lines(function)
    assert lines <= limit, f"{path}: {function.name} has {lines} lines, limit {limit}"
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    count = sum(argument.arg not in ("self", "cls") for argument in arguments)
    if not _is_kernel(path) and function.name not in SIGNATURES_OF_OPS:
        assert count <= MAX_ARGUMENTS, f"{path}: {function.name} takes {count} arguments, limit {MAX_ARGUMENTS}"


def _folders() -> list[Path]:
    return sorted({path.parent for path in _source_files()} - {ROOT})


@pytest.mark.parametrize("folder", _folders(), ids=lambda folder: folder.name)
def test_folders_are_small(folder: Path) -> None:
    names = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    assert len(names) <= MAX_MODULES, f"{folder} has {len(names)} modules, limit {MAX_MODULES}: {names}"


def test_only_its_folder_and_one_line_name_a_mixer() -> None:
    mixers = ROOT / "mamba_jax" / "models" / "mixers"
    for folder in (path for path in mixers.iterdir() if (path / "__init__.py").is_file()):
        for path in (ROOT / "mamba_jax").rglob("*.py"):
            if not path.is_relative_to(folder) and path != mixers / "__init__.py":
                assert folder.name not in path.read_text().lower(), f"{path} names the mixer {folder.name}"


def repeats(files: list[Path]) -> list[tuple[str, str, int]]:
    """Pairs of places with six or more equal lines in a row, each as (place, place, lines).

    Lines count without indentation; empty lines and comments do not count. A run of equal lines is one pair
    however long it is. Three places that say the same are three pairs.
    """
    numbered = []
    for path in files:
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if line.strip() and not line.strip().startswith("#"):
                numbered.append((path, number, line.strip()))
    windows = defaultdict(list)
    for start in range(len(numbered) - REPEATED_LINES + 1):
        part = numbered[start : start + REPEATED_LINES]
        if part[0][0] == part[-1][0]:
            windows[tuple(line for _, _, line in part)].append(start)
    equal = {(a, b) for starts in windows.values() for a in starts for b in starts if b >= a + REPEATED_LINES}
    pairs = []
    for a, b in sorted(equal):
        if (a - 1, b - 1) not in equal:
            lines = REPEATED_LINES
            while (a + lines - REPEATED_LINES + 1, b + lines - REPEATED_LINES + 1) in equal:
                lines += 1
            (first, line_a, _), (second, line_b, _) = numbered[a], numbered[b]
            pairs.append((f"{first}:{line_a}", f"{second}:{line_b}", lines))
    return pairs


def test_little_is_said_twice() -> None:
    pairs = repeats(_source_files())
    listed = "\n".join(f"{lines} lines: {first} and {second}" for first, second, lines in pairs)
    assert len(pairs) < MAX_REPEATS, f"{len(pairs)} pairs of places repeat lines, limit {MAX_REPEATS}:\n{listed}"
