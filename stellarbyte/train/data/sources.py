"""The documents of a file, one after the other: memory grows with the longest document, not with the file."""

import contextlib
import json
from collections.abc import Iterator
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self

from stellarbyte.train.data.files import READ_ERRORS, SourceFile, characters, open_decompressed
from stellarbyte.train.data.json_array import JsonArray, JsonArrayError
from stellarbyte.train.data.records import field_names, text_reader
from stellarbyte.train.errors import TrainError, missing_library

MAX_DOCUMENT_BYTES = 1 << 24  # a tokenizer needs many times as much memory
_ROWS_AT_ONCE = 256
_WHITESPACE = " \t\r\n"


class Document(NamedTuple):
    text: str
    utf8: bytes
    place: str  # the file and the line or row, for errors


class DocumentReader:
    """Iterates once over the documents of a file that are not blank. Raises TrainError with the file and the line."""

    def __init__(self, file: SourceFile) -> None:
        self.path = file.path
        self._file = file
        self._number = 1  # of the line or row that is being read
        try:
            self._raw: BinaryIO = file.path.open("rb")
        except OSError as error:
            raise TrainError(f"{file.path} cannot be read: {error.strerror}.") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._raw.close()

    @property
    def position(self) -> int:
        """Bytes of the file read so far."""
        return self._raw.tell()

    def __iter__(self) -> Iterator[Document]:
        with self._errors_of_reading():
            for text in self._separated() if self._file.format == "text" else self._read_texts():
                place = self._place
                if text.strip():
                    yield Document(text, _utf8(text, place), place)

    def objects(self) -> Iterator[tuple[Any, str]]:
        """The objects of a JSON file instead of their texts, each with its place for errors."""
        with self._errors_of_reading():
            for record in self._records():
                yield record, self._place

    @property
    def _place(self) -> str:
        return f"{self.path}, {'row' if self._file.format == 'parquet' else 'line'} {self._number}"

    @contextlib.contextmanager
    def _errors_of_reading(self) -> Iterator[None]:
        try:
            yield
        except READ_ERRORS as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or "it ends too early"
            raise TrainError(f"{self._place} cannot be read: {reason.rstrip('.')}.") from error

    def _refuse(self, reason: str) -> TrainError:
        return TrainError(f"{self._place} {reason}.")

    def _characters(self, opened: BinaryIO) -> Iterator[str]:
        num_lines = 0
        try:
            for piece in characters(opened):
                yield piece
                num_lines += piece.count("\n")
        except UnicodeDecodeError as error:
            self._number = num_lines + 1 + error.object[: error.start].count(b"\n")
            raise self._refuse(f"is not UTF-8: byte {error.object[error.start]:#04x}") from error

    def _separated(self) -> Iterator[str]:
        """The texts between separators; without one, the whole file."""
        separator, waiting = self._file.source.separator, ""
        for piece in self._characters(open_decompressed(self.path, self._raw)):
            waiting += piece
            if separator is not None:
                *texts, waiting = waiting.split(separator)
                for text in texts:
                    yield text
                    self._number += (text + separator).count("\n")
            if len(waiting) > MAX_DOCUMENT_BYTES:
                raise self._refuse(_TOO_LONG + "; separator says what stands between documents")
        yield waiting

    def _read_texts(self) -> Iterator[str]:
        read = text_reader(self._file.source)
        for record in self._records():
            try:
                yield read(record)
            except ValueError as error:
                raise self._refuse(str(error)) from error

    def _records(self) -> Iterator[Any]:
        """The objects or rows of the file. Keeps the number of the line or row."""
        if self._file.format == "parquet":
            return self._parquet()
        opened = open_decompressed(self.path, self._raw)
        return self._lines(opened) if self._file.format == "jsonl" else self._objects(opened)

    def _lines(self, opened: BinaryIO) -> Iterator[Any]:
        """The values of JSON lines. Empty lines are skipped."""
        while line := opened.readline(2 * MAX_DOCUMENT_BYTES + 1):
            if len(line) > 2 * MAX_DOCUMENT_BYTES:
                raise self._refuse(_TOO_LONG)
            try:
                text = line.decode("utf-8-sig" if self._number == 1 else "utf-8").strip(_WHITESPACE)
                record = json.loads(text) if text else None
            except UnicodeDecodeError as error:
                raise self._refuse(f"is not UTF-8: byte {line[error.start]:#04x}") from error
            except json.JSONDecodeError as error:
                raise self._refuse(f"is not valid JSON: {error.msg}, character {error.pos + 1}") from error
            except RecursionError as error:
                raise self._refuse("is nested too deeply") from error
            if text:
                yield record
            self._number += 1

    def _objects(self, opened: BinaryIO) -> Iterator[Any]:
        array = JsonArray(self._characters(opened), 2 * MAX_DOCUMENT_BYTES)
        try:
            for record in array:
                self._number = array.line
                yield record
        except JsonArrayError as error:
            self._number = array.line
            raise self._refuse(str(error)) from error

    def _parquet(self) -> Iterator[Any]:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise missing_library("pyarrow", f"Reading {self.path}") from error
        columns = list(dict.fromkeys(name.split(".")[0] for name in field_names(self._file.source)))
        try:
            opened = parquet.ParquetFile(self._raw, buffer_size=1 << 20, pre_buffer=False)
            if absent := [name for name in columns if name not in opened.schema_arrow.names]:
                names = ", ".join(opened.schema_arrow.names)
                raise TrainError(f"{self.path} has no column {absent[0]}; it has {names}.")
            for batch in opened.iter_batches(_ROWS_AT_ONCE, columns=columns):
                for record in batch.to_pylist():
                    yield record
                    self._number += 1
        except pyarrow.ArrowException as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise self._refuse(f"cannot be read: {reason}") from error


_TOO_LONG = f"starts a document of more than {MAX_DOCUMENT_BYTES >> 20} MiB"


def _utf8(text: str, place: str) -> bytes:
    try:
        content = text.encode()
    except UnicodeEncodeError as error:
        raise TrainError(f"{place} has half of a surrogate pair, {text[error.start]!a}.") from error
    if len(content) > MAX_DOCUMENT_BYTES:
        raise TrainError(f"{place} {_TOO_LONG}.")
    return content


def total_bytes(files: list[SourceFile]) -> int:
    """The sizes of all files, as they are stored."""
    return sum(file.path.stat().st_size for file in files)
