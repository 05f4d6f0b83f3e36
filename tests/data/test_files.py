"""The source of files: every format, packed or not, its held-out part, and one line for every kind of bad input."""

import gzip
import json
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from mamba_jax.config import FilesSource
from mamba_jax.data.sources import files, json_lines, text_pieces
from mamba_jax.data.sources.files import Files
from mamba_jax.errors import InputError

RECORDS = [{"text": f"the text of number {i}, é\nand its second line", "title": f"T{i}", "n": i} for i in range(40)]


def as_lines(records: list[Any]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def packed_zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACKED: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": packed_zstd}


def write_table(path: Path, records: list[Any], **options: Any) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path, **options)


def texts(path: Path | str, **fields: Any) -> list[str]:
    """The documents of a source, put together from their pieces."""
    reader = FilesSource(path=str(path), **fields).open()
    documents, amount = [""], 0
    for piece in reader.pieces():
        assert piece.num_bytes == len(piece.text.encode())
        documents[-1] += piece.text
        amount += piece.amount or 0
        if piece.ends_document:
            documents.append("")
    assert documents.pop() == ""
    assert amount <= reader.total
    return documents


@pytest.mark.parametrize("packing", PACKED)
def test_json_lines(tmp_path: Path, packing: str) -> None:
    path = tmp_path / f"a.jsonl{packing}"
    path.write_bytes(
        PACKED[packing](b"\xef\xbb\xbf" + as_lines(RECORDS[:20]) + b" \n\r\n" + as_lines(RECORDS[20:])[:-1])
    )
    assert texts(path) == [record["text"] for record in RECORDS]
    assert texts(path, template=r"{title} ({n}):\n{{{text}}}")[3] == "T3 (3):\n{" + RECORDS[3]["text"] + "}"


@pytest.mark.parametrize("packing", PACKED)
def test_text_is_one_document_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: str) -> None:
    monkeypatch.setattr(files, "PIECE_BYTES", 1000)
    text = "the thing, é\n" * 500
    (tmp_path / f"a.txt{packing}").write_bytes(PACKED[packing](text.encode()))
    (tmp_path / f"b.md{packing}").write_bytes(PACKED[packing](b"another"))
    assert texts(tmp_path) == [text, "another"]
    assert len(list(FilesSource(path=str(tmp_path)).open().pieces())) > 5


def test_tables_are_read_by_their_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mamba_jax.data.sources.parquet._BATCH_BYTES", 500)
    write_table(tmp_path / "a.parquet", RECORDS, row_group_size=7, use_dictionary=True)
    assert texts(tmp_path / "a.parquet") == [record["text"] for record in RECORDS]
    assert texts(tmp_path / "a.parquet", template="{n} {title}")[-1] == "39 T39"


def test_long_documents_come_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_pieces, "PIECE_BYTES", 100)
    (tmp_path / "a.jsonl").write_bytes(as_lines([{"text": "the thing, é\n" * 50}, {"text": ""}, {"text": "x" * 100}]))
    pieces = list(FilesSource(path=str(tmp_path / "a.jsonl")).open().pieces())
    assert texts(tmp_path / "a.jsonl") == ["the thing, é\n" * 50, "x" * 100]
    assert [piece.ends_document for piece in pieces][-2:] == [True, True]
    assert all(piece.text.endswith("\n") and len(piece.text) <= 100 for piece in pieces[:-1])
    assert [piece.continues for piece in pieces].count(False) == 2


