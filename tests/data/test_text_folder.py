"""Text folders: order, held-out split, long files, and one line for every kind of bad input."""

import contextlib
import errno
import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from mamba_jax.config import TextFolderSource
from mamba_jax.data.sources import text_folder, text_pieces
from mamba_jax.data.sources.held_out import is_held_out as _is_held_out
from mamba_jax.data.sources.text_files import find_files
from mamba_jax.data.sources.text_folder import TextFolder as open_documents
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


def test_a_dotted_package_is_found_without_importing_the_one_above(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("above_package", "above_package/below"):
        (folder.parent / name).mkdir()
        (folder.parent / name / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder.parent / "above_package" / "below" / "x.txt").write_text("hello")
    monkeypatch.syspath_prepend(str(folder.parent))
    assert texts(TextFolderSource(package="above_package.below", path=".")) == ["hello"]
    assert not any(name.startswith("above_package") for name in sys.modules)
    for package in ("above_package.other", "above_package.x.y", "os", "os.path", "above_package/below", ""):
        with pytest.raises(InputError, match=r"no package .* is installed"):
            open_documents(TextFolderSource(package=package, path="."))


def test_links_to_folders_are_followed_and_loops_end(folder: Path) -> None:
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "d.txt").write_text("text of d.txt, é")
    (outside / "loop").symlink_to(folder)
    (folder / "sub" / "out").symlink_to(outside)
    (folder / "sub" / "up").symlink_to("..")
    (folder / "again").symlink_to("sub")
    (folder / "e.txt").symlink_to("a.txt")
    found = ["a.txt", "b.txt", "e.txt", "sub/c.txt", "sub/out/d.txt"]
    assert find_files(folder, "**/*.txt") == find_files(folder, "**/**/./*.txt") == found
    assert find_files(folder, "again/*.txt") == ["again/c.txt"]
    assert find_files(folder, "*/out/*") == ["sub/out/d.txt"]


