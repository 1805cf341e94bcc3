"""What a model may write that can call tools, in every format."""

import json

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stellarbyte_server.api.answers.tool_parser import CallArguments, CallStart, Content, ToolCallParser
from stellarbyte_server.api.contract.errors import ApiError
from stellarbyte_server.api.structured.grammars import json_rule
from stellarbyte_server.api.structured.tool_calls import tools_grammar
from stellarbyte_server.api.structured.tool_formats import HERMES, LLAMA, MISTRAL, MISTRAL_LIST, QWEN_CODER
from tests.support.tools.grammars import SPECIAL, allowed_part, assert_allows
from tests.support.tools.offered import (
    FORMATS,
    TOOLS,
    by_name,
    custom,
    function,
    hermes,
    llama,
    mistral,
    mistral_list,
    offered,
    one_call,
    qwen_coder,
)

GET = hermes("get", '{"city": "São"}')
TIME = hermes("get_time", "{}")
every_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)


def grammar(*tools, format=HERMES, required=False, several=True, **fields):
    return tools_grammar(offered(*tools), format, required=required, several=several, **fields)


AUTO_TEXTS = [
    "",
    "plain é text\nwith <, <tool, <tool_cal and </tool_call>",
    '{"name": "get"}',
    f"I look.\n{GET}",
    f"<{TIME}",
    "a <tool_call>|b",
    f"{GET}| then",
    '<tool_call>\n{"name": "get|x"',
    '<tool_call>\n{"name": "get", "arguments": {"|town": "x"}}',
    '<tool_call>\n{"name": "get", "arguments": {|}}',
    '<tool_call>\n{"name": "get_time", "arguments": {|"city": "x"}}',
    '<tool_call>\n{"name": "get", "arguments": {"city": "x"|, "b": 1}}',
]


@pytest.mark.parametrize("text", [*AUTO_TEXTS, f"{GET}\n{TIME}\n{GET}", f"{GET}\n|\n{GET}"])
def test_with_auto_a_trigger_has_to_become_a_call(text):
    assert_allows(grammar(), text)


@pytest.mark.parametrize("text", [*AUTO_TEXTS, f"{GET}|\n{TIME}", f"x{TIME}|\n"])
def test_not_several_means_one_call_at_most(text):
    assert_allows(grammar(several=False), text)


@pytest.mark.parametrize("text", ["|I look.", f"{GET}\n{TIME}", GET, f"|\n{GET}", f"{TIME}\n|I look."])
def test_required_means_calls_and_nothing_else(text):
    assert_allows(grammar(required=True), text)


@every_format
def test_every_format_has_one_call_or_text_and_nothing_where_a_call_is_required(format):
    call = one_call(format)
    assert_allows(grammar(format=format), call)
    assert_allows(grammar(format=format), "text")
    assert_allows(grammar(format=format, required=True), call)
    assert allowed_part(grammar(format=format, required=True), "text") == ([], False)
    assert_allows(grammar(format=format, several=False), f"{call}|{format.separator or ' '}{call}x")


@every_format
def test_arguments_of_every_format_follow_their_schema(format):
    call = one_call(format, "Rome")
    tool = function("get", city={"enum": ["Paris", "London"]})
    written, _ = allowed_part(grammar(tool, format=format, required=True), call)
    assert bytes(written).decode() == call[: call.index("Rome")]


@pytest.mark.parametrize(
    "text",
    [
        *("", "plain text", '{"x": 1}', '{"names": 1}', "{", '{"nam', f"Well: {llama('other', '1')}"),
        *(llama("get", '{"city": "x"}'), llama("get_time", "{}"), f"{llama('get_time', '{}')}|; {{"),
        *('{"name": "|other"', '{"name":|1', llama("get", '{"|town": 1}')),
    ],
)
def test_an_answer_of_llama_is_text_or_one_call(text):
    assert_allows(grammar(format=LLAMA), text)


def test_a_call_of_llama_may_begin_with_the_token_for_programs_where_there_is_one():
    special = {"<|python_tag|>": 257}
    rules = grammar(format=LLAMA, special_ids=special)
    _, is_whole = allowed_part(rules, f"<|python_tag|>{llama('get_time', '{}')}", special)
    assert is_whole
    assert allowed_part(rules, "<|python_tag|>text", special) == ([257], False)


@pytest.mark.parametrize("special", [{}, SPECIAL], ids=["text", "special tokens"])
@pytest.mark.parametrize(
    "text",
    [
        "text [TOOL",
        mistral("get", '{"city": "x"}'),
        mistral("get_time", "{}") + mistral("get", '{"city": "x"}'),
        f"I look.{mistral('get_time', '{}')}",
        f"{mistral('get_time', '{}')}| then",
        "[TOOL_CALLS]get|x",
    ],
)
def test_mistrals_calls_follow_each_other_with_a_mark_each(special, text):
    assert_allows(grammar(format=MISTRAL, special_ids=special), text, special)


@pytest.mark.parametrize("special", [{}, SPECIAL], ids=["text", "special tokens"])
@pytest.mark.parametrize(
    "text",
    [
        mistral_list(("get", '{"city": "x"}')),
        mistral_list(("get_time", "{}"), ("get", '{"city": "x"}'), ("get_time", "{}")),
        f"I look.{mistral_list(('get_time', '{}'))}",
        mistral_list(("get_time", "{}")) + "|,",
        "[TOOL_CALLS][|]",
    ],
)
def test_mistrals_older_calls_are_a_list(special, text):
    assert_allows(grammar(format=MISTRAL_LIST, special_ids=special), text, special)


