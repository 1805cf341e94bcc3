"""Files of texts: which ones, and their bytes and characters in pieces, decompressed."""

import bz2
import codecs
import glob
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from stellarbyte.train.config.sources import Format, Source
from stellarbyte.train.errors import TrainError, missing_library

PIECE_BYTES = 1 << 20
READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)  # of damaged and shortened files too


class SourceFile(NamedTuple):
    path: Path
    format: Format
    source: Source
    source_number: int  # from 0


def files_of(sources: Sequence[Source]) -> list[SourceFile]:
    """The files of all sources in their order. TrainError if one is missing, has no known form or is there twice."""
    found: dict[Path, SourceFile] = {}
    for number, source in enumerate(sources):
        for pattern in source.files:
            for path in _matches(pattern):
                if path.resolve() in found:
                    raise TrainError(f"{path} is named twice in sources; its texts would count double.")
                try:
                    found[path.resolve()] = SourceFile(path, source.format_of(path), source, number)
                except ValueError as error:
                    raise TrainError(f"{error}.") from error
    return list(found.values())


def _matches(pattern: str) -> list[Path]:
    if not glob.has_magic(pattern) or Path(pattern).exists():
        if not Path(pattern).is_file():
            raise TrainError(f"{pattern} {'is not a file' if Path(pattern).exists() else 'does not exist'}.")
        return [Path(pattern)]
    paths = [Path(path) for path in sorted(glob.glob(pattern, recursive=True)) if Path(path).is_file()]
    if not paths:
        raise TrainError(f"{pattern} matches no file.")
    return paths


def open_decompressed(path: Path, raw: BinaryIO) -> BinaryIO:
    """The content of `raw`, decompressed as the name of `path` says. What is read may raise READ_ERRORS."""
    match path.suffix:
        case ".gz":
            return gzip.open(raw)  # type: ignore[return-value]
        case ".bz2":
            return bz2.open(raw)  # type: ignore[return-value]
        case ".xz":
            return lzma.open(raw)  # type: ignore[return-value]
        case ".zst":
            try:
                import pyarrow
            except ImportError as error:
                raise missing_library("pyarrow", f"Reading {path}") from error
            return io.BufferedReader(_UntilItsEnd(pyarrow.CompressedInputStream(raw, "zstd")), PIECE_BYTES)
        case _:
            return raw


class _UntilItsEnd(io.RawIOBase):
    """A stream of Arrow's as a file of Python's."""

    def __init__(self, stream: "object") -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "bytearray | memoryview") -> int:  # type: ignore[override]
        content = self._stream.read(len(buffer))  # type: ignore[attr-defined]
        buffer[: len(content)] = content
        return len(content)


def characters(opened: BinaryIO) -> Iterator[str]:
    """The text in pieces, every line ending as \\n, without a byte-order mark.

    Raises UnicodeDecodeError with the bytes from the place of the last piece on.
    """
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")("strict"), translate=True)
    while content := opened.read(PIECE_BYTES):
        if piece := decoder.decode(content):
            yield piece
    if piece := decoder.decode(b"", final=True):
        yield piece