@pytest.mark.parametrize(
    "pattern",
    ["**/*.txt", "*.txt", "*", "**/*", "**", "sub/*", "*/*.txt", "**/sub/**/*.txt", "**/.*", "[ab].txt", "?.t*"],
)
def test_patterns_are_those_of_pathlib(folder: Path, pattern: str) -> None:
    for name in (".hidden.txt", ".git/x.txt", "sub/sub/deep/y.txt", "folder.txt/z.md", "[ab].txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    expected = sorted(path.relative_to(folder).as_posix() for path in folder.glob(pattern) if path.is_file())
    assert find_files(folder, pattern) == expected


def test_names_that_are_no_utf8_or_hold_line_breaks(folder: Path) -> None:
    for name in (b"\xff.txt", "é\n\x1b[31m.txt".encode()):
        (folder / os.fsdecode(name)).write_text("odd")
    parts = [TextFolderSource(path=str(folder), part=part, validation_fraction=0.5) for part in ("train", "validation")]
    assert sorted(text for part in parts for text in texts(part)) == sorted(texts(TextFolderSource(path=str(folder))))
    json.dumps(open_documents(parts[0]).identity).encode("ascii")
    for name in (b"\xff.txt", "é\n\x1b[31m.txt".encode()):
        (folder / os.fsdecode(name)).write_bytes(b"\xff")
        with pytest.raises(InputError, match=r"(é \\x1b\[31m|\\udcff)\.txt is not UTF-8 text") as raised:
            texts(TextFolderSource(path=str(folder), pattern=os.fsdecode(name).replace("[", "?")))
        assert str(raised.value).isprintable()


@pytest.mark.parametrize(
    "suffix", [".jsonl", ".JSONL", ".json", ".csv", ".parquet", ".gz", ".zst", ".xz", ".arrow", ".pdf"]
)
def test_what_is_no_prose_is_refused(folder: Path, suffix: str) -> None:
    (folder / "sub" / f"x.txt{suffix}").write_text('{"text": "prose"}')
    with pytest.raises(
        InputError, match=rf"x\.txt\{suffix} is not plain text by its suffix .*: read JSON lines, parquet and"
    ):
        open_documents(TextFolderSource(path=str(folder), pattern="**/*"))
    assert len(texts(TextFolderSource(path=str(folder)))) == 3


def test_code_is_text(folder: Path) -> None:
    for name in ("x.py", "x.md", "x.html", "x.c", "Makefile", "x.en", "x.pt", "x.tex"):
        (folder / name).write_text(name)
    assert len(texts(TextFolderSource(path=str(folder), pattern="**/*"))) == 12


@pytest.mark.parametrize(("files", "fraction"), [(1, 0.1), (1, 0.9), (5, 0.05), (3, 0.5), (2, 0.001)])
@pytest.mark.parametrize("line", ["what light through yonder window breaks\n", "wherefore ", "漢字é"])
def test_few_files_are_cut_in_two(tmp_path: Path, files: int, fraction: float, line: str) -> None:
    names = [f"{i}.txt" for i in range(3000) if _is_held_out(f"{i}.txt", fraction) == (fraction > 0.5)]
    for name in names[:files]:
        (tmp_path / name).write_text(line * 3000)

    def part(name: Literal["train", "validation"]) -> list[str]:
        return texts(TextFolderSource(path=str(tmp_path), part=name, validation_fraction=fraction))

    train, validation = part("train"), part("validation")
    assert len(train) == len(validation) == files
    assert [a + b for a, b in zip(train, validation, strict=True)] == [line * 3000] * files
    for text in validation:
        assert abs(len(text) - 3000 * len(line) * fraction) <= len(line) / 2
        assert text.startswith(line.rstrip() if line.isascii() else ("漢", "字", "é"))
    # A further file on the same side changes nothing for those that are there.
    (tmp_path / names[files]).write_text("another file\n" * 2000)
    assert set(train) <= set(part("train"))
    assert set(validation) <= set(part("validation"))


def test_names_decide_as_soon_as_they_can(tmp_path: Path) -> None:
    """`input.txt` is held out by its name at this fraction, `b.txt` is not."""
    assert [_is_held_out(name, 0.1) for name in ("input.txt", "b.txt")] == [True, False]
    for name in ("input.txt", "b.txt"):
        (tmp_path / name).write_text(name * 100)
    for part, name in (("train", "b.txt"), ("validation", "input.txt")):
        assert texts(TextFolderSource(path=str(tmp_path), part=part, validation_fraction=0.1)) == [name * 100]


def test_a_file_too_short_to_be_cut_is_not(tmp_path: Path) -> None:
    (tmp_path / "input.txt").write_text("é")
    assert texts(TextFolderSource(path=str(tmp_path), part="train", validation_fraction=0.1)) == ["é"]
    with pytest.raises(InputError, match=r"none of the 1 files .* falls in the 'validation' part"):
        open_documents(TextFolderSource(path=str(tmp_path), part="validation", validation_fraction=0.1))


def test_parts_split_all_files_and_stay_when_files_are_added(tmp_path: Path) -> None:
    def part(name: Literal["train", "validation"]) -> set[str]:
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
    monkeypatch.setattr(text_folder, "PIECE_BYTES", piece_bytes)
    text = "eins\n\nzwei é 漢字 🐍\r\ndrei" * 7 + "x" * 40 + "\n"
    if piece_bytes == 10_000:
        text *= 100
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert texts(TextFolderSource(path=str(tmp_path))) == [text]


def test_pieces_end_at_line_breaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_folder, "PIECE_BYTES", 16)
    (tmp_path / "a.txt").write_text("a short line\n" * 21)
    pieces = list(open_documents(TextFolderSource(path=str(tmp_path))).pieces())
    assert [piece.continues for piece in pieces] == [False] + [True] * (len(pieces) - 1)
    assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert len(pieces) > 5
    assert sum(piece.text.endswith("\n") for piece in pieces) > 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one\ntwo\nthree", "one\ntwo\n"),
        ("one two\n\nthree", "one"),
        ("one two\n  three", "one"),
        ("one two\r\nthree", "one"),
        ("one\n\nthree", "one\n\n"),
        ("漢字漢字", "漢字漢字"),
    ],
)
def test_pieces_end_where_tokens_do(text: str, expected: str) -> None:
    assert text[: text_pieces.cut(text)] == expected