def test_a_mark_that_is_a_special_token_is_no_text():
    written, may_stop = allowed_part(grammar(format=MISTRAL, special_ids=SPECIAL), "[TOOL_CALLS]x")
    assert (bytes(written), may_stop) == (b"[TOOL_CALLS]x", True)


@pytest.mark.parametrize("format", [HERMES, LLAMA, MISTRAL, QWEN_CODER])
@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        {"type": "object", "properties": {"name": {"enum": ["get", "x"]}, "age": {"type": "integer"}}},
        {"type": "array", "items": {"type": "object"}},
    ],
)
@pytest.mark.parametrize(
    "value", [{}, {"name": "x"}, {"name": "get", "age": 3}, {"age": 1}, [{"name": "get"}, {}], "text"]
)
def test_a_format_of_the_content_and_tools_go_together(format, schema, value):
    rules = grammar(format=format, content_rule=json_rule("content", schema))
    call = one_call(format)
    assert_allows(rules, call)
    assert_allows(rules, "|plain text")
    assert_allows(rules, call.replace("city", "|town"))
    fits = jsonschema.Draft202012Validator(schema).is_valid(value)
    text = json.dumps(value)
    written, may_stop = allowed_part(rules, text)
    assert (bytes(written) == text.encode() and may_stop) == fits


def test_a_tool_without_a_schema_takes_no_arguments_and_one_without_a_type_an_object():
    tool = {"name": "f", "parameters": {"properties": {"a": {"type": "integer"}}, "required": ["a"]}}
    rules = grammar({"type": "function", "function": tool}, required=True)
    assert_allows(rules, hermes("f", '{"a": 1}'))
    assert_allows(rules, hermes("f", "|1"))


def test_a_schema_with_definitions_keeps_them():
    schema = {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/A"}},
        "required": ["a"],
        "$defs": {"A": {"const": 7}},
    }
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    for format, call in ((HERMES, hermes("f", '{"a": 7}')), (LLAMA, llama("f", '{"a": 7}'))):
        assert_allows(grammar(tool, *TOOLS, format=format), call)
        assert_allows(grammar(tool, *TOOLS, format=format), call.replace("7", "|8"))
    assert_allows(grammar(tool, format=QWEN_CODER), qwen_coder("f", a="7"))
    assert_allows(grammar(tool, format=QWEN_CODER), qwen_coder("f", a="|8"))


@every_format
def test_as_many_tools_as_may_be_offered_can_be_called(format):
    tools = [*({"type": "function", "function": {"name": f"get{i}"}} for i in range(127)), TOOLS[0]]
    assert_allows(grammar(*tools, format=format), one_call(format))


@pytest.mark.parametrize("format", [HERMES, QWEN_CODER])
@pytest.mark.parametrize("schema", [{"type": "string"}, {"properties": {"a": {"pattern": r"\A"}}}])
def test_a_schema_that_cannot_be_enforced_is_refused_by_its_place(schema, format):
    tool = {"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}
    with pytest.raises(ApiError) as caught:
        grammar(TOOLS[0], tool, format=format)
    assert (caught.value.status, caught.value.param) == (400, "tools[1].function.parameters")


@given(
    st.lists(st.sampled_from([*AUTO_TEXTS, GET, TIME, "\n", "<", '{"', "}"]), max_size=6).map("".join), st.booleans()
)
@settings(deadline=None, max_examples=50)
def test_what_the_grammar_lets_through_is_read_as_its_calls(text, several):
    tokens, is_whole = allowed_part(grammar(several=several), text)
    if not is_whole:
        return
    written = bytes(tokens).decode(errors="ignore")
    parser = ToolCallParser(HERMES, by_name())
    pieces = parser.push(written) + parser.flush()
    assert "<tool_call>" not in "".join(piece.text for piece in pieces if isinstance(piece, Content))
    assert sum(isinstance(piece, CallStart) for piece in pieces) == written.count("<tool_call>")
    for i in range(written.count("<tool_call>")):
        json.loads("".join(piece.text for piece in pieces if isinstance(piece, CallArguments) and piece.index == i))


# Custom tools

SUM = 'start: NUM ("+" NUM)*\nNUM: /[0-9]+/'


def input_call(format, text):
    if format is QWEN_CODER:
        return qwen_coder("run", input=text)
    return one_call(format).replace("São", text).replace("city", "input").replace("get", "run")


@every_format
def test_the_input_of_a_custom_tool_is_any_text_or_follows_its_expression(format):
    assert_allows(grammar(custom("run"), format=format), input_call(format, "x = 'é' <a>"))
    rules = grammar(custom("run", "regex", "^[a-c/]+$"), format=format)
    assert_allows(rules, input_call(format, "ab/c"))
    assert_allows(rules, input_call(format, "ab|d"))


@every_format
@pytest.mark.parametrize("definition", [SUM, 'start: "a" | /.+[0-9]"/'])
def test_an_input_with_a_grammar_ends_its_answer(format, definition):
    text = "12+3" if definition == SUM else 'x"}}5"'
    rules = grammar(custom("run", "lark", definition), TOOLS[0], format=format)
    call = input_call(format, "IN")
    begun = call[: call.index("IN")]
    assert_allows(rules, begun + text)
    assert_allows(rules, begun + ("12+|+" if definition == SUM else "a|\n"))
    if format.separator is not None:
        first = one_call(format).removesuffix(format.closing) + format.separator
        rest = begun.removeprefix(format.trigger + format.opening) if format.is_list else begun
        assert_allows(rules, first + rest + text)


def test_a_grammar_of_an_input_is_only_lark():
    for directive in ("%json {}", "%llguidance {}"):
        with pytest.raises(ApiError) as caught:
            grammar(custom("run", "lark", f"start: x\nx: {directive}"))
        assert caught.value.param == "tools[0].custom.format.grammar.definition"
