"""Bounds on the structure of a request's JSON, checked before it is parsed.

Parsing JSON and checking a body block all other threads, so both must be short: a body of 2 MiB of brackets would take
half a second, and each wrong item of a list would cost an error.
"""

from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

MAX_CONTAINERS = 2**17  # lists and objects of a body
MAX_MEMBERS = 2**17  # of all its objects together
MAX_FIELDS = 256  # of the body itself
_SCANNED_AT_ONCE = 2**18  # bytes; between them other threads may run


def wrong(message: str) -> PydanticCustomError:
    """An error for a validator to raise; `message` continues "The field ... is not valid: "."""
    return PydanticCustomError("value", "{message}", {"message": message})


def too_large(text: bytes) -> str | None:
    """The bound that a JSON text exceeds, as one sentence; None if it exceeds none or is not JSON."""
    if not _exceeds(*_counts(text)):  # even if the contents of strings are counted
        return None
    containers, members = _counts_outside_strings(text)
    if containers > MAX_CONTAINERS:
        return f"The body has more than {MAX_CONTAINERS} lists and objects."
    if members > MAX_MEMBERS:
        return f"The objects of the body have more than {MAX_MEMBERS} members."
    return None


def _exceeds(containers: int, members: int) -> bool:
    return containers > MAX_CONTAINERS or members > MAX_MEMBERS


def _counts(text: bytes) -> tuple[int, int]:
    """The number of characters that begin lists and objects, and of those that mark members."""
    return text.count(b"[") + text.count(b"{"), text.count(b":")


def _counts_outside_strings(text: bytes) -> tuple[int, int]:
    """The same outside strings only, up to the first excess."""
    if b"\\" in text:
        text = text.replace(rb"\\", b"").replace(rb"\"", b"")
    containers = members = in_string = 0
    for start in range(0, len(text), _SCANNED_AT_ONCE):
        pieces = text[start : start + _SCANNED_AT_ONCE].split(b'"')
        more_containers, more_members = _counts(b"".join(pieces[in_string::2]))
        containers, members = containers + more_containers, members + more_members
        if _exceeds(containers, members):
            break
        in_string = (in_string + len(pieces) - 1) % 2
    return containers, members


@dataclass(frozen=True)
class AtMost:
    """Annotates a list or a dict of a body: its number of items is checked before any item.

    A list is checked up to its first invalid item; a dict is checked completely, so its bound should be small.
    """

    num_items: int

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        if schema["type"] == "list":
            schema = {**schema, "fail_fast": True}
        return core_schema.no_info_before_validator_function(self.check, schema)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        shown = handler(schema)
        return {**shown, "maxItems" if shown["type"] == "array" else "maxProperties": self.num_items}

    def check(self, value: object) -> object:
        """The value itself; PydanticCustomError if it is a list or a dict with too many items."""
        if isinstance(value, list | dict) and len(value) > self.num_items:
            raise wrong(f"it has {len(value)} items; at most {self.num_items} are allowed")
        return value
