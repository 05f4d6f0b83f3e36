"""Text folders: order, held-out split, long files, and one line for every kind of bad input."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mamba_jax.config import TextFolderSource
from mamba_jax.data import sources
from mamba_jax.data.sources import open_documents
from mamba_jax.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.txt", "a.txt", "sub/c.txt", "notes.md"):
        path = tmp_path / "text" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {name}, é")
    return tmp_path / "text"


def texts(source: TextFolderSource) -> list[str]:
    documents = [""]
    for piece in open_documents(source).pieces():
        assert piece.num_bytes == len(piece.text.encode())
        documents[-1] += piece.text
        if piece.ends_document:
            documents.append("")
    assert documents.pop() == ""
    return documents


def test_files_come_sorted_by_name(folder: Path) -> None:
    source = TextFolderSource(path=str(folder))
    assert texts(source) == ["text of a.txt, é", "text of b.txt, é", "text of sub/c.txt, é"]
    assert texts(TextFolderSource(path=str(folder), pattern="*.md")) == ["text of notes.md, é"]
    assert open_documents(source).total == sum(len(text.encode()) for text in texts(source))


def test_package_is_found_without_importing_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = folder.parent / "speeches_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "data").mkdir()
    (package / "data" / "x.txt").write_text("hello")
    monkeypatch.syspath_prepend(str(folder.parent))
    assert texts(TextFolderSource(package="speeches_package", path="data")) == ["hello"]


def test_parts_split_all_files_and_stay_when_files_are_added(tmp_path: Path) -> None:
    def part(name: str) -> set[str]:
        return set(texts(TextFolderSource(path=str(tmp_path), part=name, validation_fraction=0.25)))

    for i in range(200):
        (tmp_path / f"{i}.txt").write_text(f"file {i}")
    train, validation = part("train"), part("validation")
    assert not train & validation
    assert len(train | validation) == 200
    assert 30 <= len(validation) <= 70
    for i in range(200, 400):
        (tmp_path / f"{i}.txt").write_text(f"file {i}")
    assert train < part("train")
    assert validation < part("validation")


@pytest.mark.parametrize("piece_bytes", [1, 2, 3, 5, 16, 10_000])
def test_long_files_come_in_pieces_that_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int) -> None:
    monkeypatch.setattr(sources, "_PIECE_BYTES", piece_bytes)
    text = "eins\n\nzwei é 漢字 🐍\r\ndrei" * 7 + "x" * 40 + "\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert texts(TextFolderSource(path=str(tmp_path))) == [text]


def test_pieces_end_at_line_breaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_PIECE_BYTES", 16)
    (tmp_path / "a.txt").write_text("a short line\n" * 20)
    pieces = list(open_documents(TextFolderSource(path=str(tmp_path))).pieces())
    assert len(pieces) > 5
    assert all(piece.text.endswith("\n") for piece in pieces)


def write_latin1(folder: Path) -> None:
    (folder / "b.txt").write_bytes(b"x" * 37 + "é".encode("latin-1") + b" y")


@pytest.mark.parametrize(
    ("damage", "fields", "expected"),
    [
        (lambda folder: None, {"path": "no/such"}, "no text folder 'no/such'"),
        (lambda folder: None, {"package": "no_such_package"}, "no package 'no_such_package' is installed"),
        (lambda folder: None, {"package": "no_such.package"}, "no package 'no_such.package' is installed"),
        (lambda folder: None, {"pattern": "*.doc"}, r"no file in .* matches '\*\.doc'"),
        (lambda folder: None, {"pattern": "/etc/*"}, "is no relative glob"),
        (lambda folder: None, {"pattern": ""}, "is no relative glob"),
        (
            lambda folder: None,
            {"part": "validation", "validation_fraction": 0.0},
            "none of the 3 files .* falls in the 'validation' part at validation_fraction=0.0",
        ),
        (lambda folder: (folder / "b.txt").write_text(""), {}, r"b\.txt is empty"),
        (write_latin1, {}, r"b\.txt is not UTF-8 text: invalid continuation byte at byte 37"),
        (lambda folder: (folder / "b.txt").write_bytes("é".encode()[:1]), {}, "unexpected end of data at byte 0"),
    ],
)
@pytest.mark.parametrize("piece_bytes", [7, 2**20])
def test_bad_folders_get_one_line(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], None],
    fields: dict[str, object],
    expected: str,
    piece_bytes: int,
) -> None:
    monkeypatch.setattr(sources, "_PIECE_BYTES", piece_bytes)
    damage(folder)
    with pytest.raises(InputError, match=expected) as raised:
        texts(TextFolderSource(**{"path": str(folder), **fields}))
    assert "\n" not in str(raised.value)
