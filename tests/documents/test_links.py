"""Every file, section and target of `make` that a document names is there."""

import re
from pathlib import Path

import pytest

from tests.documents.pages import PAGES, ROOT, blocks

FILES = {
    path.name
    for folder in ("benchmarks", "configs", "docs", "mamba_jax", "pallas_kernels", "tests")
    for path in (ROOT / folder).rglob("*.*")
} | {path.name for path in ROOT.glob("*.*")}
# CONTRIBUTING.md says that there is none.
ABSENT = {"utils.py"}
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def anchors(page: str) -> set[str]:
    """What a link to a section of a page ends in: its heading in small letters, words joined by hyphens."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", page, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: str) -> list[tuple[str, str]]:
    """The file and the section of every link that does not leave the project; one of them may be empty."""
    return re.findall(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)", page)


def named_files(page: str) -> list[str]:
    """What a page names in code type: documents, Python files, and everything in a folder of the project."""
    own = r"(?:benchmarks|configs|docs|mamba_jax|pallas_kernels|tests|\.ci)/[\w./-]+"
    return re.findall(rf"(?<=`)({own}|[\w-]+\.(?:md|py))(?=[` ])", page)


@pytest.mark.parametrize("name", PAGES)
def test_links(name: str) -> None:
    for file, section in links(PAGES[name]):
        target = ROOT / name if not file else (ROOT / name).parent / file
        assert target.exists(), f"{name} links to {file}"
        assert not section or section in anchors(target.read_text()), f"{name} links to {file}#{section}"


@pytest.mark.parametrize("name", PAGES)
def test_named_files(name: str) -> None:
    for file in named_files(PAGES[name]):
        # A folder in capitals stands for any.
        is_there = any(ROOT.glob(re.sub(r"/[A-Z]+/", "/*/", file))) if "/" in file else file in FILES
        assert is_there or file in ABSENT, f"{name} names {file}"


@pytest.mark.parametrize("name", PAGES)
def test_targets(name: str) -> None:
    typed = re.findall(r"^(make .*)$", "\n".join(blocks(PAGES[name], "")), re.MULTILINE)
    for command in typed + re.findall(r"`(make [^`]+)`", PAGES[name]):
        targets = [word for word in command.split()[1:] if "=" not in word]
        assert TARGETS.issuperset(targets), f"{name} says {command}"


def test_what_is_not_there_is_found(tmp_path: Path) -> None:
    page = "# A page\n[one](none.md) [two](#a-page) [three](#gone) `docs/none.md` `none.py` `runs/none`\n"
    assert links(page) == [("none.md", ""), ("", "a-page"), ("", "gone")]
    assert anchors(page) == {"a-page"}
    assert named_files(page) == ["docs/none.md", "none.py"]
