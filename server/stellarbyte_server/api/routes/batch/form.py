"""A form with one file, which is written to --data-dir while it is received."""

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from stellarbyte_server.api.contract.bodies.batch.files import MAX_FILENAME
from stellarbyte_server.api.contract.errors import ApiError, bad_request
from stellarbyte_server.batch.files import Upload

if TYPE_CHECKING:  # exists for type checkers only
    from python_multipart.multipart import MultipartCallbacks

FILE_FIELD = "file"
MAX_FIELDS = 16
MAX_FIELD_BYTES = 1024
_WRITTEN_AT_ONCE = 2**20  # bytes


@dataclass
class _Part:
    headers: dict[str, bytes] = field(default_factory=dict)
    header_name: bytes = b""
    header_value: bytes = b""
    name: str = ""
    value: bytearray = field(default_factory=bytearray)


@dataclass
class Form:
    """The form so far: its fields, the file's name, and the file's bytes that are not yet written."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None
    unwritten: bytearray = field(default_factory=bytearray)


async def read_form(http: Request, upload: Upload, max_file_bytes: int) -> Form:
    """The fields of a request's form; the file is written to `upload`. ApiError."""
    kind, options = parse_options_header(http.headers.get("content-type", ""))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 1 <= len(boundary) <= 70:
        raise bad_request("The header 'Content-Type' must be multipart/form-data with a boundary.")
    reader = _FormReader()
    parser = MultipartParser(boundary, reader.callbacks())
    form = reader.form
    try:
        async for chunk in http.stream():
            parser.write(chunk)
            if upload.num_bytes + len(form.unwritten) > max_file_bytes:
                raise ApiError(413, f"The file is larger than {max_file_bytes} bytes.", code="request_too_large")
            if len(form.unwritten) >= _WRITTEN_AT_ONCE:
                await _write(form, upload)
        parser.finalize()
    except FormParserError as error:
        raise bad_request(f"The body is not a valid multipart form: {str(error).rstrip('.')}.") from None
    if not reader.is_complete:
        raise bad_request("The body is not a complete multipart form.")
    if form.filename is None:
        raise bad_request("The field 'file' is required.", FILE_FIELD)
    await _write(form, upload)
    return form


async def _write(form: Form, upload: Upload) -> None:
    content, form.unwritten = bytes(form.unwritten), bytearray()
    await asyncio.to_thread(upload.write, content)


class _FormReader:
    """Callbacks of the parser; ApiError for unexpected parts."""

    def __init__(self) -> None:
        self.form = Form()
        self.is_complete = False
        self._part = _Part()

    def callbacks(self) -> "MultipartCallbacks":
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_name,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_end,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._all,
        }

    def _begin(self) -> None:
        self._part = _Part()

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._part.header_name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._part.header_value += data[start:end]

    def _header_end(self) -> None:
        part = self._part
        part.headers[part.header_name.decode("latin-1").lower()] = part.header_value
        part.header_name = part.header_value = b""

    def _headers_end(self) -> None:
        _, options = parse_options_header(self._part.headers.get("content-disposition", b""))
        name = self._part.name = options.get(b"name", b"").decode(errors="replace")
        if not name:
            raise bad_request("A part of the form has no name.")
        if name == FILE_FIELD:
            if self.form.filename is not None:
                raise bad_request("The field 'file' may occur only once.", FILE_FIELD)
            self.form.filename = _shown_name(options.get(b"filename", b""))
        elif name in self.form.fields:
            raise bad_request(f"The field {name!r:.100} may occur only once.", name[:100])
        elif len(self.form.fields) == MAX_FIELDS:
            raise bad_request(f"The form has more than {MAX_FIELDS} fields.")

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._part.name == FILE_FIELD:
            self.form.unwritten += data[start:end]
            return
        self._part.value += data[start:end]
        if len(self._part.value) > MAX_FIELD_BYTES:
            name = self._part.name
            raise bad_request(f"The field {name!r:.100} has more than {MAX_FIELD_BYTES} bytes.", name[:100])

    def _end(self) -> None:
        if self._part.name != FILE_FIELD:
            self.form.fields[self._part.name] = self._part.value.decode(errors="replace")

    def _all(self) -> None:
        self.is_complete = True


def _shown_name(given: bytes) -> str:
    """A file's name for display; ApiError for an invalid name. It is never used as a path."""
    name = given.decode(errors="replace")
    if not 1 <= len(name) <= MAX_FILENAME or not name.isprintable():
        raise bad_request(f"The filename of 'file' must have 1 to {MAX_FILENAME} printable characters.", FILE_FIELD)
    return name
