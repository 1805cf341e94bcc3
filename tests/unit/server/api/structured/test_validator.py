"""Values against schemas: as jsonschema says it, in bounded time, and without asking another host."""

import random
import socket
from typing import Any

import jsonschema
import pytest

from stellarbyte_server.api.structured.validator import NotValidated, violation
from tests.support.random_schemas import RandomSchemas

VALUES: list[Any] = [
    None,
    True,
    0,
    1,
    1.5,
    -3,
    "",
    "abc",
    "2024-01-31",
    [],
    [1, 1.0],
    {},
    {"a": 1},
    {"name": "x", "é": []},
]


def test_it_says_what_jsonschema_says() -> None:
    chance = random.Random(0)
    for seed in range(150):
        schema = RandomSchemas(seed).document()
        if chance.random() < 0.5:
            schema = {"not": schema, "$defs": schema.get("$defs", {})}
        expected = jsonschema.Draft202012Validator(schema)
        for value in VALUES:
            assert (violation(schema, value) is None) == expected.is_valid(value), (schema, value)


@pytest.mark.parametrize(
    "schema, valid, invalid",
    [
        ({"minimum": 3, "exclusiveMinimum": True}, 4, 3),
        ({"maximum": 3, "exclusiveMaximum": False}, 3, 4),
        ({"items": [{"type": "null"}], "additionalItems": False}, [None], [None, 1]),
        ({"uniqueItems": True}, [1, True, "1", {"a": 1, "b": 2}], [{"a": 1, "b": 2}, {"b": 2.0, "a": 1}]),
        ({"patternProperties": {"^\\p{Lu}": {}}, "additionalProperties": False}, {"Ä": 1}, {"ä": 1}),
    ],
)
def test_older_drafts_and_patterns_of_their_own_kind(schema: dict[str, Any], valid: Any, invalid: Any) -> None:
    assert violation(schema, valid) is None
    assert violation(schema, invalid) is not None


def doubling(levels: int) -> dict[str, Any]:
    """Each level looks twice at the one below."""
    below = {f"a{level}": {"allOf": [{"$ref": f"#/$defs/a{level + 1}"}] * 2} for level in range(levels)}
    return {"$ref": "#/$defs/a0", "$defs": {**below, f"a{levels}": {"type": "string"}}}


@pytest.mark.parametrize(
    "schema, value, why",
    [
        ({"pattern": "^(a|a)+$"}, "a" * 40 + "b", "a pattern takes too long"),
        ({"patternProperties": {"^(a|a)+$": {}}}, {"a" * 40 + "b": 1}, "a pattern takes too long"),
        ({"patternProperties": {"x": {}}, "unevaluatedProperties": False}, {"a": 1}, "unevaluatedProperties"),
        (doubling(40), "a", "it takes too long"),
        ({"$ref": "#"}, 1, "nested too deeply"),
    ],
)
def test_what_would_take_too_long_is_given_up(schema: dict[str, Any], value: Any, why: str) -> None:
    with pytest.raises(NotValidated, match=why):
        violation(schema, value)


def test_no_other_host_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection is opened")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    for reference in ("http://127.0.0.1:9/schema", "file:///etc/passwd"):
        with pytest.raises(NotValidated, match="a reference leads nowhere"):
            violation({"$ref": reference}, 1)


def test_equal_items_among_many_are_found_at_once() -> None:
    assert violation({"uniqueItems": True}, [{"a": number} for number in range(20_000)]) is None
