"""Parses and checks bodies of requests; an invalid body raises ApiError.

Unsupported and unknown fields are errors, unless the value of an unsupported field is neutral (see `unsupported`).
The fields of `unused` have OpenAI's types and no effect. null means absent everywhere.
"""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json

from stellarbyte_server.api.contract.bodies import unsupported
from stellarbyte_server.api.contract.bodies.bounds import MAX_FIELDS, too_large
from stellarbyte_server.api.contract.errors import bad_request, from_validation

MAX_IGNORED = 1000  # fields that an answer can name


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", frozen=True, allow_inf_nan=False)

    ignores_unknown: ClassVar[bool] = False  # as with --unknown-fields warn

    @classmethod
    def class_for(cls, content: dict[str, Any]) -> type[Self]:
        """The class that checks a body with this content."""
        del content
        return cls


BodyT = TypeVar("BodyT", bound=Body)
PlainBodyT = TypeVar("PlainBodyT", bound=BaseModel)


def parse_body(body_class: type[BodyT], text: bytes, *, warn_unknown: bool) -> tuple[BodyT, list[str]]:
    """A checked body, and the fields that were ignored; ApiError if it is refused.

    Unknown fields are ignored with `warn_unknown`, or if the class does so.
    """
    content = _content_of(text)
    parsed = _checked(body_class.class_for(content), content)
    refused = islice(unsupported.refused_fields(parsed), MAX_IGNORED)
    if warn_unknown or body_class.ignores_unknown:
        return parsed, [path for path, _ in refused]
    for path, known in refused:
        reason = "is not supported" if known else "is unknown"
        raise bad_request(f"The field {path!r:.200} {reason}.", path)
    return parsed, []


def parse_plain_body(body_class: type[PlainBodyT], text: bytes) -> PlainBodyT:
    """A checked body; unknown fields are accepted unless its class forbids them. ApiError if it is refused."""
    return _checked(body_class, _content_of(text))


def parse_named(named_class: type[PlainBodyT], given: Mapping[str, str] | Sequence[tuple[str, str]]) -> PlainBodyT:
    """Checked fields of a query or a form; their values are strings. ApiError."""
    fields: dict[str, Any] = {}
    for name, value in given.items() if isinstance(given, Mapping) else given:
        if name in fields:
            raise bad_request(f"The field {name!r:.100} may occur only once.", name[:100])
        fields[name] = value
    return _checked(named_class, fields)


def _content_of(text: bytes) -> dict[str, Any]:
    """The fields of a body, bounded so that they can be checked in a short time; ApiError."""
    if (reason := too_large(text)) is not None:
        raise bad_request(reason)
    try:
        content = from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise bad_request(f"The body is not valid JSON: {error}.") from None
    if not isinstance(content, dict):
        raise bad_request("The body must be a JSON object.")
    if len(content) > MAX_FIELDS:
        raise bad_request(f"The body has {len(content)} fields; at most {MAX_FIELDS} are allowed.")
    return content


def _checked(body_class: type[PlainBodyT], content: dict[str, Any]) -> PlainBodyT:
    try:
        return body_class.model_validate(content)
    except ValidationError as error:
        raise from_validation(error) from None
