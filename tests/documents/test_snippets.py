"""The Python that a document shows runs, and arrays have the shapes in its comments."""

import re
from pathlib import Path

import pytest

import mamba_jax.config
from tests.documents.pages import PAGES, ROOT, blocks
from tests.evaluation.conftest import SavedRun
from tests.toys.mixer import EmaConfig

# What fills a page to be copied into a file of its own is compared with that file by the tests of its kind.
TOYS = {path.read_text() for path in (ROOT / "tests" / "toys").glob("*.py")}
SNIPPETS = [
    pytest.param(snippet, id=f"{name} {number}")
    for name, page in PAGES.items()
    for number, snippet in enumerate(blocks(page, "python"))
    if snippet not in TOYS
]


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets(snippet: str, saved_run: SavedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(saved_run.folder)
    monkeypatch.chdir(tmp_path)
    # What a config file imports, and the mixer of the page that shows how to add one.
    names = {**vars(mamba_jax.config), "EmaConfig": EmaConfig}
    exec(snippet, names)
    for name, value, shape in re.findall(r"^(?:(\w+) = )?(\S.*?)  # (\([\d, ]+\))", snippet, re.MULTILINE):
        assert str(eval(name or value, names).shape) == shape
