"""Schemas without `strict`: every valid one is taken, and what the grammar leaves out is looked at afterwards."""

import json
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from stellarbyte_server.api.contract.errors import ApiError
from stellarbyte_server.api.structured.answer_check import AnswerCheck
from stellarbyte_server.api.structured.grammars import json_grammar
from stellarbyte_server.api.structured.json_schema import EnforceableSchema
from stellarbyte_server.api.structured.offered_tools import OfferedTool
from stellarbyte_server.protocol.grammar import LIMITS, check_grammar
from tests.support.schemas import refusal
from tests.support.servers.fake_engine import make_tokenizer

FAKE = LLTokenizer(make_tokenizer().to_str(), eos_token=256)
OBJECT = {"type": "object"}


def accepts(schema: dict[str, Any], value: Any) -> bool:
    matcher = LLMatcher(FAKE, json_grammar(schema), log_level=0, limits=LIMITS)
    assert not matcher.is_error(), matcher.get_error()
    tokens = list(json.dumps(value, ensure_ascii=False).encode())
    return matcher.validate_tokens([*tokens, 256]) == len(tokens) + 1


def named(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return OBJECT | {"properties": {name: schema}, "required": [name], "additionalProperties": False}


# As generators of tools write them: schema, an answer that it allows, one that its grammar keeps out.
GENERATED: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "schemars 0.8": (
        {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "title": "Params",
            **named("limit", {"type": "integer", "format": "uint32", "minimum": 0.0, "nullable": True}),
        },
        {"limit": 3}, {"limit": -1},
    ),
    "schemars 1": (
        {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            **named("id", {"type": ["integer", "null"], "format": "uint64", "minimum": 0, "maximum": 2**64 - 1}),
        },
        {"id": None}, {"id": -1},
    ),
    "Go": (named("count", {"type": "integer", "format": "int64", "markdownDescription": "*n*"}), {"count": 7},
           {"count": "7"}),
    "Go's slices": (named("tags", {"type": ["null", "array"], "items": {"type": "string"}, "uniqueItems": True}),
                    {"tags": ["a", "b"]}, {"tags": [1]}),
    "zod's record": (
        named("map", OBJECT | {"propertyNames": {"type": "string"}, "additionalProperties": {"type": "number"}}),
        {"map": {"a": 1.5}}, {"map": {"a": "b"}},
    ),
    "zod's integer": (
        named("n", {"type": "integer", "minimum": -(2**53) + 1, "maximum": 2**53 - 1}), {"n": 5}, {"n": 5.5},
    ),
    "zod's e-mail": (
        named("mail", {"type": "string", "format": "email",
                       "pattern": "^(?!\\.)(?!.*\\.\\.)([A-Za-z0-9_'+\\-\\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9]+\\.)+"
                       "[A-Za-z]{2,}$"}),
        {"mail": "a@b.org"}, {"mail": 1},
    ),
    "zod's union": (
        named("u", {"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}, {"type": "null"}]}),
        {"u": "long text"}, {"u": 1},
    ),
    "OpenAPI 3.0": (
        named("price", {"type": "number", "format": "double", "minimum": 0, "exclusiveMinimum": True, "nullable": True,
                        "xml": {"name": "p"}, "enumDescriptions": ["a"]}),
        {"price": 0.5}, {"price": 0},
    ),
    "TypeScript": (
        {"$schema": "http://json-schema.org/draft-04/schema#", "defaultProperties": [], "typings": {},
         **named("url", {"type": "string", "format": "uri-reference"}), "$id": "#args"},
        {"url": "/a"}, {"url": 1},
    ),
    "conditions": (
        OBJECT | {
            "properties": {"kind": {"enum": ["file", "text"]}, "path": {"type": "string"}},
            "required": ["kind"], "dependentRequired": {"path": ["kind"]}, "minProperties": 1, "maxProperties": 20,
            "if": {"properties": {"kind": {"const": "file"}}}, "then": {"required": ["path"]}, "else": {},
            "not": {"required": ["both"]}, "unevaluatedProperties": False,
        },
        {"kind": "text"}, {"kind": "other"},
    ),
    "contents": (
        named("list", {"type": "array", "contains": {"const": 1}, "minContains": 1, "maxItems": 2**32 - 1}
              | {"items": {"type": "integer"}}),
        {"list": [1, 2]}, {"list": "1"},
    ),
    "embedded": (
        named("text", {"type": "string", "contentMediaType": "application/json", "contentSchema": {"type": "object"}}),
        {"text": "{}"}, {"text": {}},
    ),
    "recursion": (
        {"$defs": {"node": {"$dynamicAnchor": "node", **OBJECT, "properties": {"next": {"$dynamicRef": "#node"}}}},
         "$ref": "#/$defs/node"},
        {"next": {}}, 5,
    ),
    "by name": ({"$ref": "#thing", "$defs": {"thing": {"$anchor": "thing", "type": "string"}}}, "a", None),
    "into what is left out": ({"not": {"$ref": "#/not/$defs/a", "$defs": {"a": {"type": "null"}}},
                               "properties": {"b": {"$ref": "#/not/$defs/a"}}, "type": "object"}, {"b": None}, 5),
    "large numbers": (named("n", {"enum": [10**30, 1]}), {"n": 1}, {}),
    "control characters": (OBJECT | {"properties": {"\x07": {}, "a": {"const": "\x01"}}, "required": ["\x07", "a"]},
                           {"a": 1}, []),
    "many places": (named("n", {"type": "number", "multipleOf": 1e-12}), {"n": 1.5}, {"n": ""}),
}  # fmt: skip


@pytest.mark.parametrize("name", GENERATED)
def test_a_schema_as_generators_write_it_is_taken(name: str) -> None:
    schema, allowed, kept_out = GENERATED[name]
    check_grammar(json_grammar(schema))
    assert accepts(schema, allowed)
    if kept_out is not None:
        assert not accepts(schema, kept_out)


BROKEN: list[tuple[dict[str, Any], Any, str]] = [
    ({"type": "array", "uniqueItems": True}, [1, 1], "'uniqueItems'"),
    ({**OBJECT, "propertyNames": {"pattern": "^a"}}, {"a": 1, "b": 2}, "'pattern'"),
    ({"not": {"type": "string"}}, "x", "'not'"),
    ({**OBJECT, "if": {"required": ["a"]}, "then": {"required": ["b"]}}, {"a": 1}, "'required'"),
    ({"type": "array", "contains": {"const": 7}}, [1], "'contains'"),
    ({**OBJECT, "dependentRequired": {"a": ["b"]}}, {"a": 1}, "'dependentRequired'"),
    ({**OBJECT, "dependencies": {"a": ["b"]}}, {"a": 1}, "'dependencies'"),
    ({**OBJECT, "properties": {"a": {}}, "unevaluatedProperties": False}, {"b": 1}, "'unevaluatedProperties'"),
    ({"type": "string", "pattern": "^(?!x)"}, "xy", "'pattern'"),
    ({**OBJECT, "minProperties": 2}, {"a": 1}, "'minProperties'"),
    ({"oneOf": [{"type": "string"}, {"maxLength": 3}]}, "ab", "'oneOf'"),
    ({"type": "integer", "maximum": 2**60}, 2**61, "'maximum'"),
    ({"enum": [2**60]}, 3, "'enum'"),
    ({"type": "number", "multipleOf": 1e-12}, 1e-13, "'multipleOf'"),
    ({"$ref": "#n", "$defs": {"n": {"$anchor": "n", "type": "null"}}}, 1, "'type'"),
    ({**OBJECT, "patternProperties": {"^(?!a)": {"type": "null"}}, "additionalProperties": False}, {"b": 1}, "'type'"),
]


@pytest.mark.parametrize("schema, value, keyword", BROKEN)
def test_what_the_grammar_leaves_out_is_looked_at_afterwards(schema: dict[str, Any], value: Any, keyword: str) -> None:
    """Its grammar allows the answer; the check names what it breaks; with `strict` the schema is refused."""
    assert accepts(schema, value)
    check = AnswerCheck.of(schema)
    assert check is not None
    said = check.violation(json.dumps(value), [])
    assert said is not None and keyword in said and said.startswith("The answer violates") and "\n" not in said
    refusal(schema, strict=True)


def test_an_answer_that_keeps_what_was_left_out_breaks_nothing() -> None:
    for schema, allowed, _ in GENERATED.values():
        check = AnswerCheck.of(schema)
        assert check is not None
        if "\x07" not in schema.get("required", ()):  # which no answer can have
            assert check.violation(json.dumps(allowed), []) is None, schema


def test_calls_are_checked_against_the_schema_of_their_tool() -> None:
    def tool(name: str, **fields: Any) -> OfferedTool:
        return OfferedTool(name=name, path="tools[0].function", **fields)

    distinct = {"type": "object", "properties": {"a": {"uniqueItems": True}}}
    check = AnswerCheck.of(None, [tool("any"), tool("loose", parameters=distinct)])
    assert check is not None
    assert check.violation("", [("loose", '{"a": [1, 2]}'), ("any", "{}")]) is None
    said = check.violation("", [("any", "{}"), ("loose", '{"a": [2, 2]}')])
    assert said is not None and said.startswith("The call of loose violates") and "$.a" in said
    assert AnswerCheck.of(None, [tool("any"), tool("held", parameters=OBJECT, strict=True)]) is None


def test_a_schema_that_is_not_valid_is_refused_in_what_is_left_out_too() -> None:
    for schema, place in (
        ({"not": 5}, "#/not"),
        ({"properties": {"a": {"if": {"type": 5}}}}, "#/properties/a/if/type"),
        ({"dependentSchemas": {"a": {"anyOf": []}}}, "#/dependentSchemas/a/anyOf"),
        ({"contains": {"$ref": "#/nowhere"}}, '"#/nowhere"'),
        ({"uniqueItems": 1}, "#/uniqueItems"),
    ):
        assert place in refusal(schema, strict=False)


def test_a_schema_that_is_enforced_whole_is_not_looked_at_again() -> None:
    schema = {**OBJECT, "properties": {"a": {"type": "string", "format": "date"}}, "required": ["a"]}
    assert EnforceableSchema(schema, "tools", strict=False).left_out == []
    check = AnswerCheck.of(schema)
    assert check is not None and check.violation("no JSON at all", []) is None


def test_a_name_without_strict_is_refused_only_where_it_leads_nowhere() -> None:
    with pytest.raises(ApiError, match="does not point to a schema"):
        json_grammar({"$ref": "https://example.com/schema"})
