"""Validates a value against a whole schema in bounded time, for any schema and value.

Uses `jsonschema` with replacements for keywords that would take unbounded time, contact another host, or ignore the
forms of older drafts: patterns of the module `re` can take exponential time, equal items are found by comparing all
pairs, and a schema that refers to itself twice doubles the work with each level.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import cache
from typing import Any

import jsonschema
import regex
from jsonschema.exceptions import ValidationError
from referencing import Registry
from referencing.exceptions import Unresolvable

LIMIT_S = 0.5  # of the thread's own time
_PATTERN_LIMIT_S = 0.05  # of one search
_MAX_PATTERN_LENGTH = 4096
_Keyword = Callable[[Any, Any, Any, Any], Iterator[ValidationError] | None]

_due_s: ContextVar[float] = ContextVar("due_s")
_has_patterns: ContextVar[bool] = ContextVar("has_patterns")


class NotValidated(Exception):
    """A value could not be validated; str() is the reason, in a few words."""


def violation(schema: dict[str, Any], value: Any) -> str | None:
    """The first violation of the schema, as one sentence; None: the value is valid. NotValidated."""
    document = {keyword: inner for keyword, inner in schema.items() if keyword != "$schema"}
    _has_patterns.set('"patternProperties"' in json.dumps(document))
    _due_s.set(time.thread_time() + LIMIT_S)
    try:
        error = next(_validator_class()(document, registry=Registry()).iter_errors(value), None)
    except (Unresolvable, RecursionError) as failure:
        reason = "a reference leads nowhere" if isinstance(failure, Unresolvable) else "it is nested too deeply"
        raise NotValidated(reason) from None
    if error is None:
        return None
    keyword = str(error.validator)[:80]
    return f"{error.json_path[:120]} does not satisfy the keyword '{keyword}'."


@cache
def _validator_class() -> Any:
    known = {
        **jsonschema.Draft7Validator.VALIDATORS,
        **jsonschema.Draft201909Validator.VALIDATORS,
        **jsonschema.Draft202012Validator.VALIDATORS,
    }
    replaced: dict[str, _Keyword] = {
        "pattern": _pattern,
        "patternProperties": _pattern_properties,
        "additionalProperties": _additional_properties,
        "unevaluatedProperties": _unevaluated_properties(known["unevaluatedProperties"]),
        "uniqueItems": _unique_items,
        "items": _items(known["items"], jsonschema.Draft7Validator.VALIDATORS["items"]),
        "minimum": _limit("exclusiveMinimum", known["minimum"], known["exclusiveMinimum"]),
        "maximum": _limit("exclusiveMaximum", known["maximum"], known["exclusiveMaximum"]),
        "exclusiveMinimum": _unless_bool(known["exclusiveMinimum"]),
        "exclusiveMaximum": _unless_bool(known["exclusiveMaximum"]),
    }
    timed = {keyword: _timed(check) for keyword, check in {**known, **replaced}.items()}
    return jsonschema.validators.extend(jsonschema.Draft202012Validator, timed)


def _timed(check: _Keyword) -> _Keyword:
    def timed(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
        if time.thread_time() > _due_s.get():
            raise NotValidated("it takes too long")
        yield from check(validator, value, instance, schema) or ()

    return timed


def _found(pattern: str, text: str) -> bool:
    """Whether a pattern matches in a text; True for invalid or too long patterns, to report no false violation."""
    if len(pattern) > _MAX_PATTERN_LENGTH:
        return True
    try:
        return regex.search(pattern, text, timeout=_PATTERN_LIMIT_S, concurrent=True) is not None
    except TimeoutError:
        raise NotValidated("a pattern takes too long") from None
    except regex.error:
        return True


def _pattern(validator: Any, value: Any, instance: Any, _schema: Any) -> Iterator[ValidationError]:
    if validator.is_type(instance, "string") and not _found(value, instance):
        yield ValidationError("It does not match.")


def _pattern_properties(validator: Any, value: Any, instance: Any, _schema: Any) -> Iterator[ValidationError]:
    if validator.is_type(instance, "object"):
        for pattern, schema in value.items():
            for name, inner in instance.items():
                if _found(pattern, name):
                    yield from validator.descend(inner, schema, path=name, schema_path=pattern)


def _additional_properties(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if validator.is_type(instance, "object"):
        named, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
        for name, inner in instance.items():
            if name not in named and not any(_found(pattern, name) for pattern in patterns):
                yield from validator.descend(inner, value, path=name)


def _unevaluated_properties(check: _Keyword) -> _Keyword:
    """Refuses schemas with patterns, because jsonschema finds their evaluated properties with `re`."""

    def without_patterns(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
        if _has_patterns.get():
            raise NotValidated("it has both unevaluatedProperties and patternProperties")
        yield from check(validator, value, instance, schema) or ()

    return without_patterns


def _unique_items(validator: Any, value: Any, instance: Any, _schema: Any) -> Iterator[ValidationError]:
    if value and validator.is_type(instance, "array"):
        texts = {json.dumps(_as_equal(item), sort_keys=True) for item in instance}
        if len(texts) < len(instance):
            yield ValidationError("It has equal items.")


def _as_equal(value: Any) -> Any:
    """The value, with equal numbers in one notation."""
    if isinstance(value, dict):
        return {name: _as_equal(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_as_equal(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _items(check: _Keyword, of_lists: _Keyword) -> _Keyword:
    def of_either(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
        yield from (of_lists if isinstance(value, list) else check)(validator, value, instance, schema) or ()

    return of_either


def _limit(exclusive: str, check: _Keyword, check_exclusive: _Keyword) -> _Keyword:
    """The limit of draft 4, where a separate boolean makes it exclusive, and of later drafts."""

    def of_either(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
        is_exclusive = schema.get(exclusive) is True
        yield from (check_exclusive if is_exclusive else check)(validator, value, instance, schema) or ()

    return of_either


def _unless_bool(check: _Keyword) -> _Keyword:
    def unless_bool(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
        if not isinstance(value, bool):
            yield from check(validator, value, instance, schema) or ()

    return unless_bool