def test_folders_and_globs_name_files_of_any_format(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.jsonl").write_bytes(as_lines(RECORDS[:2]))
    (tmp_path / "b.txt").write_text("plain")
    (tmp_path / ".hidden").write_text("no data")
    write_table(tmp_path / "sub" / "c.parquet", RECORDS[2:3])
    assert texts(tmp_path) == ["plain", *(record["text"] for record in RECORDS[:3])]
    assert texts(f"{tmp_path}/**/*.jsonl") == [record["text"] for record in RECORDS[:2]]
    assert texts(f"{tmp_path}/s*/[c].parquet") == [RECORDS[2]["text"]]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt", "a.txt.gz", "a.parquet"])
@pytest.mark.parametrize("fraction", [0.25, 0.001])
def test_of_one_file_the_end_is_held_out(tmp_path: Path, name: str, fraction: float) -> None:
    path = tmp_path / name
    if name == "a.parquet":
        write_table(path, RECORDS, row_group_size=9)
    else:
        text = "".join(record["text"] + "\n" for record in RECORDS).encode()
        path.write_bytes(
            PACKED[path.suffix if path.suffix in PACKED else ""](text if "txt" in name else as_lines(RECORDS))
        )
    fields: dict[str, Any] = {"validation_fraction": fraction}
    train, validation = (texts(path, part=part, **fields) for part in ("train", "validation"))
    if "txt" in name:
        assert "".join(train + validation) == "".join(texts(path))
        assert 0.5 * fraction < len(validation[0]) / len(texts(path)[0]) < 1.5 * fraction
    else:
        assert train + validation == texts(path)
        # Lines of the same number are not all of the same length.
        assert len(validation) in {0.25: (9, 10), 0.001: (1,)}[fraction]
    note = FilesSource(path=str(path), part="train", **fields).open().note
    assert note == f"{path}: held out is the end of the file, its last {100 * fraction:g} %"


def test_of_many_files_whole_ones_are_held_out(tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / f"{i:02}.jsonl").write_bytes(as_lines([RECORDS[i]]))
    train, validation = (texts(tmp_path, part=part, validation_fraction=0.3) for part in ("train", "validation"))
    assert sorted(train + validation) == sorted(texts(tmp_path))
    assert 4 < len(validation) < 20
    assert FilesSource(path=str(tmp_path), part="train", validation_fraction=0.3).open().note == ""


def test_a_single_document_cannot_be_held_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(as_lines(RECORDS[:1]))
    assert texts(tmp_path, part="train") == [RECORDS[0]["text"]]
    with pytest.raises(InputError, match=r"none of the 1 files in .* falls in the 'validation' part"):
        texts(tmp_path, part="validation")


def test_copies_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(as_lines([*RECORDS, *RECORDS[:7], {"text": "plain"}]))
    (tmp_path / "b.txt").write_text("plain")
    (tmp_path / "c.txt").write_text("plain text")
    reader = FilesSource(path=str(tmp_path), deduplicate="exact").open()
    for _ in range(2):
        assert sum(piece.ends_document for piece in reader.pieces()) == 42
        assert reader.left_out == "8 documents that are copies of another were left out"
    assert texts(tmp_path, deduplicate="exact")[-2:] == ["plain", "plain text"]


BAD_LINES = {
    b'{"text": "cut': "is not JSON: Unterminated string starting at character 10",
    b'[{"text": "a"},': "(a file has to hold one whole object a line)",
    b'{"text": "\xff"}': "is not UTF-8 text: invalid start byte at byte 10 of the line",
    b'"text"': "is no JSON object but str: write one object a line",
    b'{"body": "a", "id": 3}': "has no field 'text', but 'body', 'id'",
    b'{"text": null}': "has null in its field 'text'",
    b'{"text": ["a"]}': "has no text but list in its field 'text'",
    b'{"text": "a\\ud800"}': "holds a lone surrogate at character 1",
    b'{"text": "' + b"a" * 5000 + b'"}': "has more than 5,000 bytes",
    b"[" * 4900: "is not JSON",
}


@pytest.mark.parametrize("line", BAD_LINES)
@pytest.mark.parametrize("packing", ["", ".gz"])
def test_bad_lines_are_named_or_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: bytes, packing: str
) -> None:
    monkeypatch.setattr(json_lines, "MAX_LINE", 5000)
    path = tmp_path / f"a.jsonl{packing}"
    path.write_bytes(PACKED[packing](as_lines(RECORDS) + line + b"\n" + as_lines(RECORDS[:2])))
    for part in ("all", "validation"):
        fields: dict[str, Any] = {"path": str(path), "part": part, "validation_fraction": 0.75}
        with pytest.raises(InputError) as error:
            list(FilesSource(**fields).open().pieces())
        message = str(error.value)
        assert message.startswith(f"{path} line 41 ")
        assert BAD_LINES[line] in message
        assert message.endswith("; mend it, or pass such records over and have them counted by --skip-bad")
        reader = FilesSource(**fields, skip_bad=True).open()
        found = [piece.text for piece in reader.pieces()]
        assert found[-3:] == [RECORDS[i]["text"] for i in (39, 0, 1)]
        assert reader.left_out.startswith(f"1 bad records were passed over, the first: {path} line 41 ")


