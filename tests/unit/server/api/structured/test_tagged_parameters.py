"""Parameters in tags: which there are, and what may stand in them."""

import json

import pytest

from stellarbyte_server.api.answers.tool_parser import CallArguments, ToolCallParser
from stellarbyte_server.api.contract.errors import ApiError
from stellarbyte_server.api.structured.tagged_parameters import parameters_of
from stellarbyte_server.api.structured.tool_calls import tools_grammar
from stellarbyte_server.api.structured.tool_formats import QWEN_CODER
from tests.support.tools.grammars import assert_allows
from tests.support.tools.offered import by_name, function, offered, qwen_coder


def schema_tool(schema):
    return {"type": "function", "function": {"name": "f", "parameters": schema}}


def rules(tool):
    return tools_grammar(offered(tool), QWEN_CODER, required=True, several=False)


def arguments(tool, text):
    parser = ToolCallParser(QWEN_CODER, by_name(tool))
    pieces = [piece for character in text for piece in parser.push(character)]
    return json.loads("".join(piece.text for piece in pieces if isinstance(piece, CallArguments)))


NULL = {"type": "null"}


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, 'a "text"\n\\n of é </parameter> {}', 'a "text"\n\\n of é </parameter> {}'),
        ({"type": "string"}, "", ""),
        ({"type": "string"}, "null", "null"),
        ({"type": "integer"}, "7", 7),
        ({"type": "array", "items": {"type": "string"}}, '["a", "b"]', ["a", "b"]),
        ({"type": "boolean"}, "true", True),
        ({"enum": ["a", "b"]}, "b", "b"),
        ({"enum": ["a", 1]}, "1", 1),
        ({"const": "x"}, "x", "x"),
        ({"anyOf": [{"type": "string"}, NULL]}, "null", None),
        ({"anyOf": [{"type": "string"}, NULL]}, "nul", "nul"),
        ({"type": ["string", "null"]}, "nullable", "nullable"),
        ({"anyOf": [{"enum": ["a"]}, NULL]}, "null", None),
        ({"type": "string", "pattern": "^[a-z]+$"}, '"abc"', "abc"),
        ({"$ref": "#/$defs/A"}, "x", "x"),
        ({"type": "array", "items": {"$ref": "#/$defs/A"}}, '["x"]', ["x"]),
    ],
)
def test_a_value_is_a_text_where_its_schema_is_and_json_otherwise(schema, text, value):
    whole = {"type": "object", "properties": {"p": schema}, "required": ["p"], "$defs": {"A": {"enum": ["x", "y"]}}}
    call = qwen_coder("f", p=text)
    assert_allows(rules(schema_tool(whole)), call)
    assert arguments(schema_tool(whole), call) == {"p": value}


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "integer"}, "|x"),
        ({"enum": ["a", "b"]}, "|c"),
        ({"anyOf": [{"enum": ["a"]}, NULL]}, "n|o"),
        ({"type": "string", "pattern": "^[a-z]+$"}, '"a|1'),
    ],
)
def test_a_value_follows_its_schema(schema, text):
    assert_allows(rules(function("f", p=schema)), qwen_coder("f", p=text))


def test_parameters_come_in_the_order_of_the_schema_and_the_required_ones_always():
    schema = {"properties": {"a": {"type": "integer"}, "b": {"type": "string"}, "c": {}}, "required": ["b"]}
    tool = schema_tool(schema)
    for values in ({"b": "x"}, {"a": "1", "b": "x", "c": "[]"}, {"b": "x", "c": "null"}):
        assert_allows(rules(tool), qwen_coder("f", **values))
    assert_allows(rules(tool), qwen_coder("f", a="1").replace("</function", "<|/function"))
    assert arguments(tool, qwen_coder("f", a="1", b="x")) == {"a": 1, "b": "x"}


def test_a_function_without_parameters_is_called_without():
    for tool in (function("f"), schema_tool(None)):
        assert_allows(rules(tool), qwen_coder("f"))
        assert arguments(tool, qwen_coder("f")) == {}


def test_an_object_that_names_no_properties_takes_any():
    tool = schema_tool({"type": "object"})
    call = qwen_coder("f", a="1", b="text", c='{"d": null}', e="NaN")
    assert_allows(rules(tool), call)
    assert arguments(tool, call) == {"a": 1, "b": "text", "c": {"d": None}, "e": "NaN"}


def test_properties_are_found_behind_references_and_in_branches():
    schema = {
        "$ref": "#/$defs/A",
        "allOf": [{"properties": {"b": {}}, "required": ["b"]}],
        "anyOf": [{"properties": {"c": {}}, "required": ["c"]}, {"$ref": "#"}],
        "$defs": {"A": {"properties": {"a": {}}, "required": ["a"]}},
    }
    found = {each.name: each.is_required for each in parameters_of(schema)}
    assert found == {"a": True, "b": True, "c": False}


def test_a_schema_of_many_branches_in_a_circle_is_read_in_a_bounded_number_of_steps():
    circle = {"anyOf": [{"$ref": "#/$defs/A"}] * 300, "properties": {"a": {}}}
    found = parameters_of({"$ref": "#/$defs/A", "$defs": {"A": circle | {"oneOf": [{"anyOf": [circle]}] * 300}}})
    assert [each.name for each in found] == ["a"]


def test_what_cannot_be_written_in_tags_is_refused_by_its_place():
    for tool in (
        function("f", **{"a>b": {}}),
        schema_tool(
            {
                "properties": {f"p{i}": {"$ref": "#/$defs/A"} for i in range(900)},
                "$defs": {"A": {"enum": list(range(2000))}},
            }
        ),
    ):
        with pytest.raises(ApiError) as caught:
            rules(tool)
        assert (caught.value.status, caught.value.param) == (400, "tools[0].function.parameters")
