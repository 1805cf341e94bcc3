"""Documents of files: every form and compression gives back what was written; damaged files are named with the line."""

import bz2
import gzip
import json
import lzma
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from stellarbyte.train.config.sources import Source
from stellarbyte.train.data import files as files_module
from stellarbyte.train.data import sources as sources_module
from stellarbyte.train.data.files import files_of
from stellarbyte.train.data.sources import DocumentReader
from stellarbyte.train.errors import TrainError

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pyarrow.compress(content, "zstd", asbytes=True),
}


def texts_of(folder: Path, name: str, **options: Any) -> list[str]:
    (file,) = files_of([Source(files=[str(folder / name)], **options)])
    with DocumentReader(file) as reader:
        return [document.text for document in reader]


def write(folder: Path, name: str, texts: list[str], indent: int | None) -> None:
    """In the form that the name says. Oracles are json's and pyarrow's own writers."""
    rows = [{"text": text, "number": number} for number, text in enumerate(texts)]
    stem, _, ending = name.partition(".")
    form, _, compression = ending.partition(".")
    if form == "parquet":
        table = pyarrow.table({"number": list(range(len(texts))), "text": pyarrow.array(texts, pyarrow.string())})
        parquet.write_table(table, folder / name, row_group_size=3)
        return
    content = {
        "jsonl": "".join(json.dumps(row, ensure_ascii=bool(indent)) + "\n" * (1 + (indent or 0)) for row in rows),
        "json": json.dumps(rows, indent=indent),
        "txt": "<|end|>".join(texts),
    }[form]
    compress = COMPRESS["." + compression if compression else ""]
    (folder / name).write_bytes(compress(content.encode()))
    assert stem


@pytest.mark.parametrize("piece_bytes", [1, 5, 1 << 20])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.parquet"])
def test_every_document_comes_back(name: str, piece_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "PIECE_BYTES", piece_bytes)

    @settings(max_examples=30)
    @given(
        st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r<"))), st.none() | st.just(2)
    )
    def check(texts: list[str], indent: int | None) -> None:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), name, texts, indent)
            options = {"separator": "<|end|>"} if name.endswith(".txt") else {}
            texts = ["".join(texts)] if name.endswith(".txt") and texts == [] else texts
            if name.endswith(".txt") and texts:
                texts[0] = texts[0].removeprefix("\ufeff")  # a byte-order mark
            assert texts_of(Path(folder), name, **options) == [text for text in texts if text.strip()]

    check()


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("form", ["jsonl", "json", "txt"])
def test_compressed_files(form: str, compression: str, tmp_path: Path) -> None:
    texts = [f"{number} 春眠不覺曉 " * 50 for number in range(200)]
    write(tmp_path, f"a.{form}{compression}", texts, None)
    options = {"separator": "<|end|>"} if form == "txt" else {}
    assert texts_of(tmp_path, f"a.{form}{compression}", **options) == texts


@pytest.mark.parametrize("compression", [".gz", ".bz2", ".xz", ".zst"])
def test_several_compressed_parts_in_one_file(compression: str, tmp_path: Path) -> None:
    compress = COMPRESS[compression]
    (tmp_path / f"a.txt{compression}").write_bytes(compress(b"one\n") + compress(b"two\n"))
    assert texts_of(tmp_path, f"a.txt{compression}") == ["one\ntwo\n"]