@pytest.mark.parametrize(
    ("name", "content", "fields", "expected"),
    [
        ("a.csv", b"text\nx\n", {}, "is a table of separated values, which is not read: convert it by `python -c"),
        ("a.tsv.gz", b"text\nx\n", {}, "convert it by `gzip -dc "),
        ("a.tar.gz", b"x", {}, "is none of the formats that are read"),
        ("a.pdf", b"x", {}, "by its suffix .pdf: unpack or convert it, or exclude it by a glob"),
        ("a.parquet.gz", b"x", {}, "by its suffix .parquet"),
        ("a.txt", b"", {}, "is empty: remove it, or exclude it by a glob"),
        ("a.txt", b"caf\xe9", {}, "a.txt is not UTF-8 text: unexpected end of data at byte 3"),
        (
            "a.txt.gz",
            b"no gzip",
            {},
            "is damaged or cut short (Not a gzipped file (b'no')): fetch or compress it again",
        ),
        (
            "a.txt.gz",
            gzip.compress(bytes(1000), mtime=0)[:-12],
            {},
            "is damaged or cut short (Compressed file ended before",
        ),
        ("a.jsonl.zst", packed_zstd(bytes(1000))[:-4], {}, "is damaged or cut short (Truncated compressed stream)"),
        ("a.jsonl.zst", b"no zstd", {}, "is damaged or cut short (ZSTD decompress failed"),
        ("a.parquet", b"no table", {}, "a.parquet is no parquet table that can be read: "),
        ("a.jsonl", b" \n", {}, "holds no text in its 'all' part: look at what it holds"),
        ("a.jsonl", b"{}\n", {"template": "text"}, "template 'text' names no field: write one in braces"),
        ("a.jsonl", b"{}\n", {"template": "{text"}, "is no text with fields in braces: expected '}'"),
        ("a.jsonl", b"{}\n", {"template": "{text:>9}"}, "may have nothing but names of fields in its braces"),
        ("a.jsonl", b"{}\n", {"template": "{}"}, "may have nothing but names of fields in its braces"),
    ],
)
def test_bad_files_get_one_line(
    tmp_path: Path, name: str, content: bytes, fields: dict[str, Any], expected: str
) -> None:
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(InputError) as error:
            texts(path, **fields)
        assert expected in str(error.value)


def test_bad_paths_get_one_line(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path / "*.jsonl", tmp_path, "\0"):
        with pytest.raises(
            InputError, match=r"there is no file, no folder with files and no match of a glob|null byte"
        ):
            texts(path)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="link is a pipe, a socket, a device or a link to nothing"):
        texts(tmp_path / "link")


def test_tables_must_go_together(tmp_path: Path) -> None:
    write_table(tmp_path / "a.parquet", RECORDS)
    with pytest.raises(InputError, match=r"a\.parquet has no column 'body': set text_field .*, text, title, n"):
        texts(tmp_path, text_field="body")
    with pytest.raises(InputError, match=r"a\.parquet row 1 has no text but int in its field 'n'"):
        texts(tmp_path, text_field="n")
    write_table(tmp_path / "b.parquet", [{"text": 3}])
    with pytest.raises(InputError) as error:
        texts(tmp_path)
    message = f"column 'text' is string in {tmp_path}/a.parquet and int64 in {tmp_path}/b.parquet"
    assert message in str(error.value)
    write_table(tmp_path / "b.parquet", [{"text": "a"}, {"text": None}, {"text": "b"}])
    assert texts(tmp_path, skip_bad=True)[-2:] == ["a", "b"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.jsonl.gz", "a.parquet"])
def test_a_file_that_changes_is_noticed(tmp_path: Path, name: str) -> None:
    path = tmp_path / name

    def write(count: int) -> None:
        if name == "a.parquet":
            write_table(path, RECORDS[:count])
        else:
            path.write_bytes(PACKED[".gz" if path.suffix == ".gz" else ""](as_lines(RECORDS[:count])))

    write(20)
    reader = Files(FilesSource(path=str(path)))
    before = reader.identity
    write(30)
    assert Files(FilesSource(path=str(path))).identity != before
    with pytest.raises(InputError, match="was changed while it was read: start again"):
        list(reader.pieces())


def test_the_command_for_a_table_of_separated_values_converts_it(tmp_path: Path) -> None:
    path = tmp_path / "the table.csv"
    path.write_text('text,n\n"a ""b"", é\nc",3\n')
    with pytest.raises(InputError) as error:
        texts(path)
    command = str(error.value).split("`")[1]
    assert shlex.split(command)[0] == "python"
    subprocess.run(command, shell=True, check=True)
    assert texts(tmp_path / "the table.jsonl", template="{text} {n}") == ['a "b", é\nc 3']
