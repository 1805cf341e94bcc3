"""No list or object of a body is endless: its items are counted before any is looked at, and one error is enough."""

import asyncio
import json
import random
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import BaseModel

from stellarbyte_server.api.contract.bodies import bounds
from stellarbyte_server.api.contract.bodies.body import Body, parse_body, parse_plain_body
from stellarbyte_server.api.contract.bodies.bounds import MAX_CONTAINERS, MAX_FIELDS, MAX_MEMBERS, too_large
from stellarbyte_server.api.contract.bodies.chat import ChatBody
from stellarbyte_server.api.contract.bodies.completion import CompletionBody
from stellarbyte_server.api.contract.bodies.tokenize import DetokenizeBody
from stellarbyte_server.api.contract.errors import ApiError
from stellarbyte_server.api.contract.openapi import make_document
from stellarbyte_server.api.endpoints import OPERATIONS
from stellarbyte_server.api.generation import parse_apart
from stellarbyte_server.tokens.text_work import TextWork

PARTS = make_document(OPERATIONS, "m", allows_unknown_fields=False)["components"]["schemas"]
ANYTHING = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}  # never looked at
BODIES = sorted(
    {body for operation in OPERATIONS.values() for body in operation.bodies}, key=lambda body: body.__name__
)
Wrap = Callable[[Any], Any]  # a value into a whole body that has it in its place


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    schema = PARTS[schema["$ref"].rsplit("/", 1)[1]] if "$ref" in schema else schema
    return {**schema, "anyOf": schema["oneOf"]} if "oneOf" in schema else schema


def example(schema: dict[str, Any]) -> Any:
    """A value that a schema of the document allows."""
    schema = resolved(schema)
    if (branches := schema.get("anyOf", schema.get("oneOf"))) is not None:
        return example(branches[0])
    if "const" in schema or "enum" in schema:
        choices = [schema["const"]] if "const" in schema else schema["enum"]
        return "assistant" if "assistant" in choices else choices[0]  # whose message may be without a content
    match schema.get("type"):
        case "object":
            return {name: example(schema["properties"][name]) for name in schema.get("required", ())}
        case "array":
            return [example(schema["items"])] if schema.get("minItems") else []
        case "string":
            return "x"
        case "null" | None:
            return None
        case "boolean":
            return True
        case _:
            return schema.get("minimum", 1)


def endless(schema: dict[str, Any], path: str, wrap: Wrap) -> Iterator[tuple[str, dict[str, Any], Wrap]]:
    """Every list and every object of any fields in a schema of the document: path, its schema, how a body has it."""
    schema = resolved(schema)
    for branch in schema.get("anyOf", schema.get("oneOf", ())):
        yield from endless(branch, path, wrap)
    if schema.get("type") == "array":
        yield path, schema, wrap
        yield from endless(schema["items"], f"{path}[0]", lambda value: wrap([value]))
    if schema.get("type") != "object":
        return
    if isinstance(schema.get("additionalProperties"), dict) and schema["additionalProperties"] != {"type": "null"}:
        yield path, schema, wrap
    elif "properties" not in schema:
        yield path, schema, wrap
    for name, inner in schema.get("properties", {}).items():

        def within(value: Any, name: str = name) -> Any:
            return wrap({**example(schema), name: value})

        yield from endless(inner, f"{path}.{name}" if path else name, within)


ENDLESS = [
    pytest.param(body, path, schema, wrap, id=f"{body.__name__} {path}")
    for body in BODIES
    for path, schema, wrap in endless(PARTS[body.__name__], "", lambda value: value)
]


def refusal(body_class: type[BaseModel], content: Any) -> ApiError:
    text = json.dumps(content).encode()
    with pytest.raises(ApiError) as caught:
        if issubclass(body_class, Body):
            parse_body(body_class, text, warn_unknown=False)
        else:
            parse_plain_body(body_class, text)
    assert caught.value.status == 400
    return caught.value


def test_the_lists_of_bodies_are_found() -> None:
    found = {parameter.id for parameter in ENDLESS}
    assert {
        "ChatBody messages",
        "ChatBody messages[0].content",
        "ChatBody messages[0].tool_calls",
        "ChatBody tools",
        "ChatBody tools[0].function.parameters",
        "ChatBody functions[0].parameters",
        "ChatBody tool_choice.allowed_tools.tools",
        "ChatBody response_format.json_schema.schema",
        "ChatBody stop",
        "ChatBody logit_bias",
        "CompletionBody prompt",
        "CompletionBody prompt[0]",
        "EmbeddingsBody input",
        "ResponsesBody input",
        "ResponsesBody input[0].content",
        "ResponsesBody input[0].output",
        "ResponsesBody tools",
        "ResponsesBody tools[0].parameters",
        "ResponsesBody tool_choice.tools",
        "ResponsesBody metadata",
        "DetokenizeBody tokens",
    } <= found


