"""The size of a request's JSON is bounded before it is parsed.

Python lets no other thread run while a JSON text is read or a body is checked, so what either may take is bounded here:
a body of 2 MiB that is nothing but brackets would take half a second, and every item of a list that is wrong an error.
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
    """What a validator raises; `message` goes on after "The field ... is not valid: "."""
    return PydanticCustomError("value", "{message}", {"message": message})


def too_large(text: bytes) -> str | None:
    """Why a JSON text holds too much, as one sentence; None if it does not, or is not JSON at all."""
    if not _exceeds(*_counts(text)):  # even if all its strings were structure
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
    """Signs that begin lists and objects, and those of members."""
    return text.count(b"[") + text.count(b"{"), text.count(b":")


def _counts_outside_strings(text: bytes) -> tuple[int, int]:
    """The same without those inside of strings, as far as it takes to know that there are too many."""
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
    """Annotates a list or a dict of a body: its items are counted before any is looked at.

    A list is checked up to its first wrong item. A dict is checked whole, so its bound should be small.
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
        """The value itself; PydanticCustomError when it is a list or a dict with too many items."""
        if isinstance(value, list | dict) and len(value) > self.num_items:
            raise wrong(f"it has {len(value)} items; at most {self.num_items} are allowed")
        return value