@pytest.mark.parametrize("compression", [".gz", ".bz2", ".xz", ".zst"])
def test_a_shortened_or_damaged_file_is_no_shorter_text(compression: str, tmp_path: Path) -> None:
    content = COMPRESS[compression](b"".join(b"%d\n" % (number**5) for number in range(1000)))
    file = tmp_path / f"a.txt{compression}"
    for damaged in (content[: len(content) * 2 // 3], content[:-1], b"no" + content):
        file.write_bytes(damaged)
        with pytest.raises(TrainError) as caught:
            texts_of(tmp_path, file.name, separator="\n")
        assert str(caught.value).startswith(f"{file}, line ")
        assert " cannot be read: " in str(caught.value)


def test_fields_and_templates(tmp_path: Path) -> None:
    rows = [{"t": "題", "meta": {"by": "李白"}, "lines": ["一", "二"]}]
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.json", "a.parquet"):
        assert texts_of(tmp_path, name, field="lines") == ["一\n二"]
        assert texts_of(tmp_path, name, field="meta.by") == ["李白"]
        assert texts_of(tmp_path, name, template="{{{t}}}\n{meta.by}：{lines}。") == ["{題}\n李白：一\n二。"]


@pytest.mark.parametrize("template", ["no field", "{}", "{title!r}", "{title:5}", "{title", "title}"])
def test_templates_that_are_none(template: str) -> None:
    with pytest.raises(ValueError, match="template"):
        Source(files=["a"], template=template)


def test_line_ends_and_a_byte_order_mark_are_those_of_unix(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n\r\nthree\rfour")
    assert texts_of(tmp_path, "a.txt", separator="\n\n") == ["one\ntwo", "three\nfour"]


BAD_LINES = [
    ("a.jsonl", b'{"text": "a"}\n\n{"text": }\n', {}, "line 3 is not valid JSON: Expecting value, character 10."),
    ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}', {}, "line 2 has no field text."),
    ("a.jsonl", b"[1]", {}, "line 1 has no field text."),
    ("a.jsonl", b'{"text": {"body": "a"}}', {"field": "text.title"}, "line 1 has no field text.title."),
    ("a.jsonl", b'{"text": 5}', {}, "line 1 has a number as text; a text or a list of texts is needed."),
    ("a.jsonl", b'{"text": null}', {}, "line 1 has null as text; a text or a list of texts is needed."),
    ("a.jsonl", b'{"text": ["a", 5]}', {}, "line 1 has a list as text; a text or a list of texts is needed."),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', {}, "line 2 is not UTF-8: byte 0xff."),
    ("a.jsonl", b'{"text": "\\ud83d"}', {}, "line 1 has half of a surrogate pair, '\\ud83d'."),
    ("a.jsonl", b"[" * 200_000, {}, "line 1 is nested too deeply."),
    ("a.json", b'[{"text": "a"},\n\n {"text": ]', {}, "line 3 is not valid JSON: Expecting value."),
    ("a.json", b'[{"text": "a"},\n {"txt":\n "a"}]', {}, "line 2 has no field text."),
    ("a.json", b'[{"text":\n "a"},\n {"txt": "a"}]', {}, "line 3 has no field text."),
    ("a.json", b'[{"text": "a"}\n {"text": "a"}]', {}, "line 2 is not valid JSON: ',' or ']' is missing."),
    ("a.json", b'[{"text": "a"}\n', {}, "line 2 is not valid JSON: ',' or ']' is missing."),
    ("a.json", b'[{"text": "a"},\n5]', {}, "line 2 must start an object."),
    ("a.json", b'[]\n{"text": "a"}', {}, "line 2 is not valid JSON: there is text after its end."),
    ("a.json", b"", {}, "line 1 must start an object."),
    ("a.txt", "a\nb\r\né".encode("latin-1"), {}, "line 3 is not UTF-8: byte 0xe9."),
    ("a.txt", "a\nb\né".encode()[:-1], {}, "line 3 is not UTF-8: byte 0xc3."),
]  # fmt: skip


@pytest.mark.parametrize("piece_bytes", [1, 1 << 20])
@pytest.mark.parametrize(("name", "content", "options", "said"), BAD_LINES)
def test_a_bad_line_is_named(
    name: str,
    content: bytes,
    options: dict[str, str],
    said: str,
    piece_bytes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(files_module, "PIECE_BYTES", piece_bytes)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TrainError) as caught:
        texts_of(tmp_path, name, **options)
    assert str(caught.value) == f"{tmp_path / name}, {said}"


def test_bad_parquet_files(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"body": ["a", None]}), tmp_path / "a.parquet")
    with pytest.raises(TrainError, match=r"a\.parquet has no column text; it has body\."):
        texts_of(tmp_path, "a.parquet")
    with pytest.raises(TrainError, match=r"a\.parquet, row 2 has null as body"):
        texts_of(tmp_path, "a.parquet", field="body")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-5])
    with pytest.raises(TrainError, match=r"b\.parquet, row 1 cannot be read: "):
        texts_of(tmp_path, "b.parquet", field="body")


def test_a_document_that_is_too_long_is_refused_where_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources_module, "MAX_DOCUMENT_BYTES", 1 << 10)
    monkeypatch.setattr(files_module, "PIECE_BYTES", 1 << 8)
    long = "x" * 5000
    for name, content in {
        "a.txt": f"a\n\n{long}",
        "a.jsonl": f'{{"text": "a"}}\n\n{{"text": "{long}"}}',
        "a.json": f'[{{"text": "a"}},\n\n{{"text": "{long}"}}]',
    }.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(TrainError, match=r"line 3 starts "):
            texts_of(tmp_path, name, **({"separator": "\n\n"} if name == "a.txt" else {}))


def test_files_by_patterns_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "sub/c.jsonl.gz", "[x].txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = files_of(
        [Source(files=[f"{tmp_path}/[ab].txt"]), Source(files=[f"{tmp_path}/**/*.gz", f"{tmp_path}/[x].txt"])]
    )
    assert [file.path.name for file in found] == ["a.txt", "b.txt", "c.jsonl.gz", "[x].txt"]
    assert [file.source_number for file in found] == [0, 0, 1, 1]
    assert [file.format for file in found] == ["text", "text", "jsonl", "text"]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["absent.txt"], "{}/absent.txt does not exist."),
        (["."], "{}/. is not a file."),
        (["*.csv"], "{}/*.csv matches no file."),
        (["a.txt", "*.txt"], "{}/a.txt is named twice in sources; its texts would count double."),
        (["a.csv"], "{}/a.csv does not end with .txt, .md, .jsonl, .ndjson, .json, .parquet; say which with format."),
    ],
)
def test_files_that_cannot_be_used(names: list[str], said: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    if names == ["a.csv"]:
        (tmp_path / "a.csv").touch()
    with pytest.raises(TrainError) as caught:
        files_of([Source(files=[f"{tmp_path}/{name}" for name in names])])
    assert str(caught.value) == said.format(tmp_path)
