"""The input of a batch: one request per line. All lines are checked before the first is run."""

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import msgspec

from stellarbyte_server.batch.batches import BatchProblem

MAX_LINES = 50_000
MAX_ID_CHARACTERS = 512
MAX_PROBLEMS = 100  # reported to the user
_MORE_THAN_BODY = 8192  # bytes of a line, without its body
_READ_BYTES = 2**20


class InputLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One request; its body is checked when it is run, like that of any other request."""

    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class LinePlace(NamedTuple):
    """The place of a request in the file. A batch may have many requests, so each is read when it is run."""

    custom_id: str
    start: int
    num_bytes: int


class _Object(msgspec.Struct):
    """Any JSON object."""


_decoder = msgspec.json.Decoder(InputLine)
_object_decoder = msgspec.json.Decoder(_Object)


def check_input(file: BinaryIO, endpoint: str, max_body_bytes: int) -> tuple[list[LinePlace], list[BatchProblem]]:
    """The requests of a file, and its problems; if it has any, no request must be run."""
    places: list[LinePlace] = []
    problems: list[BatchProblem] = []
    seen: dict[str, int] = {}
    for number, start, text in lines_of(file, max_body_bytes + _MORE_THAN_BODY):
        if len(problems) >= MAX_PROBLEMS:
            break
        if len(places) >= MAX_LINES:
            problems.append(_problem("too_many_lines", f"The file has more than {MAX_LINES} lines.", number))
            break
        if text is None:
            message = f"The line is longer than {max_body_bytes + _MORE_THAN_BODY} bytes."
            problems.append(_problem("line_too_long", message, number))
            continue
        line = _checked(text, number, endpoint, max_body_bytes)
        if isinstance(line, BatchProblem):
            problems.append(line)
        elif line.custom_id in seen:
            message = f"Line {seen[line.custom_id]} has the same custom_id, {line.custom_id!r:.100}."
            problems.append(_problem("duplicate_custom_id", message, number, "custom_id"))
        else:
            seen[line.custom_id] = number
            places.append(LinePlace(line.custom_id, start, len(text)))
    if not (places or problems):
        problems.append(BatchProblem(code="empty_file", message="The input file has no lines."))
    return places, problems


def body_at(file: BinaryIO, place: LinePlace) -> bytes:
    """The body of a checked request; OSError or ValueError if the file has changed since the check."""
    file.seek(place.start)
    text = file.read(place.num_bytes)
    return bytes(_decoder.decode(text).body)


def _checked(text: bytes, number: int, endpoint: str, max_body_bytes: int) -> InputLine | BatchProblem:
    try:
        line = _decoder.decode(text)
        _object_decoder.decode(line.body)
    except msgspec.ValidationError as error:
        return _problem("invalid_line", f"The line is not a valid request: {error}.", number)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return _problem("invalid_json_line", f"The line is not valid JSON: {error}.", number)
    if not 1 <= len(line.custom_id) <= MAX_ID_CHARACTERS:
        message = f"The custom_id must have 1 to {MAX_ID_CHARACTERS} characters."
        return _problem("invalid_custom_id", message, number, "custom_id")
    if line.method != "POST":
        return _problem("invalid_method", "The method must be POST.", number, "method")
    if line.url != endpoint:
        message = f"The url {line.url!r:.100} must be the batch's endpoint, {endpoint}."
        return _problem("mismatched_url", message, number, "url")
    if len(bytes(line.body)) > max_body_bytes:
        return _problem("body_too_long", f"The body is larger than {max_body_bytes} bytes.", number, "body")
    return line


def _problem(code: str, message: str, line: int, param: str | None = None) -> BatchProblem:
    return BatchProblem(code=code, message=message, line=line, param=param)


def lines_of(file: BinaryIO, most: int) -> Iterator[tuple[int, int, bytes | None]]:
    """Number, start and text of each line that is not blank; None for a text of more than `most` bytes."""
    number, start = 1, 0  # of the line that begins with `text`
    text = bytearray()
    is_too_long = False

    def told() -> Iterator[tuple[int, int, bytes | None]]:
        if is_too_long:
            yield number, start, None
        elif text.strip():
            yield number, start, bytes(text)

    position = 0
    while content := file.read(_READ_BYTES):
        first, *others = content.split(b"\n")
        for index, piece in enumerate((first, *others)):
            if index:
                yield from told()
                number, start, is_too_long = number + 1, position, False
                text.clear()
            text += piece
            if len(text) > most:
                is_too_long = True
                text.clear()
            position += len(piece) + (index < len(others))
    yield from told()