@pytest.mark.parametrize(("body", "path", "schema", "wrap"), ENDLESS)
def test_every_list_and_object_of_every_body_is_bounded_before_its_items_are_looked_at(body, path, schema, wrap):
    """Nothing of it is right but its length is named, not its items."""
    kind = "maxItems" if schema["type"] == "array" else "maxProperties"
    assert kind in schema, "the document must bound it"
    most = schema[kind]
    too_many: Any = [""] * (most + 1) if kind == "maxItems" else {f"k{i}": [""] for i in range(most + 1)}
    error = refusal(body, wrap(too_many))
    assert error.param == path or path.startswith(f"{error.param}["), str(error)
    assert "at most" in str(error) and len(str(error)) < 300


def test_every_field_without_a_kind_is_one_that_is_never_looked_at() -> None:
    for body in BODIES:
        for name, schema in PARTS[body.__name__]["properties"].items():
            if not schema.keys() & {"type", "anyOf", "$ref", "const", "enum"}:
                assert name in ANYTHING, (body, name)


def test_only_the_first_wrong_item_of_a_list_is_looked_at(monkeypatch) -> None:
    """A list as long as allowed, of which every item is wrong, must not become as many errors."""
    seen: list[int] = []

    def count(error):
        seen.append(error.error_count())
        raise ApiError(400, "seen")

    monkeypatch.setattr("stellarbyte_server.api.contract.bodies.body.from_validation", count)
    for body, field, value in [
        (ChatBody, "messages", [{}] * 10_000),
        (ChatBody, "tools", [{}] * 128),
        (DetokenizeBody, "tokens", [""] * 100_000),
        (CompletionBody, "stop_token_ids", [""] * 128),
        (ChatBody, "messages", [{"role": "assistant", "content": "", "tool_calls": [{}] * 128}] * 1000),
    ]:
        refusal(body, {**example(PARTS[body.__name__]), field: value})
    assert len(seen) == 5 and max(seen) <= 3  # the fields that one item lacks


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"user":[' + b"{}," * MAX_CONTAINERS + b"{}]}", "lists and objects"),
        (b'{"user":' + b"[" * MAX_CONTAINERS, "lists and objects"),
        (b'{"user":{' + b'"a":0,' * MAX_MEMBERS + b'"b":0}}', "members"),
        (b'{"user":"\\\\",' + b'"a":[[]],' * MAX_CONTAINERS + b'"b":0}', "lists and objects"),
        (b"{" + b",".join(b'"f%d":1' % i for i in range(MAX_FIELDS + 1)) + b"}", "fields"),
    ],
)
def test_what_would_take_long_to_read_is_refused_unread(text: bytes, reason: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_body(ChatBody, text, warn_unknown=True)
    assert reason in str(caught.value) and caught.value.status == 400


def test_brackets_in_a_text_are_text() -> None:
    code = '{"a": [1, 2, "\\\\"]}\n\\' * 20_000
    assert len(code) > 2 * MAX_CONTAINERS
    content = {"model": "m", "messages": [{"role": "user", "content": code}]}
    body, _ = parse_body(ChatBody, json.dumps(content).encode(), warn_unknown=False)
    assert body.messages[0].content == code


def structure(value: Any) -> tuple[int, int]:
    """Lists and objects of a JSON value, and members."""
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    counts = [structure(each) for each in inner]
    own = (1, len(value) if isinstance(value, dict) else 0) if isinstance(value, dict | list) else (0, 0)
    return own[0] + sum(count[0] for count in counts), own[1] + sum(count[1] for count in counts)


def test_structure_is_counted_as_a_reader_finds_it(monkeypatch) -> None:
    """Random texts of quotes, backslashes and brackets, inside of strings and outside."""
    chance = random.Random(1)
    monkeypatch.setattr(bounds, "_SCANNED_AT_ONCE", 7)

    def value(depth: int) -> Any:
        match chance.randrange(4 if depth else 1):
            case 1:
                return [value(depth - 1) for _ in range(chance.randrange(4))]
            case 2 | 3:
                return {f"{text()}{i}": value(depth - 1) for i in range(chance.randrange(4))}
        return text()

    def text() -> str:
        return "".join(chance.choices('\\"[{:,é', k=chance.randrange(5)))

    for _ in range(2000):
        content = [value(5)]
        containers, members = structure(content)
        encoded = json.dumps(content, ensure_ascii=False).encode()
        for most, is_fine in ((containers, True), (containers - 1, False)):
            monkeypatch.setattr(bounds, "MAX_CONTAINERS", most)
            monkeypatch.setattr(bounds, "MAX_MEMBERS", members)
            assert (too_large(encoded) is None) == is_fine, encoded
        if members:
            monkeypatch.setattr(bounds, "MAX_CONTAINERS", containers)
            monkeypatch.setattr(bounds, "MAX_MEMBERS", members - 1)
            assert too_large(encoded) is not None, encoded


def test_large_bodies_are_parsed_off_the_event_loop_and_small_ones_on_it() -> None:
    class Asked:
        def __init__(self, text: bytes) -> None:
            self.text = text
            self.headers: dict[str, str] = {}
            self.scope = {"state": {}}

        async def body(self) -> bytes:
            return self.text

    async def run() -> list[bool]:
        def parse(_: bytes) -> bool:
            return threading.current_thread() is threading.main_thread()

        service = SimpleNamespace(text_work=TextWork())
        return [await parse_apart(Asked(b"x" * size), service, parse) for size in (100, 2**21)]

    assert asyncio.run(run()) == [True, False]
