"""The code stays in small pieces, and nothing is said twice: limits on files, folders, functions and repeated lines."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from tests.test_architecture import ROOT, _source_files

MAX_MODULES = 16
MAX_LINES, MAX_ARGUMENTS = 50, 7
# A kernel is one program for a device: splitting it hides the order of its loads and stores.
MAX_KERNEL_LINES = 120
KERNEL_MODULES = {"kernel", "forward", "backward", "edge", "products", "recurrence"}
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
# A function this long is not understood at a glance.
SILENT_LINES = 9
REPEATED_LINES = 6
MAX_REPEATS = 24


def _is_kernel(path: Path) -> bool:
    """Whether the file is one of kernel bodies: in a backend's folder, two below an op's."""
    parts = path.relative_to(ROOT).parts
    return parts[0] == "pallas_kernels" and len(parts) == 4 and path.stem in KERNEL_MODULES and parts[2] != "xla"


def _functions() -> Iterator[tuple[Path, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for path in _source_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield path, node


def _lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the last statement, without the docstring, which the rules of the house want long."""
    assert function.end_lineno is not None
    docstring = 0
    if ast.get_docstring(function) is not None:
        docstring = (function.body[0].end_lineno or 0) - function.body[0].lineno + 1
    return function.end_lineno - function.lineno + 1 - docstring


def _too_much(path: Path, function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    """A line for every limit that a function exceeds."""
    limit = MAX_KERNEL_LINES if _is_kernel(path) else MAX_LINES
    place = f"{path.relative_to(ROOT)}:{function.lineno}: {function.name}"
    if (lines := _lines(function)) > limit:
        yield f"{place} has {lines} lines, limit {limit}"
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    count = sum(argument.arg not in ("self", "cls") for argument in arguments)
    if count > MAX_ARGUMENTS and not _is_kernel(path) and function.name not in SIGNATURES_OF_OPS:
        yield f"{place} takes {count} arguments, limit {MAX_ARGUMENTS}"


def test_functions_are_short() -> None:
    functions = list(_functions())
    assert len(functions) > 1000, "the sources were not found"
    excess = [line for path, function in functions for line in _too_much(path, function)]
    assert not excess, "\n".join(excess)


def _outer_functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    """Functions and methods, without those that are defined inside one."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            yield node
        else:
            yield from _outer_functions(node)


def test_all_but_the_shortest_functions_say_what_they_do() -> None:
    silent = [
        f"{path.relative_to(ROOT)}:{function.lineno}: {function.name}"
        for path in _source_files()
        if path.relative_to(ROOT).parts[0] in ("mamba_jax", "pallas_kernels")
        for function in _outer_functions(ast.parse(path.read_text()))
        if _lines(function) >= SILENT_LINES and not ast.get_docstring(function) and not function.name.startswith("__")
    ]
    assert not silent, "no docstring: " + ", ".join(silent)


def _folders() -> list[Path]:
    return sorted({path.parent for path in _source_files()} - {ROOT})


def test_folders_are_small() -> None:
    for folder in _folders():
        names = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
        assert len(names) <= MAX_MODULES, f"{folder} has {len(names)} modules, limit {MAX_MODULES}: {names}"


# They put mixers together, so they name them.
_COMPOSED = ("mamba_jax/models/layouts", "mamba_jax/models/mixers/with_shared")


def test_only_its_folder_and_one_line_name_a_mixer() -> None:
    mixers = ROOT / "mamba_jax" / "models" / "mixers"
    for folder in (path for path in mixers.iterdir() if (path / "__init__.py").is_file()):
        named = re.compile(rf"mixers\.{folder.name}\b|[\"']{folder.name}[\"']|\b{folder.name}config\b", re.IGNORECASE)
        for path in (ROOT / "mamba_jax").rglob("*.py"):
            elsewhere = not any(path.is_relative_to(place) for place in (folder, *(ROOT / part for part in _COMPOSED)))
            if elsewhere and path != mixers / "__init__.py":
                assert not named.search(path.read_text()), f"{path} names the mixer {folder.name}"


def repeats(files: list[Path]) -> list[tuple[str, str, int]]:
    """Pairs of places with six or more equal lines in a row, each as (place, place, lines).

    Lines count without indentation; empty lines, comments and imports do not count. A run of equal lines is one pair
    however long it is. Three places that say the same are three pairs.
    """
    numbered = []
    for path in files:
        source = path.read_text()
        imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
        left_out = {line for node in imports for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
        for number, line in enumerate(source.splitlines(), start=1):
            if number not in left_out and line.strip() and not line.strip().startswith("#"):
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
