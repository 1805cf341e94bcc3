"""Checks the plain values of JSON schemas: whether they are valid, and whether a grammar can enforce them."""

import re
from decimal import Decimal
from typing import Any

from stellarbyte_server.api.structured import schema_keywords as keywords

_CONTROL = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")  # never in answers: their JSON escapes are not allowed


class InvalidSchema(ValueError):
    """A part of a schema is invalid or too large; str() continues "The schema at PLACE "."""


class NotEnforceable(ValueError):
    """A part is valid, but a grammar cannot enforce it; str() continues "The schema at PLACE "."""


def plain_value(keyword: str, value: Any) -> Any:
    """The value of a keyword without subschemas, for llguidance; InvalidSchema, NotEnforceable."""
    if keyword in keywords.COUNTS:
        count = whole_number(keyword, value)
        if keyword == "minProperties" and count > 1:
            raise NotEnforceable("must be 0 or 1; more is not supported")
        return count
    if keyword in keywords.NUMBERS:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InvalidSchema("must be a number")
        check_literal(value)
    elif keyword in ("const", "enum"):
        _check_constants(keyword, value)
    elif keyword == "type":
        if value == [] or not is_texts(value if isinstance(value, list) else [value]):
            raise InvalidSchema("must be a string or a list of strings")
    elif keyword == "required":
        if not isinstance(value, list) or not is_texts(value):
            raise InvalidSchema("must be a list of strings")
    elif keyword == "format" and not isinstance(value, str):
        raise InvalidSchema("must be a string")
    elif keyword == "uniqueItems" and not isinstance(value, bool):
        raise InvalidSchema("must be a boolean")
    return value


def whole_number(keyword: str, value: Any) -> int:
    """A count. Upper bounds are capped at MAX_COUNT, which no answer reaches."""
    is_whole = isinstance(value, int | float) and not isinstance(value, bool) and value == int(value)
    most = keywords.MAX_COUNT
    if not is_whole or value < 0 or (value > most and not keyword.startswith("max")):
        raise InvalidSchema(f"must be a whole number from 0 to {most}")
    return min(int(value), most)


def digits(multiple: float) -> int:
    """The digits of a multipleOf as a whole number: 25 for 2.5."""
    if multiple <= 0:
        raise InvalidSchema("must be greater than 0")
    sign_digits_exponent = Decimal(repr(multiple)).normalize()
    exponent = int(sign_digits_exponent.as_tuple().exponent)
    if exponent < -9:
        raise NotEnforceable("has more than 9 decimal places")
    return int(sign_digits_exponent.scaleb(-exponent)) * 10 ** max(exponent, 0)


def check_literal(value: Any) -> None:
    """Check a value that an answer may have to contain; InvalidSchema, NotEnforceable."""
    if isinstance(value, dict | list):
        for part in parts(value):
            check_literal(part)
    elif isinstance(value, str):
        why = f"has a text with control characters or of more than {keywords.MAX_TEXT_LENGTH} characters"
        if len(value) > keywords.MAX_TEXT_LENGTH:
            raise InvalidSchema(why)
        if _CONTROL.search(value):
            raise NotEnforceable(why)
    elif isinstance(value, int | float) and abs(value) > keywords.MAX_NUMBER:
        raise NotEnforceable("has a number beyond 2**53, which is not supported")


def _check_constants(keyword: str, value: Any) -> None:
    if keyword == "enum" and not (isinstance(value, list) and value):
        raise InvalidSchema("must be a list of at least one value")
    most = keywords.MAX_BRANCHES
    if keyword == "enum" and sum(isinstance(entry, dict | list) for entry in value) > most:
        raise InvalidSchema(f"has more than {most} objects and lists")
    check_literal(value)


def is_texts(values: list[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def parts(value: Any) -> list[Any]:
    """The values inside a list or an object, including its keys."""
    if isinstance(value, dict):
        return [*value, *value.values()]
    return value if isinstance(value, list) else []