def test_a_file_that_changes_while_it_is_read_is_refused(folder: Path) -> None:
    documents = open_documents(TextFolderSource(path=str(folder)))
    (folder / "b.txt").write_text("other text, but of another length")
    with pytest.raises(InputError, match=r"b\.txt was changed while it was read: start again"):
        list(documents.pieces())
    documents = open_documents(TextFolderSource(path=str(folder)))
    (folder / "sub" / "c.txt").unlink()
    with pytest.raises(InputError, match=r"cannot read .*c\.txt: No such file or directory"):
        list(documents.pieces())


@pytest.mark.parametrize("function", ["scandir", "stat"])
def test_storage_that_cannot_be_read_gets_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    real = getattr(os, function)

    def fail(path: Any, *args: Any, **kwargs: Any) -> Any:
        if "sub" in os.fspath(path):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(InputError, match=r"cannot read (folder )?.*sub.*: Permission denied"):
        open_documents(TextFolderSource(path=str(folder)))


def test_files_without_permission_are_named_before_anything_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests may run as root, who may read everything."""
    monkeypatch.setattr(os, "access", lambda path, mode: "c.txt" not in os.fspath(path))
    with pytest.raises(InputError, match=r"cannot read .*c\.txt: Permission denied"):
        open_documents(TextFolderSource(path=str(folder)))


def bind_socket(folder: Path) -> None:
    with contextlib.chdir(folder), socket.socket(socket.AF_UNIX) as end:
        end.bind("d.txt")


def write_latin1(folder: Path) -> None:
    (folder / "b.txt").write_bytes(b"x" * 37 + "é".encode("latin-1") + b" y")


@pytest.mark.parametrize(
    ("damage", "fields", "expected"),
    [
        (lambda folder: None, {"path": "no/such"}, "no text folder 'no/such'"),
        (lambda folder: None, {"package": "no_such_package"}, "no package 'no_such_package' is installed"),
        (lambda folder: None, {"package": "no_such.package"}, "no package 'no_such.package' is installed"),
        (lambda folder: None, {"pattern": "*.doc"}, r"no file in .* matches '\*\.doc'"),
        (lambda folder: None, {"pattern": "/etc/*"}, "is not a relative glob"),
        (lambda folder: None, {"pattern": ""}, "is not a relative glob"),
        (lambda folder: None, {"pattern": "../*.txt"}, "is not a relative glob"),
        (lambda folder: None, {"pattern": "**.txt"}, "is not a relative glob"),
        (
            lambda folder: (folder / "d.txt").symlink_to("gone"),
            {},
            r"d\.txt is a link that leads nowhere: No such file",
        ),
        (lambda folder: (folder / "lost").symlink_to("/gone"), {}, "lost is a link that leads nowhere: No such file"),
        (lambda folder: (folder / "d").symlink_to("d"), {}, "d is a link that leads nowhere: Too many levels"),
        (lambda folder: os.mkfifo(folder / "d.txt"), {}, r"d\.txt is a pipe, a socket or a device"),
        (lambda folder: (folder / "d.txt").symlink_to("/dev/zero"), {}, r"d\.txt is a pipe, a socket or a device"),
        (bind_socket, {}, r"d\.txt is a pipe, a socket or a device"),
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
    damage: Callable[[Path], object],
    fields: dict[str, Any],
    expected: str,
    piece_bytes: int,
) -> None:
    monkeypatch.setattr(text_folder, "PIECE_BYTES", piece_bytes)
    damage(folder)
    given: dict[str, Any] = {"path": str(folder)} | fields
    with pytest.raises(InputError, match=expected) as raised:
        texts(TextFolderSource(**given))
    assert "\n" not in str(raised.value)
